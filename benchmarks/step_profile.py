"""Where a step's time on the GPU goes, by what its kernels are for."""

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# The first that a kernel's name matches.
KINDS = {
    "exchanges": r"^(exchange|sum_norm|all_reduce)\b|nccl",
    "routed experts": r"nvfp4_experts|experts_work|nvfp4_decode|^(gather|activate|combine)\b|grouped",
    "attention": r"^mla_|^store|^rotary|flash|fmha",
    "router": r"^route",
    "NVFP4 linears": r"nvfp4_|^arrange",
    "BF16 linears": r"dense_linear|gemm|nvjet|cutlass|cublas|splitk",
    "norms": r"rms_norm",
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "the rest")


def attribute(kernels: list[tuple[float, float, str]]) -> dict[str, float]:
    """Milliseconds by kind, of (start, end, name) in microseconds: a kernel that begins under the one before it counts
    from where that one ends; what lies between two is "nothing". The sum is the whole span."""
    found: dict[str, float] = {}
    ended = None
    for start, end, name in sorted(kernels, key=lambda kernel: kernel[1]):
        if ended is not None and start > ended:
            found["nothing"] = found.get("nothing", 0.0) + (start - ended) / 1e3
        begin = start if ended is None else max(start, ended)
        found[kind_of(name)] = found.get(kind_of(name), 0.0) + (end - begin) / 1e3
        ended = end
    return {kind: round(value, 3) for kind, value in sorted(found.items(), key=lambda item: -item[1])}


def profiled(step: Callable[[], object]) -> dict[str, float]:
    """Of one call, which has run before."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    return attribute(
        [
            (event.time_range.start, event.time_range.end, event.name)
            for event in trace.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        ]
    )
