"""What the tests of the CUDA kernels share: where they run, weights on both sides, rows beside poison."""

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cuda, ops
from deepseek_fp4_plugin.kernels.weights import Case, WeightTensors

DEVICE, BF16 = torch.device("cuda"), torch.bfloat16
REFUSED = cuda.refuses(Case(DEVICE, BF16, WeightFormat.NVFP4))
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(REFUSED is not None, reason=f"no CUDA kernels here: {REFUSED}")]


def both(parts: list[WeightTensors], activations: str = "bf16"):
    """The parts on the GPU for our kernels, which must be chosen, and for the reference."""
    ours = ops.prepare(parts, DEVICE, BF16, activations)
    assert ours.backend is cuda
    return ours, ops.prepare(parts, DEVICE, BF16, activations, backend="reference")


def poisoned(rows: int, width: int) -> torch.Tensor:
    """Random rows cut out of wider ones that are NaN elsewhere."""
    wide = torch.full((rows, width + 24), float("nan"), dtype=BF16, device=DEVICE)
    wide[:, 8 : 8 + width] = torch.randn(rows, width, device=DEVICE)
    return wide[:, 8 : 8 + width]
