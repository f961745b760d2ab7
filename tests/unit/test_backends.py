"""The table of kernel backends: complete by check, chosen once, for a reason that can be read."""

from types import SimpleNamespace

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cpu, cuda, decoded, humming, reference, select
from deepseek_fp4_plugin.kernels.cuda.dense import fp8_blocks
from deepseek_fp4_plugin.kernels.weights import Case, WeightTensors
from deepseek_fp4_plugin.models.loading import resolve_activations

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
    with pytest.raises(ValueError, match=r"^nvfp4_activations=int8 is for CPUs; on cuda:0 use bf16 or fp4$"):
        resolve_activations("int8", torch.device("cuda:0"))
    with pytest.raises(ValueError, match="is not one of auto, bf16, fp4, fp8, int8"):
        resolve_activations("int4", CPU)


def test_fp8_activations_are_for_hopper(monkeypatch):
    with pytest.raises(ValueError, match=r"^nvfp4_activations=fp8 is for Hopper GPUs \(.*9\.0\), not for cpu$"):
        resolve_activations("fp8", CPU)
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
