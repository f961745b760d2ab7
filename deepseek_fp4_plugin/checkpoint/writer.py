"""Write a sharded safetensors checkpoint tensor by tensor, in any order, holding one tensor, or rows of it, in memory.

The names, dtypes and shapes of a checkpoint are known before its values, so every tensor's place on disk is fixed
first: the header is written at once and each tensor goes to its own offset. A shard gets its final name when its last
tensor arrived, and a line with its checksums. Bytes never depend on the order or on interruptions.

A run that stops, at whatever moment, leaves `<destination>.incomplete`, which the next run continues after the last
closed shard, and in those that are not closed after the last `COMMIT_BYTES`. In it lie

    job.json        what the bytes depend on         lock         held by the processes that write here
    shards.jsonl    checksums of what is on disk     work/        the caller's, for what else a resumed run needs
    *.safetensors   closed shards                    checkpoint/  where `finish` puts together what will be the folder
    claims/         which process has which shard, in a shared job

`checkpoint` becomes the destination by one rename. Only then does the rest go, `finished.json` last: by it a run that
was stopped while tidying up is told from one that was not.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.durable import (
    PARTIAL,
    Journal,
    forget,
    make_folder,
    not_written,
    read_sealed,
    seal,
    sync_folder,
    write_file,
)
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.job_lock import LOCK, claim, is_last, lock_folder
from deepseek_fp4_plugin.checkpoint.planned_shard import PlannedShard, TensorSpec, layout
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME
from deepseek_fp4_plugin.checkpoint.sizes import size_text

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "CheckpointWriter",
    "TensorSpec",
    "incomplete_folder",
    "real_destination",
    "refuse_taken",
]
DEFAULT_SHARD_BYTES = 5_000_000_000
COMMIT_BYTES = 2**28  # written at most before a next run would find them: a group of experts
_JOB, _CLOSED, _FINISHED = "job.json", "shards.jsonl", "finished.json"
_WORK, _PAYLOAD, _CLAIMS = "work", "checkpoint", "claims"
_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Write the tensors of `plan` under `destination`, which must not exist or be empty; a link is followed.

    plan: all tensors in reading order; consecutive ones share shards of at most `max_shard_bytes`.
    job: what the bytes depend on (source, recipe, ...); an `.incomplete` folder left by a different job is refused.
    work_bytes: what the caller will put into `work`, for the check of the disk.
    shared: with other writers of the same job, in other processes or on other machines: see `parts`.
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
        shared: bool = False,
    ):
        self.destination = real_destination(destination)
        self.folder = incomplete_folder(self.destination)
        self.work = self.folder / _WORK
        self.shared = shared
        self.before_close: Callable[[], None] = lambda: None
        self.finished: dict[str, Any] | None = None
        self._lock: IO[str] | None = None  # open as long as this process writes here
        self._job = {**job, "max_shard_bytes": max_shard_bytes}
        self._shards = layout(list(plan), max_shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.offsets}
        self._claimed: PlannedShard | None = None  # the part at hand of a shared job
        self._uncommitted = 0
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

    def parts(self) -> Iterator[None]:
        """The work, part by part; while one is at hand, `needs` is true of its tensors only.

        One part is everything, but in a shared job a shard: nobody else writes it until the next is asked for. What
        others have at hand comes last, when they have ended, in case they ended without finishing it.
        """
        if not self.shared:
            yield
            return
        try:
            for wait in (False, True):
                for shard in self._shards:
                    if shard.missing:
                        with claim(self.folder / _CLAIMS / shard.file, wait) as held:
                            if held or self._closed_elsewhere(shard):
                                self._look_again(shard)
                            if held and shard.missing:
                                self._claimed = shard
                                yield
                                self.commit()
        finally:
            self._claimed = None

    def plans(self, name: str) -> bool:
        """Whether the tensor is part of the checkpoint."""
        return name in self._shard_of

    def lacks(self, name: str) -> bool:
        """Whether the tensor was not on disk when this process last looked."""
        return name in self._shard_of[name].missing

    def needs(self, name: str) -> bool:
        """False when the tensor is on disk already, or not in the part at hand."""
        shard = self._shard_of[name]
        return name in shard.missing and (not self.shared or shard is self._claimed)

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Put a tensor in its place, or its rows from `row` on, piece after piece in their order.

        One that is not needed is left out.
        """
        shard = self._shard_of[name]
        spec = shard.specs[name]
        rows = spec.shape[0] if spec.shape else 1
        shape = (min(tensor.shape[0], rows - row), *spec.shape[1:]) if spec.shape and tensor.shape else spec.shape
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} but was planned as {spec.dtype} {list(spec.shape)}"
            )
        if not self.needs(name):
            return
        if spec.inverted:
            tensor = 1 / tensor
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._write_bytes(shard, data, shard.offsets[name] + row * (spec.nbytes // max(rows, 1)))
        shard.checksums[name] = zlib.crc32(data, shard.checksums[name] if row else 0)
        self._uncommitted += len(data)
        if spec.shape and row + shape[0] < rows:
            return
        shard.missing.discard(name)
        shard.uncommitted.add(name)
        if not shard.missing:
            self._close(shard)
        if self._uncommitted >= COMMIT_BYTES:
            self.commit()

    def read(self, name: str) -> Tensor:
        """A tensor that was written, by this run or by one before it, as readers of the file have it."""
        shard = self._shard_of[name]
        spec = shard.specs[name]
        places = (self.folder / shard.file, self.folder / shard.partial, self.folder / _PAYLOAD / shard.file)
        data = torch.empty(spec.nbytes, dtype=torch.uint8)
        with open(next(path for path in places if path.exists()), "rb") as file:
            file.seek(shard.offsets[name])
            file.readinto(data.numpy().data)
        tensor = data.view(spec.dtype).view(spec.shape)
        return 1 / tensor if spec.inverted else tensor

    def commit(self) -> None:
        """Make what is written so far of shards that are not closed safe from a stop."""
        done = [shard for shard in self._shards if shard.dirty]
        if done:
            self.before_close()
        for shard in done:
            self._sync(shard)
            if shard.uncommitted:
                checksums = {name: shard.checksums[name] for name in sorted(shard.uncommitted)}
                self._closed.append({"part": shard.file, "checksums": checksums})
                shard.uncommitted.clear()
        if done:
            self._closed.sync()
        self._uncommitted = 0

    def finish(self, files: dict[str, str | bytes], result: dict[str, Any] | None = None) -> None:
        """Write the index and `files` (name -> content), then give the folder its final name.

        result: what `finished` shall be should this be stopped after that.
        Raises CheckpointError naming the first tensor that was never written, or what has been put at the destination
        meanwhile; the same call of a next run then goes on from here. In a shared job one process does it for all.
        """
        if self.finished is None:
            with claim(self.folder / _CLAIMS / _FINISHED, wait=True) if self.shared else nullcontext(True):
                if not (self.shared and self._finished_before()):
                    self._give_name(files, result)
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

    def _give_name(self, files: dict[str, str | bytes], result: dict[str, Any] | None) -> None:
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

    def _open_folder(self, work_bytes: int) -> None:
        refuse_taken(self.destination)
        if not self.folder.exists():
            self._check_space(work_bytes)
        elif not (self.folder / _JOB).exists() and any(self.folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{self.folder} holds shards of an unknown job; move it away, or remove it to start afresh"
            )
        if self.shared:
            make_folder(self.folder / _CLAIMS)
        with claim(self.folder / _CLAIMS / _JOB, wait=True) if self.shared else nullcontext(True):
            first = not self.shared or is_last(self.folder)
            self._lock = lock_folder(self.folder, lambda: _is_other_job(self.folder, self._job), self.shared)
            if self._finished_before():
                return
            _refuse_full(self.destination)
            _refuse_other_job(self.folder, self._job)
            (self.folder / _FINISHED).unlink(missing_ok=True)
            if not (self.folder / _JOB).exists():
                write_file(self.folder / _JOB, _job_text(self._job))
            make_folder(self.work)
            self._closed = Journal(self.folder / _CLOSED, self.shared, first)
            if first:
                self._recognise()
            else:
                for shard in self._shards:
                    self._look_again(shard)
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
        """Mark what an earlier run wrote, and remove what is not as it was written."""
        closed = {line["shard"]: line["checksums"] for line in self._closed.lines if "shard" in line}
        places = (self.folder, self.folder / _PAYLOAD)
        there = [(shard, path) for shard in self._shards for folder in places if (path := folder / shard.file).exists()]
        if there:
            _log.warning("%s goes on from %d closed shards, after checking them", self.folder, len(there))
        for shard, path in there:
            if shard.is_whole(path, closed.get(shard.file, {})):
                shard.missing.clear()
            else:
                _log.warning("%s is not as it was written and will be written again", path)
                path.unlink()
        for shard in self._shards:
            if shard.missing:
                self._recover(shard)
        unfinished = {shard.partial for shard in self._shards if shard.begun}
        for left_over in (*self.folder.glob(f"*{PARTIAL}"), *self.work.glob(f"*{PARTIAL}")):
            if left_over.name not in unfinished:
                left_over.unlink()

    def _recover(self, shard: PlannedShard) -> None:
        """Take over what an earlier run committed of a shard that it did not close."""
        checksums: dict[str, int] = {}
        for line in self._closed.lines:
            if line.get("part") == shard.file:
                checksums |= line["checksums"]
        path = self.folder / shard.partial
        if checksums and path.exists():
            shard.recover(path, checksums)
            if not shard.missing:
                self._close(shard)

    def _look_again(self, shard: PlannedShard) -> None:
        """What others have made of a shard since this process looked at it."""
        if self._closed_elsewhere(shard):
            shard.missing.clear()
        else:
            self._closed.reload()
            self._recover(shard)

    def _closed_elsewhere(self, shard: PlannedShard) -> bool:
        return any((place / shard.file).exists() for place in (self.folder, self.folder / _PAYLOAD, self.destination))

    def _check_space(self, work_bytes: int) -> None:
        work = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file()) if self.work.is_dir() else 0
        missing = sum(shard.specs[name].nbytes for shard in self._shards for name in shard.missing)
        needed = missing + max(work_bytes - work, 0)
        parent = self.destination.parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise CheckpointError(
                f"{self.destination} needs {size_text(needed)} and its disk has {size_text(free)} free"
            )

    def _write_bytes(self, shard: PlannedShard, data, offset: int) -> None:
        path = self.folder / shard.partial
        try:
            if not shard.begun:
                path.write_bytes(shard.header)
                shard.begun = True
            shard.dirty = True
            with open(path, "rb+") as file:
                file.seek(offset)
                file.write(data)
        except OSError as error:
            raise not_written(path, error) from None

    def _sync(self, shard: PlannedShard) -> None:
        """Put a partial file's bytes on disk; memory need not keep them."""
        path = self.folder / shard.partial
        try:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
                forget(file.fileno())
            shard.dirty = False
        except OSError as error:
            raise not_written(path, error) from None

    def _close(self, shard: PlannedShard) -> None:
        """Give a shard whose tensors are all there its final name, once all that a next run asks of it is on disk."""
        self.before_close()
        self._sync(shard)
        self._closed.append({"shard": shard.file, "checksums": shard.checksums})
        self._closed.sync()
        try:
            os.replace(self.folder / shard.partial, self.folder / shard.file)
            sync_folder(self.folder)
        except OSError as error:
            raise not_written(self.folder / shard.file, error) from None
        shard.uncommitted.clear()

    def _payload(self, files: dict[str, str | bytes]) -> Path:
        """The folder to be, with everything in it and on disk."""
        for shard in self._shards:
            if shard.missing:
                raise CheckpointError(f"{len(shard.missing)} tensors were never written, first {min(shard.missing)}")
        if len(self._shards) > 1:
            total = sum(spec.nbytes for shard in self._shards for spec in shard.specs.values())
            weight_map = {spec.name_in_file: shard.file for shard in self._shards for spec in shard.specs.values()}
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
        if self.shared:  # the last one does it: the others may still be reading
            self.close()
            if not is_last(self.folder):
                return
        try:
            for folder in (self.work, self.folder / _PAYLOAD, self.folder / _CLAIMS):
                shutil.rmtree(folder, ignore_errors=True)
            for name in (_CLOSED, _JOB):
                (self.folder / name).unlink(missing_ok=True)
            sync_folder(self.folder)
            for name in (_FINISHED, LOCK):
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
        if waits.is_dir() and [path.name for path in waits.iterdir()] in ([], [LOCK]):  # the last steps of tidying up
            (waits / LOCK).unlink(missing_ok=True)
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


def _is_other_job(folder: Path, job: dict[str, Any]) -> bool:
    return (folder / _JOB).exists() and (folder / _JOB).read_text(errors="replace") != _job_text(job)
