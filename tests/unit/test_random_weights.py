"""`load_format: dummy`: a model of random weights from its configuration files alone."""

import json

import pytest
import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.quant_config import HF_QUANT_CONFIG, WeightFormat, nvfp4_quant_config
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.plan import excluded_modules
from tests.tiny import FP8_SECTION, tiny_config

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published layout, without a shard."""
    path = tmp_path_factory.mktemp("dummy")
    config = tiny_config()
    (path / "config.json").write_text(json.dumps(config))
    excluded = excluded_modules(DeepseekV3Config.from_dict(config), "v1")
    (path / HF_QUANT_CONFIG).write_text(json.dumps(nvfp4_quant_config(excluded, "FP8")))
    return path


def load(folder, mesh: Mesh | None = None) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(folder, mesh=mesh, load_format="dummy")


def test_an_engine_answers_the_same_each_time(folder):
    answers = []
    for drafts in (None, None, {"num_nextn_predict_layers": 2}):
        with LLM(str(folder), load_format="dummy", speculative_config=drafts, max_batch_size=2) as llm:
            answers.append(llm.generate(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True)).outputs[0].token_ids)
            assert llm.model_config.num_nextn_predict_layers == 1
    assert len(set(answers[0])) > 3
    assert answers[0] == answers[1] == answers[2]


def test_formats_are_those_of_the_configuration(folder):
    model = load(folder)
    assert model.quantization.kv_cache_quant_algo == "FP8"
    dense, routed = model.model.layers[0], model.model.layers[1]
    assert dense.mlp.gate_up_proj.weight.format is WeightFormat.NVFP4
    assert routed.mlp.experts.gate_up.format is WeightFormat.NVFP4
    assert routed.self_attn.o_proj.weight.format is WeightFormat.PLAIN
    assert model.mtp.layer.mlp.experts.gate_up.format is WeightFormat.PLAIN


def test_whole_weights_are_the_same_on_every_rank_and_slices_are_not(folder):
    first, second = (load(folder, Mesh(rank, 2, 2)).model for rank in range(2))
    one, other = first.layers[1], second.layers[1]
    assert torch.equal(one.self_attn.kv_a_layernorm.weight, other.self_attn.kv_a_layernorm.weight)
    assert torch.equal(one.mlp.gate.weight.data, other.mlp.gate.weight.data)
    assert torch.equal(one.mlp.gate.weight.bias, other.mlp.gate.weight.bias)
    assert first.embed_tokens.weight.shape == second.embed_tokens.weight.shape
    assert not torch.equal(first.embed_tokens.weight, second.embed_tokens.weight)


def test_a_checkpoint_in_another_format_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(quantization_config=FP8_SECTION)))
    with pytest.raises(CheckpointError, match="says quant_algo fp8; load_format=dummy makes weights in NVFP4"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="quant_algo fp8"):
        LLM(str(tmp_path), load_format="dummy", tensor_parallel_size=2)
    with pytest.raises(CheckpointError):
        LLM(str(tmp_path))  # without weights only dummy can be had
