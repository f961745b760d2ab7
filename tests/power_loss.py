"""A disk that can be stopped anywhere: what is left of a folder after a kill, a power loss or with no space at all.

`Disk` watches everything that this process writes, renames, creates and removes under a folder. Before each such step,
and in the middle of each write, `at_step` is called and may copy what would be left there and then, or raise.

After a kill that is the folder as it is. After a power loss it is what was fsynced, and of the rest anything: a file's
bytes since its last fsync are there, cut, zeroed in places or absent, and each name in a folder is the one of the
folder's last fsync or the later one, independently of its neighbours. Real file systems are kinder than that.
"""

import builtins
import contextlib
import errno
import io
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

_BLOCK = 512  # bytes that a disk writes as one


class Disk:
    """`root`: the folder, which is taken for safe as it is at the start.  steps: what happened, for messages."""

    def __init__(self, root: Path, at_step: Callable[[int, str], None]):
        self.root, self.at_step = root, at_step
        self.steps: list[str] = []
        self._held: dict[int, int] = {}  # inode -> descriptor, so that no inode number is used twice
        self._bytes: dict[int, bytes] = {}  # of files at their last fsync
        self._names: dict[int, dict[str, int]] = {}  # of folders at their last fsync

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        for folder in (self.root, *(path for path in self.root.rglob("*") if path.is_dir())):
            self._remember_folder(folder)
        real_open, real_fsync = builtins.open, os.fsync

        def watched_open(file, mode="r", *args, **kwargs):
            opened = real_open(file, mode, *args, **kwargs)
            inside = isinstance(file, str | os.PathLike) and self._inside(file)
            return _Watched(opened, self, Path(file).name) if inside and set(mode) & set("wa+x") else opened

        def watched_fsync(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if not self._inside(path):
                return real_fsync(descriptor)
            self.step(f"fsync {Path(path).name}")
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                return self._remember_folder(Path(path))
            self._hold(path, status.st_ino)
            self._bytes[status.st_ino] = self._current(status.st_ino)

        with contextlib.ExitStack() as stack:
            stack.callback(self._release)
            for owner in (builtins, io):
                stack.enter_context(mock.patch.object(owner, "open", watched_open))
            stack.enter_context(mock.patch.object(os, "fsync", watched_fsync))
            for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
                stack.enter_context(mock.patch.object(os, name, self._announced(name, getattr(os, name))))
            yield

    def step(self, what: str) -> None:
        self.steps.append(what)
        self.at_step(len(self.steps) - 1, what)

    def left_after_kill(self, target: Path) -> None:
        shutil.copytree(self.root, target, symlinks=True)

    def left_after_power_loss(self, target: Path, chance: random.Random) -> None:
        self._leave(self.root.stat().st_ino, self.root, target, chance)

    def _leave(self, inode: int, live: Path | None, target: Path, chance: random.Random) -> None:
        """Put what is left of one file or folder at `target`.  live: where it is now, if it still is anywhere."""
        mode = os.stat(live).st_mode if live else os.fstat(self._held[inode]).st_mode
        if not stat.S_ISDIR(mode):
            target.write_bytes(self._left_bytes(inode, live, chance))
            return
        target.mkdir()
        synced = self._names.get(inode, {})
        now = {entry.name: entry.inode() for entry in os.scandir(live)} if live else {}
        for name in sorted({*synced, *now}):
            choice = chance.choice((synced, now)).get(name)
            if choice is not None:
                self._leave(choice, self._find(choice), target / name, chance)

    def _left_bytes(self, inode: int, live: Path | None, chance: random.Random) -> bytes:
        synced = self._bytes.get(inode, b"")
        now = live.read_bytes() if live else self._current(inode)
        if synced == now:
            return now
        how = chance.randrange(4)
        if how == 0:
            return synced
        if how == 1:
            return now[: chance.randrange(len(now) + 1)]
        left = bytearray(now)
        if how == 2:
            for start in range(0, len(now), _BLOCK):
                if chance.random() < 0.3:
                    block = synced[start : start + _BLOCK]
                    left[start : start + _BLOCK] = block.ljust(len(left[start : start + _BLOCK]), b"\0")
        return bytes(left)

    def _find(self, inode: int) -> Path | None:
        return next((path for path in self.root.rglob("*") if path.lstat().st_ino == inode), None)

    def _inside(self, path) -> bool:
        return os.path.abspath(path).startswith(f"{self.root}{os.sep}") or Path(path) == self.root

    def _remember_folder(self, folder: Path) -> None:
        entries = {entry.name: entry.inode() for entry in os.scandir(folder)}
        for name, inode in entries.items():
            self._hold(folder / name, inode)
        self._hold(folder, folder.stat().st_ino)
        self._names[folder.stat().st_ino] = entries

    def _hold(self, path: str | Path, inode: int) -> None:
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)

    def _current(self, inode: int) -> bytes:
        return os.pread(self._held[inode], os.fstat(self._held[inode]).st_size, 0)

    def _release(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)

    def _announced(self, name: str, function):
        def announced(path, *args, **kwargs):
            if kwargs.get("dir_fd") is not None or self._inside(path):
                self.step(f"{name} {Path(path).name}")
            return function(path, *args, **kwargs)

        return announced


class _Watched:
    """An open file whose writes are steps: one before, one with half of the bytes there."""

    def __init__(self, file, disk: Disk, name: str):
        self._file, self._disk, self._name = file, disk, name

    def write(self, data):
        if isinstance(data, str):
            self._disk.step(f"write {self._name}")
            return self._file.write(data)
        view = memoryview(data).cast("B") if memoryview(data).nbytes else b""
        self._disk.step(f"write {self._name}")
        self._file.write(view[: len(view) // 2])
        self._file.flush()
        self._disk.step(f"write half of {self._name}")
        self._file.write(view[len(view) // 2 :])
        return len(view)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
