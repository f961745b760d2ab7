"""What is found in config.json and in quantization files: a sentence for each kind of fault."""

import json
import re
from copy import deepcopy

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from tests.tiny import CONFIG, FP8_SECTION, YARN
from tests.unit.examined import said

WRONG = {
    "bool for a size": ({"hidden_size": True}, "hidden_size is true, expected an integer above 0"),
    "float for a size": ({"hidden_size": 128.0}, "hidden_size is 128.0, expected an integer"),
    "text for a size": ({"hidden_size": "128"}, 'hidden_size is "128", expected an integer'),
    "list for a size": ({"hidden_size": [128]}, r"hidden_size is \[128\], expected an integer"),
    "null for a size": ({"num_hidden_layers": None}, "num_hidden_layers is null"),
    "negative": ({"vocab_size": -1}, "vocab_size is -1"),
    "n_group 0": ({"n_group": 0}, "n_group is 0, expected an integer above 0"),
    "topk_group 0": ({"topk_group": 0}, "topk_group is 0"),
    "moe_layer_freq 0": ({"moe_layer_freq": 0}, "moe_layer_freq is 0, expected an integer above 0"),
    "moe_layer_freq list": ({"moe_layer_freq": [0, 1, 1]}, r"moe_layer_freq is \[0, 1, 1\]"),
    "first_k null": ({"first_k_dense_replace": None}, "first_k_dense_replace is null"),
    "epsilon as text": ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6", expected a number above 0'),
    "flag as text": ({"norm_topk_prob": "true"}, 'norm_topk_prob is "true", expected true or false'),
    "flag as number": ({"rope_interleave": 1}, "rope_interleave is 1, expected true or false"),
    "theta 0": ({"rope_theta": 0}, "rope_theta is 0"),
    "theta infinite": ({"rope_theta": float("inf")}, "rope_theta is Infinity"),
    "scaling NaN": ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is NaN"),
    "MTP true": ({"num_nextn_predict_layers": True}, "num_nextn_predict_layers is true"),
    "MTP under two names": ({"num_mtp_layers": 0}, "num_nextn_predict_layers is 1 and num_mtp_layers 0"),
    "rope_scaling a list": ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object or null"),
    "rope_scaling a text": ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn", expected an object'),
    "rope_parameters a number": ({"rope_parameters": 3}, "rope_parameters is 3, expected an object"),
    "nested by layer": (
        {"rope_scaling": None, "rope_parameters": {"full_attention": YARN}},
        "rope_parameters has a section for each kind of layer",
    ),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2}}, 'type "linear" is not supported, only yarn'),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, 'type "longrope" is not supported'),
    "type a number": ({"rope_scaling": {"type": 3}}, "type 3 is not supported"),
    "no factor": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    "factor as text": ({"rope_scaling": {**YARN, "factor": "40"}}, 'rope_scaling.factor is "40"'),
    "beta negative": ({"rope_scaling": {**YARN, "beta_fast": -1}}, "yarn needs beta_fast and beta_slow above 0"),
    "truncate a number": (
        {"rope_scaling": {**YARN, "truncate": 1}},
        "rope_scaling.truncate is 1, expected true or false",
    ),
    "original length a text": (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": "64"}},
        'rope_scaling.original_max_position_embeddings is "64"',
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    "partial rotary inside": (
        {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}},
        "rope_scaling.partial_rotary_factor=0.5 is not supported",
    ),
    "head_dim": ({"head_dim": 7}, "head_dim is 7, but the other fields make it 16"),
    "qk_head_dim": ({"qk_head_dim": 7}, "qk_head_dim is 7, but the other fields make it 32"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=true is not supported"),
    "attention bias": ({"attention_bias": True}, "attention_bias=true is not supported"),
    "gelu": ({"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported, expected "silu"'),
    "softmax routing": ({"scoring_func": "softmax"}, 'scoring_func="softmax" is not supported'),
    "architectures a text": (
        {"architectures": "DeepseekV3ForCausalLM"},
        "architectures is .* expected a list of names",
    ),
    "architectures of numbers": ({"architectures": [1]}, r"architectures is \[1\]"),
    "model_type a number": ({"model_type": 3}, "model_type is 3, expected a name"),
    "GLM-5": (
        {"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "index_topk": 2048},
        "describes GlmMoeDsaForCausalLM: GLM is another architecture",
    ),
    "V3.2": (
        {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_topk": 2048},
        r"describes DeepseekV32ForCausalLM: DeepSeek V3\.2 and V4 have sparse attention",
    ),
    "sparse attention": ({"index_topk": 2048}, r"sparse attention \(index_topk\)"),
    "a larger model around": (
        {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": "kimi_k25",
            "text_config": {"model_type": "deepseek_v3"},
        },
        r"KimiK25ForConditionalGeneration, a DeepseekV3ForCausalLM \(text_config\) inside a larger model",
    ),
    "nothing": ({"architectures": None, "model_type": None}, "names architecture nothing"),
    "too many experts": ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 exceeds the kept experts"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_config_that_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        DeepseekV3Config.from_dict({**CONFIG, **changes}, "F/config.json")
    assert str(error.value).startswith("F/config.json") and "\n" not in str(error.value)


def test_several_faults_of_a_config_are_all_found():
    config, findings = DeepseekV3Config.examine(
        {**CONFIG, "hidden_size": "1", "n_group": 0, "rope_scaling": [], "attention_bias": True}
    )
    assert config is None and [f.subject for f in findings] == [
        "hidden_size",
        "n_group",
        "attention_bias",
        "rope_scaling",
    ]


def test_missing_fields_are_named():
    config, findings = DeepseekV3Config.examine({"model_type": "deepseek_v3"})
    assert config is None and len(findings) == 12 and "vocab_size is missing" in findings[0].sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qk_norm": True}, "a field that this program does not know and does not use: use_qk_norm"),
        ({"foo": 1, "bar": 2}, "2 fields that this program does not know and does not use: foo, bar"),
        ({"rope_scaling": {**YARN, "mrope_section": [1]}}, "does not use: rope_scaling.mrope_section"),
        ({"rope_scaling": {"type": "default", "factor": 4}}, "does not use: rope_scaling.factor"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not used"),
        ({"rope_parameters": {**YARN, "factor": 2}}, "rope_scaling and rope_parameters differ; rope_scaling is used"),
    ],
)
def test_fields_that_are_not_used_are_named_in_one_line(changes, message):
    config, findings = DeepseekV3Config.examine({**CONFIG, **changes})
    assert config is not None
    (finding,) = findings
    assert finding.severity == "warning" and message in str(finding) and "\n" not in str(finding)


def test_fields_of_published_configs_are_known():
    """Those of R1's config.json and of transformers' own writing that say nothing of the arithmetic."""
    published = {
        "attention_dropout": 0.0, "auto_map": {"AutoConfig": "x.Y"}, "aux_loss_alpha": 0.001, "ep_size": 1,
        "initializer_range": 0.02, "pretraining_tp": 1, "seq_aux": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": True, "pad_token_id": None, "num_key_value_heads": 8,
    }  # fmt: skip
    assert DeepseekV3Config.examine({**CONFIG, **published})[1] == []
    transformers = pytest.importorskip("transformers")
    # A copy, since it writes into what it is given.
    theirs = transformers.DeepseekV3Config.from_dict(deepcopy(CONFIG)).to_dict()
    assert DeepseekV3Config.examine({**theirs, "architectures": ["DeepseekV3ForCausalLM"]})[1] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(CONFIG)[:-1] + ', "hidden_size": 64}', "config.json gives 'hidden_size' twice"),
        ('{"rope_scaling": {"factor": 1, "factor": 2}}', "gives 'factor' twice"),
        ("[1]", "holds a JSON list, expected an object"),
        ("", "is not valid JSON"),
        ("\ufeff{}", "is not valid JSON"),
        ('{"a":' * 100_000, "is nested too deeply"),
    ],
    ids=["twice", "twice inside", "list", "empty", "BOM", "deep"],
)
def test_a_config_file_that_is_none(look, tmp_path, text, message):
    (line,) = said(look(files={"config.json": text}))
    assert message in line and str(tmp_path) in line


def test_a_config_file_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: Is a directory"):
        DeepseekV3Config.from_folder(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        DeepseekV3Config.from_folder(tmp_path)


# ---------------------------------------------------------------- quantization files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"quantization": None}, "quantization is null, expected an object"),
        ({}, "quantization is null, expected an object"),
        ({"quantization": []}, r"quantization is \[\], expected an object"),
        ({"quantization": "NVFP4"}, 'quantization is "NVFP4", expected an object'),
        ({"quantization": {"quant_algo": 4}}, "quantization.quant_algo is 4, expected a name or null"),
        ({"quantization": {"kv_cache_quant_algo": ["FP8"]}}, "quantization.kv_cache_quant_algo is"),
        ({"quantization": {"exclude_modules": "lm_head"}}, "quantization.exclude_modules is .* list of module names"),
        ({"quantization": {"exclude_modules": [1]}}, r"quantization.exclude_modules is \[1\]"),
        ({"quantization": {"exclude_modules": ["re:("]}}, r"a pattern that can be compiled"),
        ("{", "is not valid JSON"),
        ('{"quantization": {}, "quantization": {}}', "gives 'quantization' twice"),
    ],
)
def test_hf_quant_config_that_is_none(look, content, message):
    (line,) = said(look(files={"hf_quant_config.json": content}))
    assert line.startswith("error: ") and "hf_quant_config.json" in line
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("fp8", 'quantization_config is "fp8", expected an object'),
        ([], r"quantization_config is \[\]"),
        (FP8_SECTION | {"kv_cache_scheme": "fp8"}, 'kv_cache_scheme is "fp8", expected an object'),
        (FP8_SECTION | {"ignore": "lm_head"}, "ignore is .* list of module names"),
        (FP8_SECTION | {"quant_method": 8}, "quant_method is 8, expected a name"),
        (FP8_SECTION | {"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\], but .* \[128, 128\]"),
        (FP8_SECTION | {"weight_block_size": [1, 128]}, r"weight_block_size is \[1, 128\]"),
        (FP8_SECTION | {"weight_block_size": None}, "weight_block_size is null"),
        (FP8_SECTION | {"weight_block_size": "128"}, 'weight_block_size is "128"'),
    ],
)
def test_quantization_config_that_is_none(look, section, message):
    (line,) = said(look(quantization_config=section))
    assert line.startswith("error: ") and "config.json: quantization_config" in line
    assert re.search(message, line), line


def test_a_block_size_matters_only_to_fp8_weights(look):
    def plain(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            del tensors[name]
            weight = name.removesuffix("_scale_inv")
            tensors[weight] = tensors[weight].bfloat16()

    assert look(plain, quantization_config=FP8_SECTION | {"weight_block_size": [64, 64]}) == []


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"quant_algo": "NVFP4"},
            "hf_quant_config.json says NVFP4 and config.json fp8; each weight's own tensors decide",
        ),
        ({"kv_cache_quant_algo": "FP8"}, "asks for a cache in FP8 and config.json for the dtype of the model"),
        ({"kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo is INT8, which is not offered here"),
    ],
)
def test_quantization_files_that_disagree(look, own, message):
    lines = said(look(files={"hf_quant_config.json": {"quantization": own}}))
    assert any(line.startswith("warning: ") and message in line for line in lines), lines
