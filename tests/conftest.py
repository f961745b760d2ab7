"""Seeds for every test, and checkpoints made once a session."""

import importlib.util
import shutil
import signal
from pathlib import Path

import pytest
import torch

from benchmarks.random_checkpoint import write_checkpoint as write_random
from deepseek_fp4_plugin.kernels import cpu
from tests.tiny import CONFIG, tiny_config, write_checkpoint
from training.tokenizer import write_tokenizer

# A runner started in a shell's background ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--native",
        choices=("required", "optional"),
        default="required",
        help="optional: test the rest where the C++ kernels cannot be built",
    )


def pytest_sessionstart(session):
    if session.config.getoption("--native") == "required" and not cpu.available():
        raise pytest.UsageError(
            "the native kernels are not built, so their tests would be skipped: install with a C++ compiler "
            "(pip install -v -e . -C wheel.cmake=true says what fails), or choose to do without: --native optional"
        )


@pytest.fixture(scope="session")
def compiler(pytestconfig) -> str:
    """Path of g++ on a machine that has what builds the extension."""
    found = shutil.which("g++")
    if found and shutil.which("cmake") and importlib.util.find_spec("nanobind"):
        return found
    if pytestconfig.getoption("--native") == "optional":
        pytest.skip("needs g++, cmake and nanobind")
    pytest.fail("needs g++, cmake and nanobind; --native optional skips this")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_fp8(tmp_path_factory) -> Path:
    """The tiny model as an FP8 checkpoint of several shards; read-only."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "fp8")


@pytest.fixture(scope="session")
def tiny_nvfp4(tmp_path_factory) -> Path:
    """A model of the same shape, every linear in NVFP4; read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "nvfp4"
    write_random(folder, CONFIG, quantized=True)
    return folder


@pytest.fixture(scope="session")
def tiny_with_tokenizer(tmp_path_factory) -> Path:
    """The same with r1_nano's vocabulary and tokenizer; read-only."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "text", tiny_config(vocab_size=1024))
    write_tokenizer(folder)
    return folder
