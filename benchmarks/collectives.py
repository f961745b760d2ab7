"""Exchanges between the GPUs of one machine: microseconds in a CUDA graph, ours beside NCCL's and torch's own.

    torchrun --nproc-per-node 2 benchmarks/collectives.py [--rows 1 16 64] [--hidden 7168] [--json FILE]

Rows of BF16 values, as a decoder layer sums them. Medians over replays of a graph that holds the call 50 times, the
sides one after the other in every round. torch's all-reduces through symmetric memory sum a tensor that lies in such
memory already, its two-shot in place; ours takes any and leaves it. Every sum is compared with the plain one, bit for
bit and on every rank.
"""

import argparse
import json
import os
import statistics
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.parallel.collectives import ProcessGroup, connect
from deepseek_fp4_plugin.parallel.peers import PeerGroup, join

CALLS, ROUNDS = 50, 15


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    dist.barrier()
    torch.cuda.synchronize()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / CALLS


def medians(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    graphs = {name: graph_of(call) for name, call in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(microseconds(graph))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def check(plain: ProcessGroup, ours: PeerGroup, x: Tensor, hidden: Tensor, weight: Tensor) -> list[str]:
    """What differs from the plain exchange; nothing, one hopes."""
    rows, size, wrong = x.shape[0], ours.size, []
    total = plain.all_reduce(x)
    for turn in range(5):
        if not torch.equal(ours.all_reduce(x), total):
            wrong.append(f"all-reduce, turn {turn}")
    uneven = [rows + r for r in range(size)]
    mine = x[:1].expand(uneven[ours.rank], -1).contiguous() + ours.rank
    if not torch.equal(ours.all_gather(mine, uneven), plain.all_gather(mine, uneven)):
        wrong.append("gather")
    parts = torch.randn(sum(uneven), x.shape[1], device=x.device).bfloat16()
    if not torch.equal(ours.reduce_scatter(parts, uneven), plain.reduce_scatter(parts, uneven)):
        wrong.append("reduce-scatter")
    if x.numel() * 2 <= 1 << 20:
        y, normed = ours.exchange.sum_and_norm(x, hidden, weight, 1e-6)
        if not torch.equal(y, hidden + total):
            wrong.append("sum and residual")
        error = (normed.float() - reference.rms_norm(y, weight, 1e-6).float()).abs().max() / normed.float().abs().max()
        if error > 2**-7:
            wrong.append(f"norm ({error})")
        everyone = plain.all_gather(normed)
        if not all(torch.equal(part, normed) for part in everyone.chunk(size)):
            wrong.append("norms of the ranks")
    return wrong


def measure(plain: ProcessGroup, ours: PeerGroup, rows: int, width: int, device: torch.device) -> dict[str, object]:
    torch.manual_seed(ours.rank)
    x = torch.randn(rows, width, device=device).bfloat16()
    torch.manual_seed(99)
    hidden, weight = torch.randn(rows, width, device=device).bfloat16(), torch.randn(width, device=device).bfloat16()
    wrong = check(plain, ours, x, hidden, weight)
    shared = symmetric.empty(rows * width, dtype=torch.bfloat16, device=device)
    symmetric.rendezvous(shared, plain.group.group_name)
    shared.fill_(0)
    name, exchanged = plain.group.group_name, x.clone().fill_(0)
    sides: dict[str, Callable[[], object]] = {"ours": lambda: ours.all_reduce(x)}
    if rows * width * 2 <= 1 << 20:
        sides["ours, residual, norm"] = lambda: ours.exchange.sum_and_norm(x, hidden, weight, 1e-6)
        sides["our gather"] = lambda: ours.all_gather(x)
        if rows >= ours.size:
            sides["our reduce-scatter"] = lambda: ours.reduce_scatter(x[: rows // ours.size * ours.size])
    sides["NCCL"] = lambda: dist.all_reduce(exchanged)
    sides["torch one-shot"] = lambda: torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", name)
    sides["torch two-shot"] = lambda: torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", name)
    sides["torch two-shot, copied in"] = lambda: in_shared_memory(shared, x, name)
    sides["plain"] = lambda: plain.all_reduce(x)
    return {"rows": rows, "differs": wrong, **medians(sides)}


def in_shared_memory(shared: Tensor, x: Tensor, name: str) -> Tensor:
    shared.copy_(x.view(-1))
    return torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    plain = connect(rank, size, "env://", "nccl")
    assert isinstance(plain, ProcessGroup)
    ours = join(plain, device)
    if not isinstance(ours, PeerGroup):
        raise SystemExit("these GPUs cannot write to one another's memory; there is nothing to compare")
    lines = []
    for rows in options.rows:
        try:
            lines.append(measure(plain, ours, rows, options.hidden, device))
        except RuntimeError:
            traceback.print_exc(limit=4)
            break
        if rank == 0 or lines[-1]["differs"]:
            print(json.dumps({"rank": rank, **lines[-1]}), flush=True)
    if rank == 0 and options.json:
        facts = {"gpu": torch.cuda.get_device_name(), "ranks": size, "hidden": options.hidden}
        options.json.write_text(json.dumps({**facts, "lines": lines}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
