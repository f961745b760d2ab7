"""The planted faults of tests/planted.py in r1_nano, whose weights are trained."""

from pathlib import Path

import pytest

from deepseek_fp4_plugin.checkpoint.findings import Fault
from deepseek_fp4_plugin.checkpoint.hub import resolve
from deepseek_fp4_plugin.checkup.diagnosis import diagnose
from deepseek_fp4_plugin.checkup.repair import repair
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from tests.end_to_end.test_doctor import next_tokens, right, test_a_planted_fault_is_named_and_mended
from tests.planted import planted

pytestmark = pytest.mark.proof
__all__ = ["right", "test_a_planted_fault_is_named_and_mended"]  # run here with the checkpoints below


@pytest.fixture(scope="module")
def source() -> Path:
    return resolve("r1_nano")


@pytest.fixture(scope="module")
def healthy(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "nvfp4"
    quantize_checkpoint(source, folder, calibration="builtin", samples=16, tokens=128)
    return folder


def test_the_order_of_trained_scales_shows_without_the_source(healthy, right, tmp_path):
    folder = planted("tiled scales", healthy, tmp_path / "planted")
    assert {finding.fault for finding in diagnose(folder).findings} == {Fault.TILED_SCALES}
    repair(diagnose(folder, everything=True), tmp_path / "mended")
    assert diagnose(tmp_path / "mended").findings == ()
    assert next_tokens(tmp_path / "mended", "fp4") == right["fp4"]
