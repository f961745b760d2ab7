"""Seeds for every test, and checkpoints made once a session."""

from pathlib import Path

import pytest
import torch

from tests.tiny import write_checkpoint


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_fp8(tmp_path_factory) -> Path:
    """The tiny model as an FP8 checkpoint of several shards; read-only."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "fp8")
