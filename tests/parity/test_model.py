"""The whole model against transformers' DeepseekV3ForCausalLM, FP32, same weights; and our own equalities."""

import logging

import pytest
import torch

from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.parallel.mesh import Mesh
from tests.tiny import YARN, tiny_config, write_checkpoint

CONFIGS = {
    "published": {},
    "no yarn": {"rope_scaling": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "no query compression": {"q_lora_rank": None},
    "mscale differs from mscale_all_dim": {"rope_scaling": {**YARN, "mscale": 0.7, "factor": 4}},
    "all dense but one": {"first_k_dense_replace": 2, "n_shared_experts": 2},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_transformers(tmp_path, changes):
    transformers = pytest.importorskip("transformers", reason="the reference model is not installed")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = write_checkpoint(tmp_path / "bf16", tiny_config(**changes, num_nextn_predict_layers=0), fp8=False)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    sequences = [torch.randint(0, 320, (n,)).tolist() for n in (5, 150, 1, 33)]  # 150 is beyond the original 64
    with torch.inference_mode():
        batch = ForwardBatch.from_sequences(sequences)
        logits = ours.compute_logits(ours(batch)).split([len(s) for s in sequences])
        for sequence, mine in zip(sequences, logits, strict=True):
            expected = theirs(torch.tensor([sequence])).logits[0].float()
            assert (mine - expected).abs().max() < 1e-4


def test_absorbed_equals_expanded(tiny_fp8):
    """The same tokens once as a prompt (expanded) and once as short queries over a paged cache (absorbed)."""
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")
    sequence = torch.randint(0, 320, (21,)).tolist()
    with torch.inference_mode():
        expected = model(ForwardBatch.from_sequences([sequence]))
        cache = torch.full((4, 6, 8, model.config.latent_dim), float("nan"))  # unread memory is poisoned
        table = torch.tensor([[5, 0, 3]])
        got = []
        for start in range(0, 21, 3):
            positions = torch.arange(start, start + 3)
            batch = ForwardBatch(
                input_ids=torch.tensor(sequence[start : start + 3]),
                positions=positions,
                slot_mapping=table[0, positions // 8] * 8 + positions % 8,
                block_tables=table,
                context_lens=torch.tensor([start + 3]),
                query_start=torch.tensor([0, 3]),
                num_decode_requests=1,
                num_decode_tokens=3,
                max_query=3,
                max_context=start + 3,
            )
            got.append(model(batch, cache))
    assert (torch.cat(got) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "moe_expert_parallel_size": 2, "enable_attention_dp": True},
        {"tensor_parallel_size": 4, "moe_expert_parallel_size": 2},
        {"tensor_parallel_size": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_partial_outputs_of_all_ranks_sum_to_the_whole(tmp_path, tiny_fp8, sizes, fp8):
    """Every rank's slice of attention, dense MLP and experts, summed here; that the model sums them itself, and once,
    is tests/parity/test_parallel_model.py's affair."""
    folder = tiny_fp8 if fp8 else write_checkpoint(tmp_path / "bf16", fp8=False)
    whole = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    ranks = [
        DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32", mesh=Mesh(rank, **sizes))
        for rank in range(sizes["tensor_parallel_size"])
    ]
    attention_ranks = ranks[: ranks[0].mesh.tp.count]
    batch = ForwardBatch.from_sequences([torch.randint(0, 320, (9,)).tolist()])
    cos, sin = whole.model.rotary(batch.positions)
    x = torch.randn(9, 128)
    with torch.inference_mode():
        for index, layer in enumerate(whole.model.layers):
            partial = [r.model.layers[index].self_attn(x, cos, sin, batch, None) for r in attention_ranks]
            assert _close(sum(partial), layer.self_attn(x, cos, sin, batch, None))
            if hasattr(layer.mlp, "experts"):
                ids, weights = layer.mlp.gate(x)
                routed = [r.model.layers[index].mlp.experts(x, ids, weights) for r in ranks]
                assert _close(sum(routed), layer.mlp.experts(x, ids, weights))
                shared = [r.model.layers[index].mlp.shared_experts(x) for r in attention_ranks]
                assert _close(sum(shared), layer.mlp.shared_experts(x))
            else:
                assert _close(sum(r.model.layers[index].mlp(x) for r in attention_ranks), layer.mlp(x))
        rows = [r.model.embed_tokens.weight for r in attention_ranks]
        assert torch.equal(torch.cat(rows), whole.model.embed_tokens.weight)
        assert torch.equal(torch.cat([r.lm_head.weight for r in attention_ranks]), whole.lm_head.weight)


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())
