"""FP4 weights by FP4 activations as Blackwell multiplies them: Triton interprets the kernel here, and compiles it for
such a GPU, which nobody had."""

import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

# Triton's interpreter takes every scale for a power of two, E4M3 ones too.
INTERPRETER = """
import torch
from triton.runtime import interpreter

def e4m3(scale, _):
    return torch.from_numpy(scale.data).view(torch.float8_e4m3fn).float().numpy()

interpreter._dot_scaled_scale_to_f32 = e4m3
"""
ALIKE = """
import sys, torch
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import ops, reference
from tests.parity.kernel_cases import TWO_STEPS, error, random_part

torch.manual_seed(0)
DEVICE, BF16, NVFP4 = torch.device(sys.argv[1]), torch.bfloat16, WeightFormat.NVFP4

def both(parts):
    return [ops.prepare(parts, DEVICE, BF16, "fp4", backend=name) for name in ("blackwell", "reference")]

for out, width, scales in ((24, 32, (2e-3,)), (136, 272, (2e-3, 5e-4))):
    ours, law = both([random_part(NVFP4, out, width, scale_2=scale) for scale in scales])
    for rows in (0, 1, 5, 130):
        x = torch.randn(rows, width).to(DEVICE, BF16)
        assert error(ops.linear(x, ours), ops.linear(x, law)) <= TWO_STEPS, (out, rows)
for experts, hidden, inner, k in ((3, 48, 32, 2), (6, 80, 144, 3)):
    a, c = both([random_part(NVFP4, inner, hidden, experts) for _ in range(2)])
    b, _ = both([random_part(NVFP4, hidden, inner, experts)])
    for expert in range(experts):
        x = torch.randn(3, hidden).to(DEVICE, BF16)
        assert error(a.backend.linear(x, a, expert), c.backend.linear(x, c, expert)) <= TWO_STEPS, expert
    for tokens in (0, 1, 5, 300):
        ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]) if tokens else torch.empty(0, k).long()
        ids[1:3, 0] = -1  # elsewhere
        x, ids, weights = torch.randn(tokens, hidden).to(DEVICE, BF16) * 0.1, ids.to(DEVICE), torch.rand(tokens, k)
        # Expert by expert, with the products above: a hidden value that tips would be another FP4 number.
        weights = weights.to(DEVICE)
        expected = reference.experts_mlp(x, ids, weights, a, b)
        assert error(ops.experts_mlp(x, ids, weights, a, b), expected) <= TWO_STEPS, (experts, tokens)
print("all alike")
"""


def test_interpreted_it_is_the_reference():
    environment = {"TRITON_INTERPRET": "1", "PATH": ""}
    command = [sys.executable, "-c", INTERPRETER + ALIKE, "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.stdout == "all alike\n", ended.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_the_reference():
    """On any: before Blackwell Triton decodes the same codes and scales for other tensor cores."""
    ended = subprocess.run([sys.executable, "-c", ALIKE, "cuda"], capture_output=True, text=True)
    assert ended.stdout == "all alike\n", ended.stderr


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_it_uses_the_fp4_tensor_cores():
    """Blocks of 16 with E4M3 scales, straight from the codes; on Hopper the same source is BF16 products."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from deepseek_fp4_plugin.kernels.blackwell import product

    types = ["*u8", "*fp8e4nv", "*i32", "*i32", "*u8", "*fp8e4nv", "*fp32", "*bf16", "i32", "i32"]
    names = product.scaled_product.arg_names
    signature = dict(zip(names, [*types, *["constexpr"] * 3], strict=True))
    source = ASTSource(product.scaled_product, signature, {"ROWS": 128, "OUTPUTS": 128, "INPUTS": 128})
    found = {}
    for capability in (100, 90):
        ptx = compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4}).asm["ptx"]
        found[capability] = set(re.findall(r"(?:tcgen05\.mma|wgmma\.mma_async)[\w.:]*", ptx))
    assert any("kind::mxf4nvf4.block_scale" in name for name in found[100]), found
    assert found[90] == {"wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"}
