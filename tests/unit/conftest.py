"""A tiny checkpoint, changed and examined."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_fp4_plugin.checkpoint.findings import Finding
from deepseek_fp4_plugin.models.examination import examine
from tests.tiny import CONFIG, FP8_SECTION

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def tensors(tiny_fp8) -> Tensors:
    return {name: t for shard in sorted(tiny_fp8.glob("*.safetensors")) for name, t in load_file(shard).items()}


@pytest.fixture
def look(tensors, tmp_path):
    """Write the tiny checkpoint in one file with changes; what is found in it, the folder's name left out."""

    def examined(
        edit: Callable[[Tensors], Any] = lambda t: None,
        files: dict[str, Any] | None = None,
        **config: Any,
    ) -> list[Finding]:
        changed = dict(tensors)
        edit(changed)
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        content = CONFIG | {"quantization_config": FP8_SECTION} | config
        for name, value in {"config.json": content, **(files or {})}.items():
            (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return list(examine(tmp_path).findings)

    return examined
