"""The table of kernel backends: complete by check, chosen once, for a reason that can be read."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.engine.worker import _held, _kernels
from deepseek_fp4_plugin.kernels import cpu, cuda, decoded, humming, ops, reference, select
from deepseek_fp4_plugin.kernels.cuda.dense import fp8_blocks
from deepseek_fp4_plugin.kernels.weights import Case, WeightTensors
from deepseek_fp4_plugin.models.loading import resolve_activations
from tests.parity.kernel_cases import TWO_STEPS, error, random_part

CPU, BF16 = torch.device("cpu"), torch.bfloat16
CUDA = torch.device("cuda")  # a choice needs no such device


def without(module, *names: str) -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(module, name) for name in module.__all__ if name not in names})


def test_every_registered_backend_is_complete():
    for entry in select.TABLE:
        assert select.checked(entry.name, entry.backend) is entry.backend


def test_a_missing_operation_is_found_at_registration():
    with pytest.raises(TypeError, match=r"kernel backend 'half' is not complete.*absorb is missing.*route is missing"):
        select.checked("half", without(reference, "route", "absorb"))


def test_other_arguments_are_found_at_registration():
    broken = without(reference)
    broken.rms_norm = lambda x, eps: x
    broken.add = lambda x, y, z: x
    broken.argmax = lambda logits, more=None: logits  # what a caller may leave out does no harm
    with pytest.raises(TypeError, match=r"^kernel backend 'odd' is not complete: rms_norm .*; add does") as caught:
        select.checked("odd", broken)
    assert "argmax" not in str(caught.value)


@pytest.mark.skipif(not cpu.available(), reason="the CPU extension is not built")
def test_choices():
    for weight in WeightFormat:
        assert select.choose(Case(CPU, BF16, weight)).backend is cpu
        assert select.choose(Case(CPU, torch.float32, weight)).backend is decoded
        case = Case(CUDA, BF16, weight)
        served = [backend for backend in (cuda, humming, decoded) if backend is decoded or not backend.refuses(case)]
        assert select.choose(case).backend is served[0]
    assert select.choose(Case(CPU, BF16, WeightFormat.FP8_BLOCK, scale_columns=32)).backend is decoded
    assert select.kernels(CPU, BF16) is select.kernels(CPU) is cpu
    assert select.kernels(CPU, torch.float32) is decoded


def test_fp8_that_a_slice_has_cut_finely_is_kept_decoded_alone():
    """On a GPU the product of both of an expert's weights must be the same backend's, however they are cut."""
    weight = torch.zeros(4096, 2048, dtype=torch.float8_e4m3fn)
    for columns, kept in ((128, True), (64, True), (32, False)):
        scale = torch.ones(4096 // 128, 2048 // columns)
        part = WeightTensors(WeightFormat.FP8_BLOCK, weight, scale, fp8_block=(128, columns))
        assert (fp8_blocks([part]) is not None) is kept
        fine = Case(CUDA, BF16, WeightFormat.FP8_BLOCK, scale_columns=columns)
        assert select.choose(fine).backend is select.choose(Case(CUDA, BF16, WeightFormat.FP8_BLOCK)).backend


def test_the_reason_is_told(monkeypatch):
    assert select.explain(Case(CPU, torch.float32)).startswith("decoded (decoded once at load")
    assert "cpu: its activations are BF16" in select.explain(Case(CPU, torch.float32))
    monkeypatch.setattr("deepseek_fp4_plugin.kernels.cpu.limits.available", lambda: False)
    assert "cpu: it was not built; reinstall" in select.explain(Case(CPU, BF16))


def test_8_bit_activations_are_for_cpus():
    assert resolve_activations("int8", CPU) == "int8"
    with pytest.raises(ValueError, match=r"^nvfp4_activations=int8 is for CPUs; on cuda:0 use bf16, fp4 or fp8$"):
        resolve_activations("int8", torch.device("cuda:0"))
    with pytest.raises(ValueError, match="is not one of auto, bf16, fp4, fp8, int8"):
        resolve_activations("int4", CPU)


def test_fp8_activations_are_for_hopper(monkeypatch):
    with pytest.raises(ValueError, match=r"fp8 is for Hopper GPUs, use bf16 or fp4 \(cpu: it is for NVIDIA GPUs\)$"):
        resolve_activations("fp8", CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("deepseek_fp4_plugin.kernels.cuda.limits.available", lambda: True)
    for capability in ((9, 0), (8, 9), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device, own=capability: own)
        if capability == (9, 0):
            assert resolve_activations("fp8", CUDA) == "fp8"
            continue
        with pytest.raises(ValueError, match="is for Hopper GPUs"):
            resolve_activations("fp8", CUDA)
    assert "cpu: it has no FP8 activations" in select.explain(Case(CPU, BF16, WeightFormat.NVFP4, "fp8"))


def test_names():
    assert select.named("reference").backend is reference
    with pytest.raises(ValueError, match=r"unknown kernel backend 'gpu'; .* cpu, .*humming, decoded, reference$"):
        select.named("gpu")
    if not humming.available():
        with pytest.raises(ValueError, match=r"^kernel backend 'humming' cannot run here: .*plugin\[humming\]$"):
            select.named("humming")


def test_what_serves_is_told_with_its_reason():
    """Counted by kind; by name where somebody asked for it, not where a slice's blocks are too narrow for the first."""
    part = random_part(WeightFormat.NVFP4, 16, 32)
    narrow = WeightTensors(WeightFormat.FP8_BLOCK, torch.zeros(32, 32).to(torch.float8_e4m3fn), torch.ones(1, 1))
    narrow = replace(narrow, fp8_block=(32, 32))
    first, asked = ops.prepare([part], CPU, BF16), ops.prepare([part], CPU, BF16, backend="reference")
    rounded = ops.prepare([part], CPU, BF16, "int8")
    held = list(_held([first, {"again": first}, rounded, asked, ops.prepare([narrow], CPU, BF16)]))
    lines = _kernels(held, CPU)
    assert lines[0] == "1 NVFP4 weights: cpu (native kernels on the checkpoint's bytes)"
    assert lines[1].startswith("1 NVFP4 weights by int8 activations: cpu (")
    assert lines[2] == "1 NVFP4 weights: reference (it was asked for)"
    assert lines[3].startswith("1 FP8_BLOCK weights: decoded (decoded once") and "64 columns" in lines[3]
    assert lines[4].startswith("attention, norms, routing: cpu (") and len(lines) == 5


def test_an_import_brings_no_compiler():
    """torch's takes seconds, and prints at the end what it has leaked."""
    heavy = "torch._dynamo", "torch._inductor", "triton"
    program = f"import deepseek_fp4_plugin.engine.worker, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_decoded_rounds_to_fp8_as_the_reference_does():
    parts = [random_part(WeightFormat.NVFP4, out, 272) for out in (24, 40)]
    ours, law = (ops.prepare(parts, CPU, BF16, "fp8", backend=name) for name in ("decoded", "reference"))
    x = torch.randn(9, 272).to(BF16)
    assert error(ops.linear(x, ours), ops.linear(x, law)) <= TWO_STEPS
