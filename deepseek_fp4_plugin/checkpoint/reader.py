"""Read tensors, or slices of them, by name from a folder of safetensors shards.

Which shard holds a tensor is decided by shards.py. Tensors are read one by one into memory of their own: pages of a
mapped shard would stay resident beside what was made of them.
"""

import io
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.findings import refuse
from deepseek_fp4_plugin.checkpoint.json_files import read_json
from deepseek_fp4_plugin.checkpoint.shards import DTYPES, INDEX_NAME, SINGLE_NAME, Shards, TensorInfo, scan

# What users of a reader need besides; the files' law is shards.py and json_files.py.
__all__ = ["DTYPES", "INDEX_NAME", "SINGLE_NAME", "CheckpointReader", "TensorInfo", "read_json"]
_OPEN_SHARDS = 4  # a weight and its scale may sit in different shards


class CheckpointReader:
    """Name -> tensor or slice, read when asked for, by one thread at a time.

    shards: of a caller who has scanned the folder already.  Raises CheckpointError with the file or tensor named.
    """

    def __init__(self, folder: str | Path, shards: Shards | None = None):
        self.folder = Path(folder)
        self.shards, self.tensors, findings = shards or scan(self.folder)
        refuse(findings)
        self._open: OrderedDict[str, io.FileIO] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}; the checkpoint is incomplete") from None

    def get(self, name: str) -> Tensor:
        """The whole tensor; one that the file holds as its inverse, inverted."""
        info = self.info(name)
        tensor = self._read(name, info, info.offset, info.shape)
        return 1 / tensor.float() if info.inverted else tensor

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) along `axis`, reading only those bytes."""
        info = self.info(name)
        if not 0 <= start <= stop <= info.shape[axis]:
            raise CheckpointError(f"{name} has shape {list(info.shape)}: no slice [{start}, {stop}) along axis {axis}")
        if axis == 0:
            row = info.nbytes // info.shape[0] if info.shape[0] else 0
            return self._read(name, info, info.offset + start * row, (stop - start, *info.shape[1:]))
        before, size = math.prod(info.shape[:axis]), math.prod(info.shape[axis + 1 :]) * info.dtype.itemsize
        data = torch.empty(before * (stop - start) * size, dtype=torch.uint8)
        self._fill(data, name, info, info.offset + start * size, before, info.shape[axis] * size)
        return data.view(info.dtype).view(*info.shape[:axis], stop - start, *info.shape[axis + 1 :])

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _read(self, name: str, info: TensorInfo, offset: int, shape: tuple[int, ...]) -> Tensor:
        data = torch.empty(math.prod(shape) * info.dtype.itemsize, dtype=torch.uint8)
        self._fill(data, name, info, offset)
        return data.view(info.dtype).view(shape)

    def _fill(self, data: Tensor, name: str, info: TensorInfo, offset: int, pieces: int = 1, stride: int = 0) -> None:
        """Reads `pieces` equal pieces of `data`, the first from `offset`, each `stride` bytes behind the one before."""
        file, view = self._file(info.shard), data.numpy().data
        size = len(view) // pieces if pieces else 0
        for piece in range(pieces):
            part = view[piece * size : (piece + 1) * size]
            file.seek(offset + piece * stride)
            while part:
                count = file.readinto(part)
                if not count:
                    raise CheckpointError(f"{self.folder / info.shard} ends inside {name}; it changed while being read")
                part = part[count:]

    def _file(self, shard: str) -> io.FileIO:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = io.FileIO(self.folder / shard)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[shard]
