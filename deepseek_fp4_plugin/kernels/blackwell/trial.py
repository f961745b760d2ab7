"""A trial of the kernel on one device: small, odd products, compared with the reference's.

Triton makes two variants of it, for outputs that are a multiple of 16 and for others, with the same code for dense
weights and routed experts. Both are tried, with rows that are nobody's, several blocks of rows, outputs and inputs, and
the last of each not full.
"""

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import ops, reference
from deepseek_fp4_plugin.kernels.blackwell.limits import RIGHT
from deepseek_fp4_plugin.kernels.weights import PreparedWeight, WeightTensors
from deepseek_fp4_plugin.numerics.error import relative_max

# Of the largest result. Products are exact and sums FP32 on both sides; so one BF16 step where the order of a sum tips
# a rounding, and one more.
_TOLERANCE = 2.0**-7
_BF16 = torch.bfloat16


def outcome(device: str) -> str:
    """RIGHT, or what is wrong, in a line. A GPU becomes the current one; its index is wanted."""
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        with torch.inference_mode():
            _dense(torch.device(device))
            _experts(torch.device(device))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
    return RIGHT


def _dense(device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    for rows, out, width in ((1, 144, 1040), (130, 137, 272)):
        ours, law = _prepared([_weight(random, out, width, scale_2=scale) for scale in (2e-3, 5e-4)], device)  # fused
        x = torch.randn(rows, width, generator=random).to(device, _BF16)
        _compare(f"{rows} rows of {ours.out_features} x {width}", ops.linear(x, ours), ops.linear(x, law))


def _experts(device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    experts, tokens, hidden, inner = 5, 200, 272, 144
    gate_up, gate_up_law = _prepared([_weight(random, inner, hidden, experts) for _ in range(2)], device)
    down, down_law = _prepared([_weight(random, hidden, inner, experts)], device)
    x = 0.1 * torch.randn(tokens, hidden, generator=random).to(device, _BF16)
    for expert in range(experts):
        for ours, law, rows in ((gate_up, gate_up_law, x[:3]), (down, down_law, x[:3, :inner])):
            actual, expected = ours.backend.linear(rows, ours, expert), law.backend.linear(rows, law, expert)
            _compare(f"expert {expert}", actual, expected)
    ids = torch.rand(tokens, experts - 1, generator=random).argsort(1)[:, :2]  # the last expert is nobody's choice
    ids[1:9, 0] = -1  # another rank's
    weights = torch.rand(tokens, 2, generator=random).to(device)
    # Expert by expert with the products above: a hidden value that tips would be another FP4 number.
    expected = reference.experts_mlp(x, ids.to(device), weights, gate_up, down)
    _compare("routed experts", ops.experts_mlp(x, ids.to(device), weights, gate_up, down), expected)


def _weight(
    random: torch.Generator, out: int, width: int, experts: int | None = None, scale_2: float = 2e-3
) -> WeightTensors:
    """Every code, every scale that is a number."""
    lead = () if experts is None else (experts,)
    packed = torch.randint(0, 256, (*lead, out, width // 2), generator=random).byte()
    scale = torch.randint(0, 127, (*lead, out, width // 16), generator=random).byte().view(torch.float8_e4m3fn)
    factor = scale_2 * (1 + torch.rand(lead, generator=random))
    return WeightTensors(WeightFormat.NVFP4, packed, scale, factor, torch.tensor(2e-3))


def _prepared(parts: list[WeightTensors], device: torch.device) -> tuple[PreparedWeight, PreparedWeight]:
    """For the FP4 tensor cores, and for the reference."""
    return ops.prepare(parts, device, _BF16, "fp4", "blackwell"), ops.prepare(parts, device, _BF16, "fp4", "reference")


def _compare(what: str, actual: Tensor, expected: Tensor) -> None:
    error = relative_max(expected, actual)
    if not error <= _TOLERANCE:  # NaN, too
        raise ArithmeticError(f"{what}: off by {error:.2g} of the largest result")
