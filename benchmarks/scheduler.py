"""What the engine costs beside the model: time a step on the host with a model that is free.

    python benchmarks/scheduler.py [--json FILE]

Everything a step does but the forward is in it: scheduling, block tables and input tensors, update, stop conditions,
block hashes. Each line is the median over the steps of one engine with that many running requests of 1,000 tokens.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence

import torch

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.engine import LLMEngine
from deepseek_fp4_plugin.engine.input_batch import build
from deepseek_fp4_plugin.engine.request import Request, Stopping
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import Sampling, StepPlan, StepResult

BLOCK = 32


class Free:
    """An executor that builds the input tensors, then emits a token a request (and two of three drafts) at no cost."""

    num_schedulers = 1

    def __init__(self, num_drafts: int):
        self.num_drafts, self.device = num_drafts, torch.device("cpu")

    def submit(self, plans: Sequence[StepPlan]) -> None:
        (self.plan,) = plans

    def collect(self) -> list[StepResult]:
        return [self._run(self.plan)]

    def _run(self, plan: StepPlan) -> StepResult:
        build(plan.rows, BLOCK, self.device)
        tokens, drafts = [], []
        for row in plan.rows:
            emitted = [5] * (1 + min(row.num_drafts, 2)) if row.sample else []
            tokens.append(emitted)
            drafts.append([5] * self.num_drafts if emitted else [])
        return StepResult(tokens, drafts)


def measure(running: int, num_drafts: int, steps: int) -> float:
    """Median seconds a step with `running` requests decoding."""
    blocks = running * 60
    scheduler = Scheduler(BlockManager(blocks, BLOCK, True, 1), running, 8192, 1 << 20, num_drafts, (3, 4))
    engine = LLMEngine([scheduler], Free(num_drafts), 1000)
    rng = random.Random(0)
    for i in range(running):
        prompt = [rng.randrange(10, 1000) for _ in range(1000)]
        engine.add(Request(i, prompt, Sampling(), Stopping(10_000, frozenset({1}), frozenset({1}))))
    while engine.stats().waiting or any(r.num_computed < 1000 for r in scheduler.running):
        engine.step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'running':>8} {'drafts':>7} {'ms a step':>10} {'us a request':>13}")
    for num_drafts in (0, 3):
        for running in (16, 64, 128, 256, 512):
            seconds = measure(running, num_drafts, options.steps)
            rows.append({"running": running, "drafts": num_drafts, "seconds": seconds})
            print(f"{running:>8} {num_drafts:>7} {seconds * 1e3:>10.3f} {seconds / running * 1e6:>13.2f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
