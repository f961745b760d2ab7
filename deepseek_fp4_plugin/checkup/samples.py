"""Values out of a checkpoint within a budget of bytes: single numbers whole, of matrices some rows, of every matrix
others, the same ones every time."""

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.scales import Grain, fp8_grain, in_blocks, read_scale
from deepseek_fp4_plugin.numerics import fp8_block

SHARE = 0.01  # of a checkpoint's bytes, by default
LIMIT = 256_000_000  # and no more than these, which disks give in seconds


class Rows(NamedTuple):
    """Rows [start, stop) of a matrix."""

    start: int
    stop: int


class Sampler:
    """reader: of the checkpoint.  everything: read all of it.  `spent` counts the bytes of values that were read."""

    def __init__(self, reader: CheckpointReader, everything: bool = False):
        total = sum(info.nbytes for info in reader.tensors.values())
        self.reader, self.everything, self.spent = reader, everything, 0
        self.budget = total if everything else int(min(SHARE * total, LIMIT))

    @property
    def left(self) -> int:
        return self.budget - self.spent

    def affords(self, nbytes: int) -> bool:
        return self.everything or nbytes <= self.left

    def whole(self, name: str) -> Tensor:
        self.spent += self.reader.info(name).nbytes
        return self.reader.get(name)

    def rows(self, name: str, rows: Rows) -> Tensor:
        info = self.reader.info(name)
        self.spent += info.nbytes // max(info.shape[0], 1) * (rows.stop - rows.start)
        return self.reader.get_slice(name, 0, rows.start, rows.stop)

    def place(self, name: str, height: int, row_bytes: int, allowed: int) -> Rows | None:
        """Which rows of `name` to look at for about `allowed` bytes; None when not even one is affordable."""
        count = height if self.everything else min(height, max(1, allowed // max(row_bytes, 1)))
        if not self.affords(count * row_bytes):
            return None
        start = zlib.crc32(name.encode()) % (height - count + 1)
        return Rows(start, start + count)


def source_rows(reader: CheckpointReader, module: str, rows: Rows) -> Tensor:
    """BF16 rows of a source's FP8 or plain weight."""
    weight = reader.get_slice(f"{module}.weight", 0, rows.start, rows.stop)
    if weight.dtype != torch.float8_e4m3fn:
        return weight.bfloat16()
    name, block = f"{module}.weight_scale_inv", fp8_block.BLOCK
    if fp8_grain(reader.info(name).shape, reader.info(f"{module}.weight").shape) is not Grain.BLOCK:
        scale, size = in_blocks(read_scale(reader, name), reader.info(f"{module}.weight").shape)
        scale = scale[rows.start : rows.stop] if size[0] == 1 else scale[:1].repeat(rows.stop - rows.start, 1)
        return fp8_block.dequantize(weight, scale, torch.bfloat16, (1, block))
    first = rows.start // block
    scale = read_scale(reader, name, reader.get_slice(name, 0, first, -(-rows.stop // block)))
    scale = scale.repeat_interleave(block, 0)[rows.start - first * block : rows.stop - first * block]
    return fp8_block.dequantize(weight, scale, torch.bfloat16, (1, block))
