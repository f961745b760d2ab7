"""The MTP module against the one that transformers' generate(use_mtp=True) runs, FP32, same weights."""

import logging

import pytest
import torch

from deepseek_fp4_plugin.layers.batch import Chunk, ForwardBatch, grouped
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.engine_core import make_engine, make_request, run_all
from tests.tiny import write_checkpoint


@torch.inference_mode()
def mtp_logits(model: DeepseekV3ForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Row t: logits for token t + 2, from token t's hidden state and token t + 1."""
    whole = ForwardBatch.from_sequences([tokens])
    hidden = model(whole)[:-1]
    count = len(tokens) - 1
    groups = grouped([Chunk(0, 0, count, count)], whole.positions.device)
    batch = ForwardBatch(whole.input_ids[1:], whole.positions[:-1], groups=groups)
    cos, sin = model.model.rotary(batch.positions)
    return model.compute_logits(model.mtp(model.model.embed_tokens(batch.input_ids), hidden, cos, sin, batch, None))


def test_drafts_equal_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="the reference model is not installed")
    from transformers.modeling_layers import MtpModel

    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = write_checkpoint(tmp_path / "bf16", fp8=False)
    reference = transformers.DeepseekV3ForCausalLM
    # transformers finds MTP weights through this pattern, which is written for R1's 61 layers.
    monkeypatch.setattr(reference, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])
    theirs = reference.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    recorded: list[tuple[int, torch.Tensor]] = []
    forward = MtpModel.forward

    def record(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        recorded.append((kwargs["full_input_ids"].shape[1], result[1][0, 0].float()))
        return result

    monkeypatch.setattr(MtpModel, "forward", record)
    prompt = torch.randint(0, 320, (1, 9))
    with torch.inference_mode():
        output = theirs.generate(prompt, use_mtp=True, do_sample=False, max_new_tokens=16, pad_token_id=1)[0].tolist()

    ours = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    engine = make_engine(ours, drafts=1)
    assert run_all(engine, [make_request(0, prompt[0].tolist(), 16)])[0] == output[9:]
    logits = mtp_logits(ours, output)
    assert len(recorded) > 10
    for length, expected in recorded:
        assert (logits[length - 2] - expected).abs().max() < 1e-4
