"""What it costs to have ranks in processes of their own: a step without a model, from its plan to rank 0's result.

    python benchmarks/executor.py [--ranks 1 2 4 8] [--requests 64] [--steps 2000]

in-process   the plan handed to a runner
pipes        pickled once, sent over one socket pair a rank, computed by nobody, rank 0's result back
Medians of single steps, in microseconds. The workers are the real loop (engine/worker_process.py) over a runner that
answers at once, so that all of it is transport.
"""

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from deepseek_fp4_plugin.engine.step_plan import PlanRow, StepPlan, StepResult
from deepseek_fp4_plugin.engine.worker_process import compute


class Nobody:
    """A runner without a model: one token for every row."""

    def submit(self, plan: StepPlan) -> None:
        self.rows = len(plan.rows)

    def collect(self) -> StepResult:
        return StepResult([[5]] * self.rows, [[]] * self.rows)

    def explain(self, token_ids: object) -> str:
        return ""


def plan(requests: int) -> StepPlan:
    return StepPlan([PlanRow(i, (), 100 + i, 0, True) for i in range(requests)], requests, uniform=True)


def in_process(requests: int, steps: int) -> list[float]:
    runner, times = Nobody(), []
    for _ in range(steps):
        step = plan(requests)
        began = time.perf_counter()
        runner.submit(step)
        runner.collect()
        times.append(time.perf_counter() - began)
    return times


def pipes(ranks: int, requests: int, steps: int) -> list[float]:
    fronts, children = [], []
    for rank in range(ranks):
        front, work = Pipe()
        command = [sys.executable, __file__, "--worker", str(work.fileno()), str(int(rank == 0))]
        children.append(subprocess.Popen(command, pass_fds=[work.fileno()]))
        work.close()
        fronts.append(front)
    times = []
    for _ in range(steps):
        step = plan(requests)
        began = time.perf_counter()
        data = pickle.dumps(step, pickle.HIGHEST_PROTOCOL)
        for front in fronts:
            front.send_bytes(data)
        fronts[0].recv()
        times.append(time.perf_counter() - began)
    for front in fronts:
        front.close()
    for child in children:
        child.wait()
    return times


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        try:
            compute(Connection(int(sys.argv[2])), Nobody(), answers=sys.argv[3] == "1", asynchronous=False)
        except (EOFError, OSError):
            os._exit(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, {options.requests} requests, {len(pickle.dumps(plan(options.requests)))} bytes a plan"
    )
    print(f"in-process  {1e6 * statistics.median(in_process(options.requests, options.steps)):6.0f} us")
    for ranks in options.ranks:
        times = pipes(ranks, options.requests, options.steps)[options.steps // 10 :]
        print(f"{ranks} ranks     {1e6 * statistics.median(times):6.0f} us")


if __name__ == "__main__":
    main()
