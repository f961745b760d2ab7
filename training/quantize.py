"""Weights rounded as they will be shipped and converted, for training the last steps on them and for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_fp4_plugin.numerics import nvfp4
from deepseek_fp4_plugin.numerics.fp8_block import BLOCK, E4M3_MAX
from training.model import MLP, Attention, Model, MoE

_MLP_WEIGHTS = ("gate_up_proj", "down_proj")
_ATTENTION_WEIGHTS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def fp8_rounded(w: Tensor) -> Tensor:
    """Through E4M3 in 128 x 128 blocks and back: FP32 [..., out, in], as export and the package compute it."""
    rows, cols = w.shape[-2:]
    padded = F.pad(w, (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-2, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax((-3, -1), keepdim=True)
    scale = torch.where(amax == 0, 1.0, amax / E4M3_MAX)
    values = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
    return values.flatten(-4, -3).flatten(-2)[..., :rows, :cols]


def nvfp4_rounded(w: Tensor) -> Tensor:
    """FP8-rounded `w` through BF16 and NVFP4; gate and up of an MLP share the tensor scale. FP32 [(E,) out, in]."""
    w = w.bfloat16()
    return nvfp4.dequantize(nvfp4.quantize(w, nvfp4.tensor_scale(w.abs().amax((-2, -1)))))


def _linears(model: Model) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of the decoder layers' linears: those that NVFP4 leaves in BF16, and those it takes."""
    kept, taken = [], []
    skip = set(model.mtp.modules())
    for module in model.modules():
        if isinstance(module, Attention):
            kept += [getattr(module, name) for name in _ATTENTION_WEIGHTS]
        elif isinstance(module, MLP | MoE):
            (kept if module in skip else taken).extend(getattr(module, name) for name in _MLP_WEIGHTS)
    return kept, taken


@torch.no_grad()
def round_weights(model: Model, nvfp4_layers: bool) -> None:
    """Replace every weight by its shipped value: FP8 linears (NVFP4 for the MLPs where asked), BF16 for the rest."""
    kept, taken = _linears(model)
    seen = {id(p) for p in kept + taken}
    for p in kept:
        p.copy_(fp8_rounded(p))
    for p in taken:
        p.copy_(nvfp4_rounded(fp8_rounded(p)) if nvfp4_layers else fp8_rounded(p))
    for p in model.parameters():
        if id(p) not in seen:
            p.copy_(p.bfloat16())


@contextmanager
def rounded(model: Model, nvfp4_layers: bool) -> Iterator[None]:
    """Rounded weights inside, the FP32 ones again after: gradients taken inside pass straight through the rounding."""
    masters = [p.detach().clone() for p in model.parameters()]
    round_weights(model, nvfp4_layers)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
