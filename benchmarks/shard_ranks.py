"""The first layers of DeepSeek-R1 over the GPUs of one machine: a decode step with its communication, and without.

    torchrun --nproc-per-node 2 benchmarks/shard_ranks.py [--layout tp tpep dpep] [--batch 1 64] [--context 1024]
        [--drafts 0] [--layers 20] [--steps 15] [--profile] [--json FILE]

What shard.py measures, over ranks that exchange: the engine's model, runner and CUDA graphs, exact shapes, random
weights; the MTP module computes where there are drafts. Each cell is recorded three times and replayed in turn:

all       as it is served: sums, residuals and norms in one launch, straight through the other GPUs' memory
NCCL      the same through torch.distributed alone
without   every exchange returns what this rank has

tp: everything cut; tpep: experts dealt; tpep2: dealt to two, as the model card has it; dpep: attention data parallel,
experts dealt, --batch requests a rank. With one process it is one GPU that holds everything. Times are rank 0's,
medians; the ranks begin a step together. --profile: where a step's time goes on rank 0, by what kernels are for.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from random_rank import Absent
from shard import Cell, Rank
from step_profile import profiled
from torch import Tensor

from deepseek_fp4_plugin.engine.model_runner import ModelRunner
from deepseek_fp4_plugin.engine.step_plan import StepPlan
from deepseek_fp4_plugin.models.deepseek_r1 import DEEPSEEK_R1
from deepseek_fp4_plugin.parallel.collectives import ALONE, Group, ProcessGroup, connect
from deepseek_fp4_plugin.parallel.peers import PeerGroup, join

LAYOUTS: dict[str, dict] = {
    "tp": {},
    "tpep": {"moe_expert_parallel_size": 0},
    "tpep2": {"moe_expert_parallel_size": 2},
    "dpep": {"moe_expert_parallel_size": 0, "enable_attention_dp": True},
}


class Switched:
    """One group or another, as it is set when a step is recorded."""

    def __init__(self, groups: dict[str, Group]):
        self.groups, self.current = groups, next(iter(groups))
        first = groups[self.current]
        self.rank, self.size = first.rank, first.size

    @property
    def _inner(self) -> Group:
        return self.groups[self.current]

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._inner.all_reduce(x)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return self._inner.all_gather(x, sizes)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return self._inner.reduce_scatter(x, sizes)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        return self._inner.broadcast(x, source)

    def sum_and_norm(
        self, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        return self._inner.sum_and_norm(x, hidden, weight, eps, other)


def recorded(rank: Rank, cell: Cell) -> tuple[ModelRunner, StepPlan]:
    """A runner that has recorded the cell's step, and the plan that replays it."""
    runner = rank.runner(cell, recorded=True)
    runner.run(rank.plan(cell))
    plan = rank.plan(cell, first=False)
    rank.start(runner, cell)
    runner.run(plan)
    return runner, plan


Sides = dict[str, tuple[ModelRunner, StepPlan]]


def record_sides(rank: Rank, switch: Switched | None, cell: Cell) -> Sides:
    sides: Sides = {}
    for name in switch.groups if switch else ("all",):
        if switch:
            switch.current = name
        torch.manual_seed(1)  # ranks choose the same tokens
        sides[name] = recorded(rank, cell)
    return sides


def profiles(rank: Rank, sides: Sides, cell: Cell) -> dict[str, dict[str, float]]:
    """By side, milliseconds by what kernels are for."""
    found = {}
    for name, (runner, plan) in sides.items():
        rank.start(runner, cell)
        if dist.is_initialized():
            dist.barrier()
        found[name] = profiled(lambda runner=runner, plan=plan: (runner.submit(plan), runner.collect()))  # type: ignore[misc]
    return found


def medians(rank: Rank, sides: Sides, cell: Cell, steps: int) -> dict[str, float]:
    """Milliseconds of a step, by side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(steps + 2):
        for name, (runner, plan) in sides.items():
            torch.manual_seed(step)
            rank.start(runner, cell)
            if dist.is_initialized():
                dist.barrier()
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            runner.submit(plan)
            end.record()
            runner.collect()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def say(line: str, rank: int) -> None:
    if rank == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--checkpoint", choices=("v1", "v2"), default="v1")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--context", nargs="+", type=int, default=[1024])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="where a step's time goes, too")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    index, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    group = connect(index, size, "env://", "nccl")
    switch = None
    if isinstance(group, ProcessGroup):
        direct = join(group, device)
        sides: dict[str, Group] = {"all": direct} if isinstance(direct, PeerGroup) else {}
        switch = Switched({**sides, "NCCL": group, "without": Absent(index, size)})
    config = replace(DEEPSEEK_R1, num_hidden_layers=options.layers)
    rows: list[dict] = []
    for layout in options.layout if size > 1 else ["tp"]:
        began, rank = time.perf_counter(), None  # gives the layout before back
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        cuts = {name: value or size for name, value in LAYOUTS[layout].items()}
        with torch.inference_mode():
            rank = Rank(config, cuts, options.checkpoint, switch or ALONE, device)
            wanted = [
                Cell("decode", batch, context, drafts)
                for context in options.context
                for batch in options.batch
                for drafts in options.drafts
            ]
            rank.allocate(max(cell.batch * cell.blocks_each for cell in wanted) + 1)
            held = torch.cuda.memory_allocated() / 1e9
            say(f"{layout}: {held:.1f} GB of weights and cache a rank, {time.perf_counter() - began:.0f} s", index)
            for cell in wanted:
                sides = record_sides(rank, switch, cell)
                took = medians(rank, sides, cell, options.steps)
                row = {"layout": layout, "batch": cell.batch, "context": cell.context, "drafts": cell.drafts, **took}
                rows.append(row)
                told = ", ".join(f"{name} {value:.3f}" for name, value in took.items())
                say(
                    f"{layout:<5} batch {cell.batch:<4} context {cell.context:<6} drafts {cell.drafts} ms: {told}",
                    index,
                )
                if options.profile:
                    row["profiles"] = profiles(rank, sides, cell)
                    for name, parts in row["profiles"].items():
                        say(f"    {name}: {parts}", index)
                del sides
    if index == 0 and options.json:
        with open(options.json, "w") as file:
            facts = {"device": torch.cuda.get_device_name(), "ranks": size, "layers": options.layers}
            json.dump({**facts, "rows": rows}, file, indent=1)
    del rank
    gc.collect()  # graphs that hold NCCL's launches go before its communicators
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
