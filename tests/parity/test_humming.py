"""humming-kernels loads the checkpoints of every recipe, and multiplies by the values that we do."""

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import WeightTensors
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.recipes import RECIPES
from tests.stops import SETTINGS
from tests.tiny import tiny_config, write_checkpoint
from training.tokenizer import write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MODULES = ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.1.down_proj")
# Sizes are multiples of humming's tiles.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("humming") / "source"
    write_checkpoint(folder, tiny_config(vocab_size=1024, **WIDE))
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_and_multiplies_alike(recipe, source, tmp_path):
    """Within two BF16 roundings in the mean: humming rounds a weight times its scale to BF16, and the result."""
    layers = pytest.importorskip("humming.layer", reason="humming-kernels is not installed")
    quantize_checkpoint(source, tmp_path / "out", **SETTINGS, recipe=recipe)
    reader, device = CheckpointReader(tmp_path / "out"), torch.device("cuda")
    for module in MODULES:
        weight, scale, scale_2 = (
            reader.get(f"{module}.{part}") for part in ("weight", "weight_scale", "weight_scale_2")
        )
        out, width = weight.shape[0], 2 * weight.shape[1]
        config = {"quant_method": "modelopt", "quant_algo": "nvfp4"}
        theirs = layers.HummingLayer(
            shape_n=out, shape_k=width, weight_config=config, torch_dtype=torch.bfloat16
        ).cuda()
        theirs.load_from_tensors(
            {"weight": weight.cuda(), "weight_scale": scale.cuda(), "weight_scale_2": scale_2.cuda().view(1)}
        )
        theirs.transform()
        rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        parts = [WeightTensors(WeightFormat.NVFP4, weight, scale, scale_2)]
        ours = ops.linear(rows, ops.prepare(parts, device, torch.bfloat16)).float()
        exact = ops.linear(rows.float(), ops.prepare(parts, device, torch.bfloat16, backend="reference"))
        assert (ours - exact).norm() / exact.norm() < 2**-9
        assert (theirs(rows).float() - exact).norm() / exact.norm() < 2**-8
