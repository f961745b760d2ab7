"""Write a sharded safetensors checkpoint tensor by tensor, in any order, holding one tensor in memory.

The names, dtypes and shapes of a checkpoint are known before its values, so every tensor's place on disk is fixed
first: the header is written at once and each tensor goes to its own offset. A shard is renamed to its final name when
its last tensor arrives; the folder is renamed to its final name when the last file is in it. A run that stops leaves
`<destination>.incomplete`, which the next run continues after the last closed shard; bytes never depend on the order
or on interruptions. The `work` folder inside is the caller's, for what else a resumed run needs; it goes at the end.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import DTYPES, INDEX_NAME, SINGLE_NAME

DEFAULT_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_JOB_NAME, _WORK_NAME = "job.json", "work"


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
    """Write the tensors of `plan` under `destination`, which must not exist or be empty.

    plan: all tensors in reading order; consecutive ones share shards of at most `max_shard_bytes`.
    job: what the bytes depend on (source, recipe, ...); an `.incomplete` folder left by a different job is refused.
    work_bytes: what the caller will put into `work`, for the check of the disk.
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
        self.destination = Path(os.path.abspath(destination))
        self.folder = self.destination.with_name(self.destination.name + ".incomplete")
        self.work = self.folder / _WORK_NAME
        self._lock: IO[str] | None = None  # open as long as this process writes here
        self._shards = _layout(list(plan), max_shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.offsets}
        self._open_folder({**job, "max_shard_bytes": max_shard_bytes}, work_bytes)
        for shard in self._shards:
            if (self.folder / shard.file).exists():
                shard.missing.clear()

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
        shard.missing.discard(name)
        if not shard.missing:
            self._close(shard)

    def finish(self, files: dict[str, str | bytes]) -> None:
        """Write the index and `files` (name -> content), then give the folder its final name.

        Raises CheckpointError naming the first tensor that was never written.
        """
        for shard in self._shards:
            if shard.missing:
                raise CheckpointError(f"{len(shard.missing)} tensors were never written, first {min(shard.missing)}")
        if len(self._shards) > 1:
            total = sum(spec.nbytes for shard in self._shards for spec in shard.specs.values())
            weight_map = {name: shard.file for shard in self._shards for name in shard.specs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self._write_file(INDEX_NAME, json.dumps(index, indent=2) + "\n")
        for name, content in files.items():
            self._write_file(name, content)
        shutil.rmtree(self.work)
        (self.folder / _JOB_NAME).unlink()
        if self.destination.exists():
            self.destination.rmdir()  # empty, as checked at the start; anything put there since makes this fail
        os.replace(self.folder, self.destination)
        self.close()

    def close(self) -> None:
        """Let another writer have the folder, whether finished or not."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _open_folder(self, job: dict[str, Any], work_bytes: int) -> None:
        refuse_taken(self.destination)
        job_text = json.dumps(job, indent=2, sort_keys=True) + "\n"
        job_file = self.folder / _JOB_NAME
        if job_file.exists() and job_file.read_text() != job_text:
            raise CheckpointError(
                f"{self.folder} was left by a different job (see {job_file}); remove it to start afresh"
            )
        if not job_file.exists() and any(self.folder.glob("*.safetensors")):
            raise CheckpointError(f"{self.folder} holds shards of an unknown job; remove it to start afresh")
        self._check_space(work_bytes)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self.folder}: {error.strerror}; choose another folder") from None
        if not job_file.exists():
            self._write_file(_JOB_NAME, job_text)
        self._lock = open(job_file)  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise CheckpointError(f"{self.folder} is being written by another run; wait for it or stop it") from None
        for left_over in self.folder.glob("*.partial"):
            left_over.unlink()

    def _check_space(self, work_bytes: int) -> None:
        done = sum(
            path.stat().st_size for path in self.folder.rglob("*") if path.suffix != ".partial" and path.is_file()
        )
        needed = work_bytes + sum(spec.nbytes for shard in self._shards for spec in shard.specs.values()) - done
        parent = self.destination.parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise CheckpointError(
                f"{self.destination} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free"
            )

    def _close(self, shard: "_Shard") -> None:
        """Give a shard whose tensors are all there its final name."""
        path = self.folder / shard.partial
        try:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise _not_written(path, error) from None
        os.replace(path, self.folder / shard.file)

    def _write_bytes(self, shard: "_Shard", data, offset: int) -> None:
        path = self.folder / shard.partial
        try:
            if not path.exists():
                path.write_bytes(shard.header)
            with open(path, "rb+") as file:
                file.seek(offset)
                file.write(data)
        except OSError as error:
            raise _not_written(path, error) from None

    def _write_file(self, name: str, content: str | bytes) -> None:
        temporary = self.folder / (name + ".partial")
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise _not_written(temporary, error) from None
        os.replace(temporary, self.folder / name)


def refuse_taken(destination: Path) -> None:
    """Raises CheckpointError when `destination` is a file or a folder with something in it."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists and is not empty; choose another folder or remove it")


def _not_written(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write {path}: {error.strerror}; free some space and run again to continue")


class _Shard:
    """One file: its header bytes, each tensor's absolute offset, and the tensors still missing."""

    def __init__(self, file: str, specs: list[TensorSpec]):
        self.file, self.partial = file, file + ".partial"
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
        self.missing = set(self.specs)


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
