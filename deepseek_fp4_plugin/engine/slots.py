"""What a rank keeps of its requests between steps, on its device, so that a step needs nothing from the host.

A request has a slot while it runs. Plans change slots by small deltas (a request enters, blocks are appended); steps
read and write them on the device. One slot and one cache block more than the scheduler knows are the dummy's: rows that
only fill a recorded step up.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek_fp4_plugin.engine.step_plan import PlanRow, Sampling, Setup
from deepseek_fp4_plugin.kernels.transfer import to_device

NOBODY = Setup(0, Sampling())


class Slots:
    """Tensors are [slots, ...]; the dummy's slot is the last, `dummy_block` its only block."""

    def __init__(self, count: int, max_blocks: int, num_drafts: int, dummy_block: int, device: torch.device):
        self.count, self.max_blocks, self.device = count, max_blocks, device
        self.setups: list[Setup] = [NOBODY] * (count + 1)
        self.num_blocks = [0] * (count + 1)

        def rows(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(count + 1, *shape, dtype=dtype, device=device)

        self.numbers = torch.arange((count + 1) * (1 + num_drafts) + 1, device=device)  # 0, 1, ...
        self.all_drafts = rows().fill_(num_drafts)  # of steps that verify every draft
        self.tokens = rows(1 + num_drafts)  # the newest token, then drafts
        self.starts = rows()  # the first position to compute
        self.dummy_start = self.starts[count:]
        self.tables = rows(max_blocks)
        self.tables[count] = dummy_block
        self.thinking = rows(dtype=torch.bool)
        self.think_ids = rows(2)
        self.relaxed_topk, self.relaxed_delta = rows(), rows(dtype=torch.float32)
        self.greedy = rows(dtype=torch.bool)
        self.temperature, self.top_k = rows(dtype=torch.float32), rows()
        self.top_p, self.min_p = rows(dtype=torch.float64), rows(dtype=torch.float64)
        self.seeds = rows()
        self.enter([count], [NOBODY])

    @property
    def dummy(self) -> int:
        return self.count

    def renew_dummy(self) -> None:
        """As it was made, whatever has been computed in it."""
        self.enter([self.dummy], [NOBODY])
        self.tokens[self.dummy].zero_()

    def apply(self, rows: Sequence[PlanRow]) -> None:
        """Take a plan's deltas."""
        entered = [row for row in rows if row.setup is not None]
        if entered:
            self.enter([row.slot for row in entered], [row.setup for row in entered])  # type: ignore[misc]
        grown = [row for row in rows if row.new_blocks]
        if not grown:
            return
        where: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for row in grown:
            held, more = self.num_blocks[row.slot], len(row.new_blocks)
            self.num_blocks[row.slot] = held + more
            where += [row.slot] * more
            columns += range(held, held + more)
            blocks += row.new_blocks
        packed = to_device(np.array([where, columns, blocks], dtype=np.int64), self.device)
        self.tables[packed[0], packed[1]] = packed[2]

    def enter(self, slots: Sequence[int], setups: Sequence[Setup]) -> None:
        for slot, setup in zip(slots, setups, strict=True):
            self.setups[slot], self.num_blocks[slot] = setup, 0
        integers, reals = [], []
        for slot, setup in zip(slots, setups, strict=True):
            s = setup.sampling
            seed = s.seed - (1 << 64) if s.seed >= 1 << 63 else s.seed
            integers.append(
                (slot, setup.start, setup.thinking, *setup.think_ids, setup.relaxed_topk, s.greedy, s.top_k, seed)
            )
            reals.append((setup.relaxed_delta, s.temperature, s.top_p, s.min_p))
        values = to_device(np.array(integers, dtype=np.int64), self.device)
        fractions = to_device(np.array(reals, dtype=np.float64), self.device)
        where = values[:, 0]
        self.starts[where] = values[:, 1]
        self.thinking[where] = values[:, 2].bool()
        self.think_ids[where] = values[:, 3:5]
        self.relaxed_topk[where] = values[:, 5]
        self.greedy[where] = values[:, 6].bool()
        self.top_k[where], self.seeds[where] = values[:, 7], values[:, 8]
        self.relaxed_delta[where], self.temperature[where] = fractions[:, 0].float(), fractions[:, 1].float()
        self.top_p[where], self.min_p[where] = fractions[:, 2], fractions[:, 3]
