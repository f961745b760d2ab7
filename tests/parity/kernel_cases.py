"""Weights, attention and tolerances that the kernels' parity tests share.

Tolerances: products are exact and sums FP32 on both sides, so before rounding results differ by the order of at most a
few thousand additions (about 1e-5 of the largest result), and after it by one BF16 step where that tips a rounding:
2^-8 of a value, at most 2^-8 of the largest. Two steps are allowed.
"""

from dataclasses import replace

import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import WeightTensors

TWO_STEPS = 2.0**-7
BF16 = torch.bfloat16
FORMATS = [
    (WeightFormat.PLAIN, "bf16"),
    (WeightFormat.FP8_BLOCK, "bf16"),
    (WeightFormat.NVFP4, "bf16"),
    (WeightFormat.NVFP4, "fp4"),
    (WeightFormat.NVFP4, "int8"),
]
FORMAT_IDS = ["bf16", "fp8", "w4a16", "w4a4", "w4a8"]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the largest expected value."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(f"{actual.shape} {actual.dtype} instead of {expected.shape} {expected.dtype}")
    if not expected.numel():
        return 0.0
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-37)).item()


def random_part(
    weight_format: WeightFormat,
    out: int,
    width: int,
    experts: int = 0,
    scale_2: float = 2e-3,
    input_scale: float = 2e-3,
) -> WeightTensors:
    """Random codes and scales, every legal code with some probability."""
    lead = (experts,) if experts else ()
    if weight_format is WeightFormat.PLAIN:
        return WeightTensors(weight_format, torch.randn(*lead, out, width).to(BF16))
    if weight_format is WeightFormat.FP8_BLOCK:
        codes = torch.randint(0, 256, (*lead, out, width), dtype=torch.uint8)
        codes[(codes & 127) == 127] = 0  # NaN
        scale = torch.rand(*lead, -(-out // 128), -(-width // 128)) + 0.5
        return WeightTensors(weight_format, codes.view(torch.float8_e4m3fn), scale)
    packed = torch.randint(0, 256, (*lead, out, width // 2), dtype=torch.uint8)
    scale = torch.randint(0, 127, (*lead, out, width // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    factor = torch.rand(experts) * scale_2 if experts else torch.tensor(scale_2)
    return WeightTensors(weight_format, packed, scale, factor, torch.tensor(input_scale))


def both(parts, activations, input_scale=2e-3):
    """Prepared for the CPU's kernels, and for the reference."""
    parts = [replace(part, input_scale=torch.tensor(input_scale)) for part in parts]
    return [ops.prepare(parts, torch.device("cpu"), BF16, activations, backend) for backend in ("cpu", "reference")]


def attention_case(cache_dtype, queries, contexts, heads, latent, rope, block=16):
    blocks_each = [-(-context // block) for context in contexts]
    total = sum(blocks_each) + 1
    cache = torch.randn(total, block, latent + rope).to(cache_dtype)
    order = torch.randperm(total).tolist()
    poison = cache.view(torch.uint8) if cache_dtype == torch.float8_e4m3fn else cache
    nan = 127 if cache_dtype == torch.float8_e4m3fn else float("nan")
    tables = torch.full((len(contexts), max(blocks_each) + 1), order[-1])
    for row, (count, context) in enumerate(zip(blocks_each, contexts, strict=True)):
        mine = [order.pop(0) for _ in range(count)]
        tables[row, :count] = torch.tensor(mine)
        if context % block:
            poison[mine[-1], context % block :] = nan
    poison[order[-1]] = nan
    q = torch.randn(sum(queries), heads, latent + rope).to(BF16)
    arguments = (
        q[..., :latent],
        q[..., latent:],
        cache,
        tables,
        torch.tensor([0, *queries]).cumsum(0),
        torch.tensor(contexts),
        max(queries),
        max(contexts),
        (latent + rope) ** -0.5,
    )
    return arguments, q
