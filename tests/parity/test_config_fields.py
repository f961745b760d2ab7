"""Every config field that changes the arithmetic: our logits against transformers', FP32, same weights."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.config_reading import FIELDS, MTP_FIELDS
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.tiny import YARN, tiny_config, write_checkpoint

transformers = pytest.importorskip("transformers", reason="the reference model is not installed")
ABSENT = object()


def yarn(**changes: Any) -> dict[str, Any]:
    merged = {**YARN, **changes}
    return {name: value for name, value in merged.items() if value is not ABSENT}


def newer(**changes: Any) -> dict[str, Any]:
    """`rope_parameters`, as transformers 5 writes it."""
    section = {**yarn(type=ABSENT, rope_type="yarn", rope_theta=10000.0), **changes}
    return {
        "rope_scaling": ABSENT,
        "rope_parameters": {name: value for name, value in section.items() if value is not ABSENT},
    }


CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "rope_interleave false": {"rope_interleave": False},
    "rope_interleave null": {"rope_interleave": None},
    "rope_interleave false, no yarn": {"rope_interleave": False, "rope_scaling": None},
    "attention_factor": {"rope_scaling": yarn(attention_factor=1.5)},
    "attention_factor with mscale": {"rope_scaling": yarn(attention_factor=0.5, mscale=0.7)},
    "attention_factor null": {"rope_scaling": yarn(attention_factor=None)},
    "truncate false": {"rope_scaling": yarn(truncate=False)},
    "truncate null": {"rope_scaling": yarn(truncate=None)},
    "truncate false, narrow": {"rope_scaling": yarn(truncate=False, beta_fast=1.0001, beta_slow=1)},
    "no mscale": {"rope_scaling": yarn(mscale=ABSENT)},
    "no mscale_all_dim": {"rope_scaling": yarn(mscale_all_dim=ABSENT, mscale=0.7)},
    "mscale_all_dim 0": {"rope_scaling": yarn(mscale_all_dim=0, mscale=0.7)},
    "mscale 0": {"rope_scaling": yarn(mscale=0)},
    "neither mscale": {"rope_scaling": yarn(mscale=ABSENT, mscale_all_dim=ABSENT)},
    "mscales differ": {"rope_scaling": yarn(mscale=0.7, mscale_all_dim=0.4, factor=4)},
    "factor below 1": {"rope_scaling": yarn(factor=0.5)},
    "beta_fast null": {"rope_scaling": yarn(beta_fast=None)},
    "beta_slow 0": {"rope_scaling": yarn(beta_slow=0)},
    "betas": {"rope_scaling": yarn(beta_fast=8, beta_slow=0.25)},
    "betas the wrong way": {"rope_scaling": yarn(beta_fast=1, beta_slow=4)},
    "no original length": {"rope_scaling": yarn(original_max_position_embeddings=ABSENT)},
    "original length outside": {"original_max_position_embeddings": 128},
    "newer form": newer(),
    "newer form without original length": newer(original_max_position_embeddings=ABSENT),
    "newer form, theta inside goes before": newer(rope_theta=500.0) | {"rope_theta": 20000.0},
    "newer form, theta outside": newer(rope_theta=ABSENT) | {"rope_theta": 500.0},
    "newer form, default": {"rope_scaling": ABSENT, "rope_parameters": {"rope_type": "default", "rope_theta": 700}},
    "both forms": newer(factor=2) | {"rope_scaling": yarn(factor=9)},
    "rope_type goes before type": {"rope_scaling": yarn(rope_type="default")},
    "no theta": {"rope_theta": ABSENT},
    "partial_rotary_factor 1": {"partial_rotary_factor": 1.0},
    "norm_topk_prob false": {"norm_topk_prob": False},
    "norm_topk_prob null": {"norm_topk_prob": None},
    "large epsilon": {"rms_norm_eps": 0.05},
    "defaults": dict.fromkeys(("n_group", "topk_group", "routed_scaling_factor", "rms_norm_eps"), ABSENT),
    "swish": {"hidden_act": "swish"},
    "num_local_experts": {"n_routed_experts": ABSENT, "num_local_experts": 16},
    "head dims as transformers writes them": {"head_dim": 16, "qk_head_dim": 32},
}


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("fields") / "bf16", tiny_config(num_nextn_predict_layers=0), fp8=False
    )


@pytest.fixture
def with_config(weights_folder, tmp_path):
    def make(changes: dict[str, Any]) -> Path:
        for path in weights_folder.iterdir():
            if path.name != "config.json":
                (tmp_path / path.name).symlink_to(path)
        config = {**json.loads((weights_folder / "config.json").read_text()), **changes}
        config = {name: value for name, value in config.items() if value is not ABSENT}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def our_logits(folder: Path, sequence: list[int]) -> torch.Tensor:
    ours = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.inference_mode():
        return ours.compute_logits(ours(ForwardBatch.from_sequences([sequence])))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_equal_transformers(with_config, changes):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = with_config(changes)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    sequence = torch.randint(0, 320, (150,)).tolist()  # beyond the original 64
    with torch.inference_mode():
        expected = theirs(torch.tensor([sequence])).logits[0].float()
    assert (our_logits(folder, sequence) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["rope_interleave false", "attention_factor", "truncate false", "large epsilon"])
def test_the_field_matters(with_config, weights_folder, name):
    """Or the comparison above would prove nothing."""
    sequence = torch.randint(0, 320, (150,)).tolist()
    difference = our_logits(with_config(CASES[name]), sequence) - our_logits(weights_folder, sequence)
    assert difference.abs().max() > 1e-2


def test_an_absent_field_has_transformers_default():
    theirs = transformers.DeepseekV3Config()
    required = {name for name, field in FIELDS.items() if not isinstance(field.absent, int | float)}
    for name, field in FIELDS.items():
        if name not in required and name != "moe_layer_freq":  # DeepSeek's own, which transformers does not have
            assert getattr(theirs, "num_mtp_layers" if name in MTP_FIELDS else name) == field.absent, name
    assert len(required) == 12


def test_short_queries_turn_like_prompts_when_pairs_lie_apart(with_config):
    """The absorbed form, over a cache, with `rope_interleave` false."""
    folder = with_config({"rope_interleave": False})
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    sequence = torch.randint(0, 320, (9,))
    with torch.inference_mode():
        expected = model(ForwardBatch.from_sequences([sequence.tolist()]))
        cache = torch.full((4, 2, 8, model.config.latent_dim), float("nan"))
        table, got = torch.tensor([[1, 0]]), []
        for position in range(9):
            positions = torch.tensor([position])
            batch = ForwardBatch(
                input_ids=sequence[positions],
                positions=positions,
                slot_mapping=table[0, positions // 8] * 8 + positions % 8,
                block_tables=table,
                context_lens=positions + 1,
                query_start=torch.tensor([0, 1]),
                num_decode_requests=1,
                num_decode_tokens=1,
                max_query=1,
                max_context=position + 1,
            )
            got.append(model(batch, cache))
    assert (torch.cat(got) - expected).abs().max() < 1e-4
