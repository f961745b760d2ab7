"""Read tensors, or slices of them, by name from a folder of safetensors shards.

The index names the shards; what a shard holds is read from its own header, because published NVFP4 checkpoints have
indexes that omit the scale tensors. Tensors are read one by one into memory of their own: pages of a mapped shard would
stay resident beside what was made of them.
"""

import io
import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_OPEN_SHARDS = 4  # a weight and its scale may sit in different shards

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """Where a tensor is and what it is, from the shard's header. offset: of its first byte in the shard."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class CheckpointReader:
    """Name -> tensor or slice, read when asked for, by one thread at a time.

    Raises CheckpointError with the file or tensor named.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; give a checkpoint folder or a Hugging Face id")
        shards, indexed = _shards(self.folder)
        self.tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            self.tensors.update(_read_header(self.folder / shard))
        for name, shard in indexed.items():
            if name not in self.tensors:
                raise CheckpointError(f"{INDEX_NAME} in {self.folder} says {name} is in {shard}, but it is not there")
        self.shards = shards
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
        """The whole tensor."""
        info = self.info(name)
        return self._read(name, info, info.offset, info.shape)

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
        for row, part in enumerate(data.view(before, -1) if data.numel() else ()):
            self._fill(part, name, info, info.offset + (row * info.shape[axis] + start) * size)
        return data.view(info.dtype).view(*info.shape[:axis], stop - start, *info.shape[axis + 1 :])

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _read(self, name: str, info: TensorInfo, offset: int, shape: tuple[int, ...]) -> Tensor:
        data = torch.empty(math.prod(shape) * info.dtype.itemsize, dtype=torch.uint8)
        self._fill(data, name, info, offset)
        return data.view(info.dtype).view(shape)

    def _fill(self, data: Tensor, name: str, info: TensorInfo, offset: int) -> None:
        file = self._file(info.shard)
        file.seek(offset)
        view = data.numpy().data
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{self.folder / info.shard} ends inside {name}; it changed while being read")
            view = view[count:]

    def _file(self, shard: str) -> io.FileIO:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = io.FileIO(self.folder / shard)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[shard]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's folder; CheckpointError when absent or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint folder needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The shard file names of a folder, sorted, and the index's tensor -> shard map (empty for a single file)."""
    if (folder / INDEX_NAME).exists():
        indexed = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(indexed, dict) or not indexed:
            raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map")
        shards = sorted(set(indexed.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of its {len(shards)} shards, first {missing[0]}; download it again"
            )
        return shards, indexed
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME], {}
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} has safetensors shards but no {INDEX_NAME}; the checkpoint is incomplete")
    raise CheckpointError(f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}; it is not a checkpoint")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt"):  # validates lengths and offsets against the file's size
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); copy or download it again") from None
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{name} in {path} has dtype {entry['dtype']}, which this program does not read")
        offset = 8 + length + entry["data_offsets"][0]
        infos[name] = TensorInfo(path.name, DTYPES[entry["dtype"]], tuple(entry["shape"]), offset)
    return infos
