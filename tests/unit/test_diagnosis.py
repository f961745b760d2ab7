"""Logits that are not finite: the request fails with the module and the weight named, the others go on."""

import shutil
from pathlib import Path

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.engine.step_plan import Sampling
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.engine_core import make_engine, make_request, run_all

NAN, INF = float("nan"), float("inf")
VICTIM = 77  # the token whose embedding is damaged in the tests of company


def damage(source: Path, folder: Path, name: str, index: tuple[int, ...], value: float) -> Path:
    """A copy of the checkpoint with one element of one tensor overwritten in its shard."""
    shutil.copytree(source, folder)
    reader = CheckpointReader(folder)
    info = reader.info(name)
    reader.close()
    flat = 0
    for i, size in zip(index, info.shape, strict=True):
        flat = flat * size + i
    with (folder / info.shard).open("r+b") as file:
        file.seek(info.offset + flat * info.dtype.itemsize)
        file.write(torch.tensor([value]).to(info.dtype).view(torch.uint8).numpy().tobytes())
    return folder


def failures(model: DeepseekV3ForCausalLM, prompt: list[int], drafts: int = 0, sampling: Sampling | None = None):
    """What the engine says of one request."""
    engine = make_engine(model, drafts=drafts)
    engine.add(make_request(0, prompt, sampling=sampling))
    found = []
    while engine.has_work:
        found += [emission for emission in engine.step() if emission.finish_reason is not None]
    return found


@pytest.mark.parametrize(
    ("name", "index", "value", "module"),
    [
        ("model.norm.weight", (5,), NAN, "model.norm"),
        ("lm_head.weight", (300, 7), NAN, "lm_head"),
        ("lm_head.weight", (0, 0), INF, "lm_head"),
        ("model.layers.0.mlp.up_proj.weight", (3, 4), NAN, "model.layers.0.mlp"),
        ("model.layers.0.self_attn.q_b_proj.weight_scale_inv", (0, 0), INF, "model.layers.0.self_attn"),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", (2, 3), NAN, "model.layers.1.mlp"),
        ("model.layers.2.self_attn.kv_a_layernorm.weight", (1,), NAN, "model.layers.2.self_attn"),
        ("model.layers.2.post_attention_layernorm.weight", (0,), INF, "model.layers.2.post_attention_layernorm"),
    ],
)
def test_the_module_and_the_weight_are_named(tiny_fp8, tmp_path, name, index, value, module):
    model = DeepseekV3ForCausalLM.from_pretrained(
        damage(tiny_fp8, tmp_path / "model", name, index, value), dtype="float32"
    )
    (emission,) = failures(model, [5, 9, 200, 31])
    assert emission.finish_reason == "error"
    assert emission.tokens == []
    said = str(emission.failure)
    assert f"{module} is the first module" in said
    assert f"because {name} has {value:g} at {list(index)}" in said
    assert "\n" not in said


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(greedy=False, temperature=0.7, top_k=9, seed=3)])
def test_the_others_in_the_batch_go_on(tiny_fp8, tmp_path, drafts, sampling):
    prompts = {0: [5, 9, 200], 1: [5, VICTIM, 9], 2: [11, 12, 13, 14]}
    folder = damage(tiny_fp8, tmp_path / "model", "model.embed_tokens.weight", (VICTIM, 100), NAN)
    whole, model = (
        DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32"),
        DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32"),
    )
    expected = run_all(
        make_engine(whole, drafts=drafts), [make_request(i, prompts[i], sampling=sampling) for i in (0, 2)]
    )
    assert not any(VICTIM in tokens for tokens in expected.values())
    engine = make_engine(model, drafts=drafts)
    requests = [make_request(i, prompt, sampling=sampling) for i, prompt in prompts.items()]
    outputs = run_all(engine, requests)
    assert outputs[1] == []
    assert requests[1].finish_reason == "error"
    assert {i: outputs[i] for i in (0, 2)} == expected
    assert engine.stats().finished == {"error": 1, "length": 2}


def test_prompt_logprobs_are_checked_too(tiny_fp8, tmp_path):
    # A damaged row of the head: the logits of every position are broken, a prompt chunk's that is not sampled as well.
    model = DeepseekV3ForCausalLM.from_pretrained(
        damage(tiny_fp8, tmp_path / "model", "lm_head.weight", (9, 9), NAN), dtype="float32"
    )
    engine = make_engine(model, tokens=4)
    engine.add(make_request(0, list(range(2, 12)), sampling=Sampling(prompt_logprobs=1)))
    (emission,) = engine.step()
    assert (emission.finish_reason, emission.prompt_logprobs) == ("error", None)


def test_what_is_not_finite_is_not_found_as_a_prefix(tiny_fp8):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")
    engine = make_engine(model)
    prompt = list(range(2, 42))
    with torch.inference_mode():
        weight = model.model.layers[0].input_layernorm.weight
        kept = weight[0].item()
        weight[0] = NAN
        requests = [make_request(0, prompt), make_request(1, prompt)]
        assert run_all(engine, requests[:1]) == {0: []}
        assert requests[0].finish_reason == "error"
        weight[0] = kept
    assert len(run_all(engine, requests[1:])[1]) == 16
    assert requests[1].num_cached == 0


def test_a_broken_mtp_module_only_costs_acceptance(tiny_fp8, tmp_path):
    folder = damage(tiny_fp8, tmp_path / "model", "model.layers.3.eh_proj.weight", (0, 0), NAN)
    prompts = [[5, 9, 200], [11, 12, 13, 14]]
    expected = run_all(
        make_engine(DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")),
        [make_request(i, prompt) for i, prompt in enumerate(prompts)],
    )
    engine = make_engine(DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32"), drafts=3)
    assert run_all(engine, [make_request(i, prompt) for i, prompt in enumerate(prompts)]) == expected


def test_a_row_with_every_token_forbidden_is_told_apart(tiny_fp8):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")
    banned = tuple((token,) for token in range(320))
    engine = make_engine(model)
    requests = [make_request(0, [5, 9], bad_words=banned), make_request(1, [5, 9])]
    outputs = run_all(engine, requests)
    assert (outputs[0], requests[0].finish_reason) == ([], "error")
    assert len(outputs[1]) == 16


def test_weights_that_are_finite_on_disk_are_not_accused(tiny_fp8):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")
    with torch.inference_mode():
        model.model.norm.weight[3] = INF
    (emission,) = failures(model, [5, 9])
    assert "model.norm is the first module" in str(emission.failure)
    assert "in the checkpoint are finite" in str(emission.failure)
    model.path = None
    (emission,) = failures(model, [5, 9])
    assert "came from no checkpoint" in str(emission.failure)
