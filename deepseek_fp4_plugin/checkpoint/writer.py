"""Write a sharded safetensors checkpoint tensor by tensor, in any order, holding one tensor in memory.

The names, dtypes and shapes of a checkpoint are known before its values, so every tensor's place on disk is fixed
first: the header is written at once and each tensor goes to its own offset. A shard gets its final name when its last
tensor arrived, and a line with its checksums. Bytes never depend on the order or on interruptions.

A run that stops, at whatever moment, leaves `<destination>.incomplete`, which the next run continues after the last
closed shard. In it lie

    job.json        what the bytes depend on         lock         held by the process that writes here
    shards.jsonl    checksums of the closed shards   work/        the caller's, for what else a resumed run needs
    *.safetensors   closed shards                    checkpoint/  where `finish` puts together what will be the folder

`checkpoint` becomes the destination by one rename. Only then does the rest go, `finished.json` last: by it a run that
was stopped while tidying up is told from one that was not.
"""

import fcntl
import json
import logging
import os
import shutil
import socket
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.durable import (
    PARTIAL,
    Journal,
    make_folder,
    not_written,
    read_sealed,
    seal,
    sync_folder,
    write_file,
)
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import DTYPES, INDEX_NAME, SINGLE_NAME
from deepseek_fp4_plugin.checkpoint.sizes import size_text

DEFAULT_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_JOB, _LOCK, _CLOSED, _FINISHED = "job.json", "lock", "shards.jsonl", "finished.json"
_WORK, _PAYLOAD = "work", "checkpoint"
_CHUNK = 2**22  # bytes of a closed shard checked at once
_log = logging.getLogger(__name__)


class TensorSpec(NamedTuple):
    """A tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class CheckpointWriter:
    """Write the tensors of `plan` under `destination`, which must not exist or be empty; a link is followed.

    plan: all tensors in reading order; consecutive ones share shards of at most `max_shard_bytes`.
    job: what the bytes depend on (source, recipe, ...); an `.incomplete` folder left by a different job is refused.
    work_bytes: what the caller will put into `work`, for the check of the disk.
    before_close: called before a shard is closed; what the caller notes of its tensors must be on disk then.
    finished: the `result` of an earlier run that was stopped while tidying up; then only `finish` is left to call.
    Raises CheckpointError when the destination is taken or being written by another process, the disk is too small, or
    a tensor differs from its plan.
    """

    def __init__(
        self,
        destination: str | Path,
        plan: Iterable[TensorSpec],
        job: dict[str, Any],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        work_bytes: int = 0,
    ):
        self.destination = real_destination(destination)
        self.folder = incomplete_folder(self.destination)
        self.work = self.folder / _WORK
        self.before_close: Callable[[], None] = lambda: None
        self.finished: dict[str, Any] | None = None
        self._lock: IO[str] | None = None  # open as long as this process writes here
        self._job = {**job, "max_shard_bytes": max_shard_bytes}
        self._shards = _layout(list(plan), max_shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.offsets}
        try:
            self._open_folder(work_bytes)
        except OSError as error:
            self.close()
            raise CheckpointError(
                f"cannot use {error.filename or self.folder}: {error.strerror}; choose another folder"
            ) from None
        except BaseException:
            self.close()
            raise

    def needs(self, name: str) -> bool:
        """False when the tensor's shard was already closed by an earlier run."""
        return name in self._shard_of[name].missing

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place. Writing one that an earlier run finished does nothing."""
        shard = self._shard_of[name]
        spec = shard.specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} but was planned as {spec.dtype} {list(spec.shape)}"
            )
        if name not in shard.missing:
            return
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._write_bytes(shard, data, shard.offsets[name])
        shard.checksums[name] = zlib.crc32(data)
        shard.missing.discard(name)
        if not shard.missing:
            self._close(shard)

    def finish(self, files: dict[str, str | bytes], result: dict[str, Any] | None = None) -> None:
        """Write the index and `files` (name -> content), then give the folder its final name.

        result: what `finished` shall be should this be stopped after that.
        Raises CheckpointError naming the first tensor that was never written, or what has been put at the destination
        meanwhile; the same call of a next run then goes on from here.
        """
        if self.finished is None:
            payload = self._payload(files)
            sizes = {path.name: path.stat().st_size for path in payload.iterdir()}
            write_file(self.folder / _FINISHED, seal({"job": self._job, "sizes": sizes, "result": result or {}}))
            try:
                os.rename(payload, self.destination)  # onto nothing or an empty folder, else it fails
            except OSError as error:
                raise CheckpointError(
                    f"{self.destination} cannot be given the finished checkpoint ({error.strerror}), which waits in "
                    f"{self.folder}; make room there and run again"
                ) from None
        try:
            sync_folder(self.destination.parent)
        except OSError as error:
            raise not_written(self.destination, error) from None
        self._tidy()

    def close(self) -> None:
        """Let another writer have the folder, whether finished or not."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _open_folder(self, work_bytes: int) -> None:
        refuse_taken(self.destination)
        if not self.folder.exists():
            self._check_space(work_bytes)
        elif not (self.folder / _JOB).exists() and any(self.folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{self.folder} holds shards of an unknown job; move it away, or remove it to start afresh"
            )
        self._lock = _locked(self.folder, self._job)
        if self._finished_before():
            return
        _refuse_full(self.destination)
        _refuse_other_job(self.folder, self._job)
        (self.folder / _FINISHED).unlink(missing_ok=True)
        for left_over in (*self.folder.glob(f"*{PARTIAL}"), *self.work.glob(f"*{PARTIAL}")):
            left_over.unlink()
        if not (self.folder / _JOB).exists():
            write_file(self.folder / _JOB, _job_text(self._job))
        make_folder(self.work)
        self._closed = Journal(self.folder / _CLOSED)
        self._recognise()
        self._check_space(work_bytes)

    def _finished_before(self) -> bool:
        """Whether the destination is this job's result; an earlier run was stopped after giving it its name."""
        found = read_sealed(self.folder / _FINISHED)
        if not found or found["job"] != json.loads(_job_text(self._job)) or not self.destination.is_dir():
            return False
        there = {path.name: path.stat().st_size for path in self.destination.iterdir()}
        if not found["sizes"].items() <= there.items():
            return False
        self.finished = found["result"]
        for shard in self._shards:
            shard.missing.clear()
        return True

    def _recognise(self) -> None:
        """Mark the shards that an earlier run closed, and remove those that are not as they were closed."""
        known = {line["shard"]: line for line in self._closed.lines}
        places = (self.folder, self.folder / _PAYLOAD)
        there = [(shard, path) for shard in self._shards for folder in places if (path := folder / shard.file).exists()]
        if there:
            _log.warning("%s goes on from %d closed shards, after checking them", self.folder, len(there))
        for shard, path in there:
            if shard.is_whole(path, known.get(shard.file)):
                shard.missing.clear()
            else:
                _log.warning("%s is not as it was written and will be written again", path)
                path.unlink()

    def _check_space(self, work_bytes: int) -> None:
        work = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file()) if self.work.is_dir() else 0
        missing = sum(spec.nbytes for shard in self._shards if shard.missing for spec in shard.specs.values())
        needed = missing + max(work_bytes - work, 0)
        parent = self.destination.parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise CheckpointError(
                f"{self.destination} needs {size_text(needed)} and its disk has {size_text(free)} free"
            )

    def _write_bytes(self, shard: "_Shard", data, offset: int) -> None:
        path = self.folder / shard.partial
        try:
            if not shard.checksums:
                path.write_bytes(shard.header)
            with open(path, "rb+") as file:
                file.seek(offset)
                file.write(data)
        except OSError as error:
            raise not_written(path, error) from None

    def _close(self, shard: "_Shard") -> None:
        """Give a shard whose tensors are all there its final name, once all that a next run asks of it is on disk."""
        self.before_close()
        path = self.folder / shard.partial
        try:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            self._closed.append({"shard": shard.file, "checksums": shard.checksums})
            self._closed.sync()
            os.replace(path, self.folder / shard.file)
            sync_folder(self.folder)
        except OSError as error:
            raise not_written(path, error) from None

    def _payload(self, files: dict[str, str | bytes]) -> Path:
        """The folder to be, with everything in it and on disk."""
        for shard in self._shards:
            if shard.missing:
                raise CheckpointError(f"{len(shard.missing)} tensors were never written, first {min(shard.missing)}")
        if len(self._shards) > 1:
            total = sum(spec.nbytes for shard in self._shards for spec in shard.specs.values())
            weight_map = {name: shard.file for shard in self._shards for name in shard.specs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            files = {INDEX_NAME: json.dumps(index, indent=2) + "\n", **files}
        payload = self.folder / _PAYLOAD
        try:
            make_folder(payload)
            for path in payload.iterdir():  # an earlier run may have got this far, with other small files
                if path.name not in {shard.file for shard in self._shards}:
                    path.unlink()
            for shard in self._shards:
                if (self.folder / shard.file).exists():
                    os.replace(self.folder / shard.file, payload / shard.file)
            sync_folder(payload)
            sync_folder(self.folder)
        except OSError as error:
            raise not_written(payload, error) from None
        for name, content in files.items():
            write_file(payload / name, content)
        return payload

    def _tidy(self) -> None:
        """Remove what only a resumed run needs. The checkpoint has its name: nothing here may fail the run."""
        try:
            for folder in (self.work, self.folder / _PAYLOAD):
                shutil.rmtree(folder, ignore_errors=True)
            for name in (_CLOSED, _JOB):
                (self.folder / name).unlink(missing_ok=True)
            sync_folder(self.folder)
            for name in (_FINISHED, _LOCK):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError as error:
            _log.warning("%s is complete; %s could not be removed (%s)", self.destination, self.folder, error.strerror)
        self.close()


def real_destination(destination: str | Path) -> Path:
    """Where a folder called `destination` will really lie: absolute, `~` and links followed.

    Raises CheckpointError for a link that leads to no folder's place, and for a folder that no rename can replace.
    """
    try:
        path = Path(destination).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{destination}: {str(error).rstrip('.')}") from None
    real = Path(os.path.realpath(path))
    if real.is_symlink() or (path.is_symlink() and not real.parent.is_dir()):
        raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which leads nowhere; choose another folder")
    if real.is_dir() and os.path.ismount(real):
        raise CheckpointError(f"{path} is where a disk is mounted; choose a folder on it, such as {path / 'nvfp4'}")
    return real


def incomplete_folder(destination: Path) -> Path:
    """Where the work on a real destination lies: beside it, so that one rename can finish it."""
    return destination.with_name(destination.name + ".incomplete")


def refuse_taken(destination: str | Path) -> None:
    """Raises CheckpointError when nothing can be written to `destination`: because it is a file or a folder with
    something in it, or because what lies beside it is in the way. A result that only wants tidying up passes."""
    real = real_destination(destination)
    folder = incomplete_folder(real)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "a file"
        raise CheckpointError(f"{folder}, where the work would lie, is {what}; move it or choose another destination")
    above = next((p for p in real.parents if p.name.endswith(".incomplete") and (p / _JOB).exists()), None)
    if above is not None:
        raise CheckpointError(f"{real} lies in the unfinished checkpoint {above}; choose another folder")
    if not (folder / _FINISHED).exists():
        _refuse_full(real)


def _refuse_full(destination: Path) -> None:
    if os.path.lexists(destination) and (not destination.is_dir() or any(destination.iterdir())):
        waits = incomplete_folder(destination)
        if waits.is_dir() and [path.name for path in waits.iterdir()] in ([], [_LOCK]):  # the last steps of tidying up
            (waits / _LOCK).unlink(missing_ok=True)
            waits.rmdir()
        also = f" ({waits} holds an unfinished one)" if (waits / _JOB).exists() else ""
        raise CheckpointError(f"{destination} exists and is not empty{also}; choose another folder or remove it")


def _job_text(job: dict[str, Any]) -> str:
    return json.dumps(job, indent=2, sort_keys=True) + "\n"


def _refuse_other_job(folder: Path, job: dict[str, Any]) -> None:
    try:
        text = (folder / _JOB).read_text()
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        text = ""
    if text == _job_text(job):
        return
    try:
        found = dict(json.loads(text))
    except (ValueError, TypeError):
        raise CheckpointError(
            f"{folder / _JOB} is damaged, so that nobody knows whose work this is; remove {folder} to start afresh"
        ) from None
    differing = [key for key in sorted({*found, *job}) if found.get(key) != json.loads(json.dumps(job)).get(key)]
    raise CheckpointError(
        f"{folder} was left by a different job (other {', '.join(differing)}; see {folder / _JOB}); repeat that one, "
        "or remove it to start afresh"
    )


def _locked(folder: Path, job: dict[str, Any]) -> IO[str]:
    """The lock of `folder`, which is made. Raises CheckpointError while a living process has it."""
    while True:
        make_folder(folder)
        try:
            file = open(folder / _LOCK, "a+")  # noqa: SIM115 (held until close)
        except FileNotFoundError:  # its run has just ended and taken the folder along
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / _LOCK)):
                break
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.seek(0)
            who = file.read(200).strip()
            file.close()
            other = (folder / _JOB).exists() and (folder / _JOB).read_text(errors="replace") != _job_text(job)
            raise CheckpointError(
                f"{folder} is being written by another run{f' ({who})' if who else ''}"
                f"{', which does a different job' if other else ''}; wait for it or stop it"
            ) from None
        file.close()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError:  # a full disk; the name is a courtesy, the lock is held without it
        pass
    return file


class _Shard:
    """One file: its header bytes, each tensor's absolute offset, and the tensors still missing."""

    def __init__(self, file: str, specs: list[TensorSpec]):
        self.file, self.partial = file, file + PARTIAL
        self.specs = {spec.name: spec for spec in specs}
        # Wide dtypes first, so that every tensor is aligned to its own element size.
        ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec in ordered:
            end = position + spec.nbytes
            header[spec.name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.offsets = {spec.name: len(self.header) + header[spec.name]["data_offsets"][0] for spec in specs}
        self.nbytes = len(self.header) + position
        self.missing = set(self.specs)
        self.checksums: dict[str, int] = {}  # of the tensors that are there

    def is_whole(self, path: Path, closed: dict[str, Any] | None) -> bool:
        """Whether the file at `path` is byte for byte the one that was closed.  closed: its line in shards.jsonl."""
        if closed is None or path.stat().st_size != self.nbytes:
            return False
        with open(path, "rb") as file:
            if file.read(len(self.header)) != self.header:
                return False
            for name, spec in self.specs.items():
                file.seek(self.offsets[name])
                if _checksum(file, spec.nbytes) != closed["checksums"].get(name):
                    return False
        return True


def _checksum(file: IO[bytes], count: int) -> int:
    """CRC-32 of the next `count` bytes."""
    value = 0
    while count and (data := file.read(min(count, _CHUNK))):
        value = zlib.crc32(data, value)
        count -= len(data)
    return value


def _layout(plan: list[TensorSpec], max_shard_bytes: int) -> list[_Shard]:
    names = [spec.name for spec in plan]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{next(name for name in names if names.count(name) > 1)} is planned twice")
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in plan:
        if groups[-1] and size + spec.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    if len(groups) == 1:
        return [_Shard(SINGLE_NAME, groups[0])]
    return [_Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]
