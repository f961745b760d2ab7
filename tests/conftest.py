"""Seeds for every test, and checkpoints made once a session."""

import signal
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_config, write_checkpoint
from training.tokenizer import write_tokenizer

# A runner started in a shell's background ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_fp8(tmp_path_factory) -> Path:
    """The tiny model as an FP8 checkpoint of several shards; read-only."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "fp8")


@pytest.fixture(scope="session")
def tiny_with_tokenizer(tmp_path_factory) -> Path:
    """The same with r1_nano's vocabulary and tokenizer; read-only."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "text", tiny_config(vocab_size=1024))
    write_tokenizer(folder)
    return folder
