"""nvidia-modelopt 0.47.0's weight calibrations on a CPU, for tests and benchmarks that compare ours with them.

Its searches call one Triton kernel, fake quantization under given block amaxes, which needs a GPU. Here that kernel is
plain torch of the same formulas; candidates, losses, choice and export are ModelOpt's own code. The input quantizers,
which need a GPU too, are off; weight scales do not depend on them within one layer.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from torch import Tensor, nn

from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor

_MIDPOINTS, _ODD = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]), torch.tensor([0.75, 1.75, 3.5])
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def calibrated(w: Tensor, inputs: Tensor, config: str) -> NVFP4Tensor:
    """What ModelOpt makes of one linear layer of weight `w` [out, in] under the configuration mtq.<config>.

    inputs: [rows, in] of the same dtype; calibration sees them in batches of 1,024.
    """
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    linear.weight.data = w.clone()
    model = nn.Sequential(linear)
    chosen = getattr(mtq, config)
    off = {"quantizer_name": "*input_quantizer", "enable": False}
    chosen = {**chosen, "quant_cfg": [*chosen["quant_cfg"], off]}
    with _kernel_in_torch():
        mtq.quantize(model, chosen, lambda m: [m(batch) for batch in inputs.split(1024)])
    quantizer = model[0].weight_quantizer
    scale, scale_2 = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, w)
    packed, _, _ = NVFP4QTensor.quantize(w.clone(), 16, scale, scale_2)
    return NVFP4Tensor(packed._quantized_data, scale, scale_2)


@contextmanager
def _kernel_in_torch() -> Iterator[None]:
    theirs = tensor_quant.triton_kernel
    tensor_quant.triton_kernel = types.SimpleNamespace(
        IS_AVAILABLE=True, static_blockwise_fp4_fake_quant=_static_blockwise_fp4_fake_quant
    )
    try:
        yield
    finally:
        tensor_quant.triton_kernel = theirs


def _static_blockwise_fp4_fake_quant(
    x: Tensor, amax: Tensor, global_amax: Tensor, quantize_scales: bool, largest_scale: float, out_dtype: torch.dtype
) -> Tensor:
    """x in blocks of one amax each; the scale is amax / 6, rounded to E4M3 as 0.47.0's own CPU code does."""
    assert quantize_scales
    scale = tensor_quant.scaled_e4m3_impl(amax.float() / 6.0, global_amax.float() * (448.0 / largest_scale) / 6.0)
    blocks, scale = x.reshape(amax.numel(), -1).float(), scale.reshape(-1, 1)
    quotient = blocks.abs() / torch.where(scale == 0, 1.0, scale)
    index = torch.searchsorted(_MIDPOINTS, quotient) + torch.isin(quotient, _ODD)
    values = torch.where(scale == 0, 0.0, _MAGNITUDES[index] * scale)
    return torch.where(blocks >= 0, values, -values).reshape(x.shape).to(out_dtype)
