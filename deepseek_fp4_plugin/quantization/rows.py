"""Rows of a layer's tokens: in memory, or in a file without a name where memory is short."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.durable import not_written


class Rows:
    """[count, width] that are written in their order and read in any.

    device: where they lie, or if `folder` is given where they are read to.  folder: of the file; it has no name and
    ends with the process. What has not been written is zero.
    """

    def __init__(self, count: int, width: int, dtype: torch.dtype, device: torch.device, folder: Path | None):
        self.count, self.width, self.dtype, self.device = count, width, dtype, device
        self.folder = folder
        self._size = width * dtype.itemsize
        self._end = 0  # of what `append` wrote
        if folder is None:
            self._rows = torch.zeros(count, width, dtype=dtype, device=device)
            return
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._file.truncate(count * self._size)

    def append(self, rows: Tensor) -> None:
        """The next rows."""
        if self.folder is None:
            self._rows[self._end : self._end + len(rows)] = rows
        else:
            self._write(self._end, rows.to("cpu", self.dtype).contiguous())
        self._end += len(rows)

    def read(self, start: int, stop: int) -> Tensor:
        if self.folder is None:
            return self._rows[start:stop]
        found = torch.empty(min(stop, self.count) - start, self.width, dtype=self.dtype)
        self._fill(found, start)
        return found.to(self.device)

    def pick(self, indices: Tensor) -> Tensor:
        """indices: int64 [n]."""
        if self.folder is None:
            return self._rows[indices]
        found = torch.empty(len(indices), self.width, dtype=self.dtype)
        for place, index in enumerate(indices.tolist()):
            self._fill(found[place : place + 1], index)
        return found.to(self.device)

    def add(self, indices: Tensor, values: Tensor) -> None:
        """Add FP32 values [n, width] to the rows of as many different indices."""
        if self.folder is None:
            self._rows.index_add_(0, indices, values)
            return
        sums = (self.pick(indices) + values).cpu()
        for place, index in enumerate(indices.tolist()):
            self._write(index, sums[place : place + 1])

    def _fill(self, into: Tensor, start: int) -> None:
        view = into.view(torch.uint8).numpy().data.cast("B")
        if os.preadv(self._file.fileno(), [view], start * self._size) != len(view):
            raise OSError(f"{self.folder}: rows that were written there cannot be read")

    def _write(self, start: int, rows: Tensor) -> None:
        view, at = rows.view(torch.uint8).numpy().data.cast("B"), start * self._size
        assert self.folder is not None
        try:
            while view:
                written = os.pwrite(self._file.fileno(), view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise not_written(self.folder, error) from None
