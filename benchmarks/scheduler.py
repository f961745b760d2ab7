"""What the engine costs beside the model: time a step on the host.

    python benchmarks/scheduler.py [--json FILE]

Everything a step does but the model is in it: scheduling, the plan's deltas, input tensors, verification, update, stop
conditions, block hashes. Each line is the median over the steps of one engine with that many running requests of 1,000
tokens, measured twice: with a model that is free, each step awaited, and with a device that takes 5 ms a step beside
the host, the next step planned meanwhile; of that period the 5 ms are taken off.
"""

import argparse
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.engine import LLMEngine
from deepseek_fp4_plugin.engine.input_batch import Step, build, build_uniform, most_blocks
from deepseek_fp4_plugin.engine.request import Request, Stopping
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.slots import Slots
from deepseek_fp4_plugin.engine.step_plan import Sampling, StepPlan, StepResult

BLOCK = 32
DEVICE_SECONDS = 5e-3


class FakeDevice:
    """An executor that does the host's work of a step, then emits a token a request (and two of three drafts).

    seconds: a step takes on the device, one step after the other, while the host is free.
    """

    num_schedulers = 1

    def __init__(self, num_drafts: int, running: int, blocks: int, seconds: float):
        self.num_drafts, self.seconds = num_drafts, seconds
        self.slots = Slots(running, blocks, num_drafts, blocks, torch.device("cpu"))
        self.free_at = 0.0
        self.under_way: deque[tuple[float, StepPlan]] = deque()

    def submit(self, plans: Sequence[StepPlan]) -> None:
        (plan,) = plans
        self.slots.apply(plan.rows)
        self._step(plan).inputs(self.slots, BLOCK)
        self.free_at = max(self.free_at, time.perf_counter()) + self.seconds
        self.under_way.append((self.free_at, plan))

    def _step(self, plan: StepPlan) -> Step:
        """As ModelRunner has it."""
        if not plan.uniform:
            return build(plan.rows, self.slots, BLOCK)
        places = torch.tensor([row.slot for row in plan.rows])
        return build_uniform(places, self.slots, False, 1, num_blocks=most_blocks(plan.rows, self.slots, BLOCK))

    def collect(self) -> list[StepResult]:
        ready, plan = self.under_way.popleft()
        if self.seconds:
            time.sleep(max(0.0, ready - time.perf_counter()))
        tokens, drafts = [], []
        for row in plan.rows:
            emitted = [5] * (1 + min(row.num_drafts, 2)) if row.sample else []
            tokens.append(emitted)
            drafts.append([5] * self.num_drafts if emitted else [])
        return [StepResult(tokens, drafts)]


def measure(running: int, num_drafts: int, steps: int, seconds: float) -> float:
    """Median seconds a step with `running` requests decoding."""
    blocks = running * 90
    scheduler = Scheduler(BlockManager(blocks, BLOCK, True, 1), running, 8192, 1 << 20, num_drafts, (3, 4))
    device = FakeDevice(num_drafts, running, blocks, 0.0)
    engine = LLMEngine([scheduler], device, 1000, overlap=seconds > 0)
    rng = random.Random(0)
    for i in range(running):
        prompt = [rng.randrange(10, 1000) for _ in range(1000)]
        engine.add(Request(i, prompt, Sampling(), Stopping(10_000, frozenset({1}), frozenset({1}))))
    while engine.stats().waiting or any(r.num_computed < 1000 for r in scheduler.running):
        engine.step()
    device.seconds = seconds
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'running':>8} {'drafts':>7} {'ms a step':>10} {'us a request':>13} {'ms beside 5 ms':>15}")
    for num_drafts in (0, 3):
        for running in (16, 64, 128, 256, 512):
            alone = measure(running, num_drafts, options.steps, 0.0)
            beside = measure(running, num_drafts, options.steps, DEVICE_SECONDS) - DEVICE_SECONDS
            rows.append({"running": running, "drafts": num_drafts, "seconds": alone, "beside": beside})
            each = alone / running * 1e6
            print(f"{running:>8} {num_drafts:>7} {alone * 1e3:>10.3f} {each:>13.2f} {beside * 1e3:>15.3f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
