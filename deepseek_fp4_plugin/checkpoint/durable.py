"""Files that survive a kill and a power loss whole, or are known to be damaged.

A file's bytes are safe when it was fsynced, its name when its folder was: so a small file is written beside its name,
fsynced, renamed, and the folder fsynced. What a resumed run relies on is kept as sealed JSON, a line with its own
checksum: a line that is cut, zeroed or altered reads as absent, never as something else.
"""

import errno
import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError

PARTIAL = ".partial"  # ends the name of a file that is being written
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` safe: what was created, renamed or removed in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:  # file systems that have no such thing say so
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """`folder` and those above it, as far as they are missing, with safe names."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Put `content` at `path`: after a stop there is the old file, or none, or the whole new one."""
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise not_written(path, error) from None


def not_written(path: Path, error: OSError) -> CheckpointError:
    """The sentence for a file that could not be written, with the advice that fits."""
    advice = "free some space and run again" if error.errno in _NO_SPACE else "run again"
    return CheckpointError(f"cannot write {path}: {error.strerror or error}; {advice} to continue")


def seal(content: Any) -> str:
    """A line of JSON that carries its own checksum."""
    text = json.dumps(content, separators=(",", ":"))
    return f'{{"crc32":"{zlib.crc32(text.encode()):08x}","content":{text}}}\n'


def unseal(line: bytes) -> Any | None:
    """The content of a sealed line, None when the line is not exactly as it was written."""
    try:
        content = json.loads(line)["content"]
        return content if seal(content).encode() == line else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def read_sealed(path: Path) -> Any | None:
    """The content of a file of one sealed line, None when it is absent or damaged."""
    try:
        return unseal(path.read_bytes())
    except OSError:
        return None


def forget(descriptor: int, offset: int = 0, count: int = 0) -> None:
    """Let the kernel drop its copy of a file's bytes from memory, as far as they are on disk.  count: 0 for all."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


class Journal:
    """A file of sealed lines, appended as they come and safe after `sync`.

    lines: the contents of the lines that an earlier run wrote and nothing damaged, in their order.
    shared: other processes may append to it as well; their lines are found by `reload`.
    alone: none of them does so yet, so that what is damaged can be taken out.
    """

    def __init__(self, path: Path, shared: bool = False, alone: bool = True):
        self.path, self._shared = path, shared
        self.lines: list[Any] = []
        damaged = self.reload()
        if alone and (damaged or not path.exists()):  # what comes next must begin a line of its own
            write_file(path, "".join(map(seal, self.lines)))
        elif not path.exists():
            open(path, "ab").close()
            sync_folder(path.parent)

    def reload(self) -> int:
        """Read the lines that are there now; returns how many of them are damaged."""
        found = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        self.lines = [content for line in found if (content := unseal(line)) is not None]
        return len(found) - len(self.lines)

    def append(self, content: Any) -> None:
        try:
            with open(self.path, "ab") as file:
                if self._shared:
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.write(self._line_end() + seal(content).encode())
        except OSError as error:
            raise not_written(self.path, error) from None

    def _line_end(self) -> bytes:
        """What ends the line of another process that was stopped within it."""
        if not self._shared:
            return b""
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            return b"" if file.read(1) in (b"", b"\n") else b"\n"

    def sync(self) -> None:
        try:
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise not_written(self.path, error) from None
