"""FP4 weights by FP4 activations as Blackwell multiplies them: Triton interprets the kernel here, and compiles it for
such a GPU, which nobody had. So it is tried on each before it serves there, and what such a trial says is tested."""

import os
import re
import subprocess
import sys

import numpy
import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import blackwell, select
from deepseek_fp4_plugin.kernels.blackwell import limits
from deepseek_fp4_plugin.kernels.weights import Case
from deepseek_fp4_plugin.numerics import nvfp4

triton = pytest.importorskip("triton", reason="Triton is not installed")
FOR_HOPPER = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)  # before, "PassManager::run failed" there
W4A4 = Case(torch.device("cuda"), torch.bfloat16, WeightFormat.NVFP4, "fp4")

# Triton's interpreter takes every scale for a power of two, E4M3 ones too.
INTERPRETER = """
import torch
from triton.runtime import interpreter

def e4m3(scale, _):
    return torch.from_numpy(scale.data).view(torch.float8_e4m3fn).float().numpy()

interpreter._dot_scaled_scale_to_f32 = e4m3
"""
# What that of Triton 3.6.0 says of NumPy 2.5.2.
NEWER_NUMPY = "only 0-dimensional arrays can be converted to Python scalars"
ALIKE = """
import sys, torch
from contextlib import nullcontext
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import ops, reference
from deepseek_fp4_plugin.kernels.blackwell.trial import outcome
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
        norm = torch.rand(width).to(DEVICE, BF16)
        with torch.cuda.device(DEVICE) if DEVICE.type == "cuda" else nullcontext():  # `cuda` wants the current one
            normed = (ops if DEVICE.type == "cuda" else reference).rms_norm(x, norm, 1e-6)
            assert torch.equal(ops.norm_linear(x, norm, 1e-6, ours), ops.linear(normed, ours)), (out, rows)
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
print("all alike; trial:", outcome(sys.argv[1]))
"""


def test_interpreted_it_is_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETER + ALIKE, "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if NEWER_NUMPY in ended.stderr:
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with NumPy {numpy.__version__}")
    assert ended.stdout == "all alike; trial: right\n", ended.stderr


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


on_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


def before_blackwell() -> bool:
    return torch.cuda.get_device_capability()[0] < 10


@on_a_gpu
@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=on_two_gpus)])
def test_on_a_gpu_it_is_the_reference(device):
    """On any, the current one or not: before Blackwell Triton decodes the same codes and scales for other tensor
    cores."""
    if before_blackwell() and not FOR_HOPPER:
        pytest.skip(f"Triton {triton.__version__} compiles the kernel for Blackwell alone")
    ended = subprocess.run([sys.executable, "-c", ALIKE, device], capture_output=True, text=True)
    assert ended.stdout == "all alike; trial: right\n", ended.stderr
    assert limits.failure(device) is None


@on_a_gpu
@on_two_gpus
def test_a_trial_on_another_gpu_ends_alike():
    """Where Triton cannot compile the kernel, in the same sentence."""
    first, second = (limits.failure(f"cuda:{index}") for index in (0, 1))
    assert second == (first and first.replace("cuda:0", "cuda:1"))


@on_a_gpu
def test_on_a_gpu_a_compiler_that_fails_is_told_of():
    if not before_blackwell() or FOR_HOPPER:
        pytest.skip(f"Triton {triton.__version__} compiles the kernel for this GPU")
    assert limits.failure("cuda:0") == "its trial on cuda:0 failed: RuntimeError: PassManager::run failed"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_it_uses_the_fp4_tensor_cores():
    """Blocks of 16 with E4M3 scales, straight from the codes; on Hopper the same source is BF16 products. As launched:
    tensors and widths are multiples of 16, outputs may be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from deepseek_fp4_plugin.kernels.blackwell import product

    types = ["*u8", "*fp8e4nv", "*i32", "*i32", "*u8", "*fp8e4nv", "*fp32", "*bf16", "i32", "i32"]
    names = product.scaled_product.arg_names
    signature = dict(zip(names, [*types, *["constexpr"] * 3], strict=True))
    blocks = {"ROWS": product.ROWS, "OUTPUTS": product._OUTPUTS, "INPUTS": product._INPUTS}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(types))}
    any_outputs = {key: value for key, value in aligned.items() if key != (names.index("out"),)}
    fp4 = r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.(block16|scale_vec::4X)"  # one thing, two names
    expected = {100: fp4, 103: fp4}
    if FOR_HOPPER:
        expected[90] = r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.bf16\.bf16"
    for capability, wanted in expected.items():
        for attributes in (aligned, any_outputs):
            source = ASTSource(product.scaled_product, signature, blocks, attributes)
            compiled = compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4})
            found = set(re.findall(r"(?:tcgen05\.mma|wgmma\.mma_async)\.[\w.:]*", compiled.asm["ptx"]))
            assert len(found) == 1 and re.fullmatch(wanted, *found), (capability, found)
            assert compiled.metadata.shared <= 227 * 1024


def exact(x, x_scale, source, expert_of, weight, weight_scale, factor):
    """`product.product` in plain torch."""
    from deepseek_fp4_plugin.kernels.blackwell.product import ROWS

    rows = nvfp4.block_values(x, x_scale)[source.clamp(min=0).long()]
    expert_of = torch.where(source >= 0, expert_of.repeat_interleave(ROWS), -1)
    y = torch.full((len(source), weight.shape[1]), float("nan"), dtype=torch.bfloat16)
    for expert in range(len(weight)):
        values = nvfp4.block_values(weight[expert], weight_scale[expert])
        mine = expert_of == expert
        y[mine] = (rows[mine] @ values.T * factor[expert]).bfloat16()
    return y


def fails(*arguments):
    raise RuntimeError("PassManager::run failed\nand more")


@pytest.mark.parametrize(
    ("product", "said"),
    [
        (exact, "right"),
        (fails, "RuntimeError: PassManager::run failed"),
        (lambda *a: exact(*a) * 1.02, "ArithmeticError: 1 rows of 288 x 1040: off by 0.02"),
        (lambda *a: exact(*a).index_fill(1, torch.tensor([136]), 0), "ArithmeticError: 1 rows"),
        (lambda *a: exact(*a) * torch.nan, "ArithmeticError: 1 rows of 288 x 1040: off by nan of the largest result"),
        (lambda x, scale, *a: exact(x, scale.roll(1, 1), *a), "ArithmeticError: 1 rows"),
        (lambda x, scale, source, *a: exact(x, scale, source.clamp(max=128), *a), "ArithmeticError: 130 rows"),
        (lambda x, s, rows, expert, *a: exact(x, s, rows, expert * 0, *a), "ArithmeticError: expert 1: off by"),
        (
            lambda x, s, rows, expert, *a: exact(x, s, rows.roll(int(len(expert) > 3)), expert, *a),
            "ArithmeticError: routed",
        ),
    ],
    ids=["right", "raises", "factor", "output", "nan", "scales", "row", "expert", "routing"],
)
def test_a_trial_says_what_is_wrong(monkeypatch, product, said):
    from deepseek_fp4_plugin.kernels.blackwell.trial import outcome

    monkeypatch.setattr("deepseek_fp4_plugin.kernels.blackwell.product.product", product)
    assert outcome("cpu").startswith(said)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print('a word of another'); print('right')", None),
        ("print('ValueError: no')", "its trial on here failed: ValueError: no"),
        ("import os; os.write(1, b'right'); os.abort()", "its trial on here failed: it ended with status -6"),
        (
            "import triton_of_the_future",
            "its trial on here failed: it ended with status 1: "
            "ModuleNotFoundError: No module named 'triton_of_the_future'",
        ),
        ("import os; print(os.environ.get('TRITON_INTERPRET', 'right'))", None),
        ("import time; time.sleep(600)", "its trial on here did not end in 1 s"),
    ],
    ids=["right", "wrong", "abort", "import", "not interpreted", "hang"],
)
def test_a_trial_may_end_in_any_way(monkeypatch, program, reason):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(limits, "_PROGRAM", program)
    if "sleep" in program:
        monkeypatch.setattr(limits, "_SECONDS", 1)
    assert limits.failure.__wrapped__("here") == reason


def test_a_trial_is_a_process_and_made_once():
    """Here without a GPU for Triton, which is what it says."""
    reason = limits.failure("cpu")
    assert reason.startswith("its trial on cpu failed: ") and "Error: " in reason
    assert limits.failure("cpu") is reason


def test_where_a_trial_fails_the_next_backend_serves(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (10, 0))
    monkeypatch.setattr(limits, "failure", asked.append)
    assert select.choose(W4A4).backend is blackwell
    for other in ({"activations": "bf16"}, {"format": WeightFormat.PLAIN}, {"format": None}):
        assert select.choose(W4A4._replace(**other)).backend is not blackwell
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select.choose(W4A4).backend is not blackwell
    monkeypatch.delenv("TRITON_INTERPRET")
    assert asked == ["cuda:2"]
    monkeypatch.setattr(limits, "failure", lambda device: f"its trial on {device} failed: RuntimeError: no")
    assert select.choose(W4A4).backend is not blackwell
    assert "blackwell: its trial on cuda:2 failed: RuntimeError: no" in select.explain(W4A4)
