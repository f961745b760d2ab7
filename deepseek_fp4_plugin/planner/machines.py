"""Machines by name, as makers describe them, or by given figures."""

import re
import time
from typing import NamedTuple

import psutil
import torch

from deepseek_fp4_plugin.config import did_you_mean
from deepseek_fp4_plugin.models.residency import Kernels


class Machine(NamedTuple):
    """Equal devices of one host. memory, bandwidth and flops are of one: bytes, bytes a second, BF16 a second."""

    name: str
    devices: int
    memory: float
    bandwidth: float
    flops: float
    kernels: Kernels


# NVIDIA's data sheets: memory, read rate, dense BF16 rate.
_GPUS = {
    "B200": (180e9, 8.0e12, 2250e12),
    "H200": (141e9, 4.8e12, 989e12),
    "H100-80GB": (80e9, 3.35e12, 989e12),
}
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_FIGURES = re.compile(
    r"(?:(\d+)x)?(cpu:)?([\d.]+)([kMGTP]?)B:([\d.]+)([kMGTP]?)B/s:([\d.]+)([kMGTP]?)FLOPS", re.IGNORECASE
)


def machine(text: str) -> Machine:
    """`8xB200`, `H200`, `cpu` (this machine, measured for a second), or `COUNTxMEMORY:RATE:FLOPS` of one device.

    `4x96GB:3.3TB/s:800TFLOPS`; with `cpu:` before the memory, a CPU's kernels. ValueError for anything else.
    """
    if text.lower() == "cpu":
        return _this_cpu()
    if match := _FIGURES.fullmatch(text):
        count, cpu, *figures = match.groups()
        memory, bandwidth, flops = (
            float(number) * _UNITS[_unit(prefix)] for number, prefix in zip(figures[::2], figures[1::2], strict=True)
        )
        if not (int(count or 1) and memory and bandwidth and flops):
            raise ValueError(f"{text}: every figure of a machine must be above 0")
        return Machine(text, int(count or 1), memory, bandwidth, flops, "cpu" if cpu else "cuda")
    count, _, name = text.rpartition("x") if re.match(r"\d+x", text) else ("1", "", text)
    known = {gpu.lower(): gpu for gpu in _GPUS}
    if name.lower() not in known or not int(count):
        hint = did_you_mean(name, list(_GPUS))
        raise ValueError(
            f"no machine {text!r}{hint or '.'} There are {', '.join(_GPUS)} (8xB200 for eight), cpu, or figures of one "
            "device such as 4x96GB:3.3TB/s:800TFLOPS"
        )
    gpu = known[name.lower()]
    return Machine(f"{int(count)}x{gpu}", int(count), *_GPUS[gpu], "cuda")


def _unit(prefix: str) -> str:
    return prefix if prefix in _UNITS else prefix.upper() if prefix.upper() in _UNITS else prefix.lower()


def _this_cpu() -> Machine:
    """Memory as the system says; rates as torch reaches them in a few tries, the best of which counts."""
    data = torch.ones(2**25)
    bandwidth = data.nbytes / _best(lambda: data.sum())
    a = torch.ones(1024, 1024, dtype=torch.bfloat16)
    flops = 2 * 1024**3 / _best(lambda: a @ a)
    memory = float(psutil.virtual_memory().total)
    return Machine("cpu (this machine, rates measured now)", 1, memory, bandwidth, flops, "cpu")


def _best(work) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
