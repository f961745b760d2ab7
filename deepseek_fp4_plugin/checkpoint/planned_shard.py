"""A shard that is planned before its values are there: its header, every tensor's place, and what is missing still."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from deepseek_fp4_plugin.checkpoint.compressed_tensors import INVERTED
from deepseek_fp4_plugin.checkpoint.durable import PARTIAL
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.shards import DTYPES, SINGLE_NAME

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 2**22  # bytes of a shard checked at once


class TensorSpec(NamedTuple):
    """A tensor to come.  stored_as: the last part of its name in the file, where that is another (TensorInfo)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored_as: str = ""

    @property
    def inverted(self) -> bool:
        """Whether the file gets 1 / x, in a tensor of shape [1]: a global scale of compressed-tensors."""
        return self.stored_as in INVERTED

    @property
    def name_in_file(self) -> str:
        return f"{self.name.rpartition('.')[0]}.{self.stored_as}" if self.stored_as else self.name

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class PlannedShard:
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
            header[spec.name_in_file] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": [1] if spec.inverted else list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.offsets = {spec.name: len(self.header) + header[spec.name_in_file]["data_offsets"][0] for spec in specs}
        self.nbytes = len(self.header) + position
        self.missing = set(self.specs)
        self.checksums: dict[str, int] = {}  # of the tensors that are there
        self.uncommitted: set[str] = set()  # those of them of which a next run would not know
        self.begun = False  # its partial file is there
        self.dirty = False  # with bytes that may not be on disk

    def is_whole(self, path: Path, checksums: Mapping[str, int]) -> bool:
        """Whether the file at `path` is byte for byte the one that was closed."""
        return path.stat().st_size == self.nbytes and self._undamaged(path, self.specs, checksums) == set(self.specs)

    def recover(self, path: Path, checksums: Mapping[str, int]) -> None:
        """Take over the tensors of an unfinished file that are as they were written."""
        found = self._undamaged(path, [name for name in checksums if name in self.specs], checksums)
        self.checksums = {name: checksums[name] for name in found}
        self.missing -= found
        self.begun = bool(found)

    def _undamaged(self, path: Path, names: Iterable[str], checksums: Mapping[str, int]) -> set[str]:
        found: set[str] = set()
        with open(path, "rb") as file:
            if file.read(len(self.header)) != self.header:
                return found
            for name in names:
                file.seek(self.offsets[name])
                if _checksum(file, self.specs[name].nbytes) == checksums.get(name):
                    found.add(name)
        return found


def _checksum(file: IO[bytes], count: int) -> int:
    """CRC-32 of the next `count` bytes."""
    value = 0
    while count and (data := file.read(min(count, _CHUNK))):
        value = zlib.crc32(data, value)
        count -= len(data)
    return value


def layout(plan: list[TensorSpec], max_shard_bytes: int) -> list[PlannedShard]:
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
        return [PlannedShard(SINGLE_NAME, groups[0])]
    return [PlannedShard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]
