"""The load of experts: counted while serving, shown, written to a file, and answered with redundant experts."""

import pytest

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.llm import EngineStats
from deepseek_fp4_plugin.parallel.placement import write_load
from deepseek_fp4_plugin.serving.metrics import Metrics

PROMPTS = [[5, 6, 7, 8, 9], [100, 200, 300], list(range(20, 60))]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False)
SETTINGS = {"dtype": "float32", "max_batch_size": 4, "max_seq_len": 200}


@pytest.fixture(scope="module")
def counted(tiny_with_tokenizer):
    """Outputs and load of one rank."""
    with LLM(tiny_with_tokenizer, moe_config={"count_load": True}, **SETTINGS) as llm:
        outputs = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
        return outputs, llm.get_stats()


def test_every_token_chooses_its_experts_once(counted):
    _, stats = counted
    chosen = stats.computed_tokens * 4  # experts a token
    assert {layer: sum(load) for layer, load in stats.expert_load.items()} == {1: chosen, 2: chosen, 3: 0}  # no drafts


def test_nothing_is_counted_unless_asked_for(tiny_with_tokenizer):
    with LLM(tiny_with_tokenizer, **SETTINGS) as llm:
        llm.generate(PROMPTS[0], PARAMS)
        assert llm.get_stats().expert_load == {}
    assert b"expert_tokens" not in Metrics(EngineStats).exposition()


def test_metrics_show_the_load():
    text = Metrics(lambda: EngineStats(expert_load={3: [7, 0]})).exposition().decode()
    assert 'deepseek_fp4_expert_tokens_total{expert="0",layer="3"} 7.0' in text
    assert 'deepseek_fp4_expert_tokens_total{expert="1",layer="3"} 0.0' in text


@pytest.mark.proof
@pytest.mark.parametrize("enable_attention_dp", [False, True])
def test_two_ranks_with_redundant_experts_give_what_one_gives(
    tiny_with_tokenizer, tmp_path, counted, enable_attention_dp
):
    outputs, stats = counted
    write_load(tmp_path / "load.json", stats.expert_load)
    balancer = {"load_file": str(tmp_path / "load.json"), "num_slots": 20}
    with LLM(
        tiny_with_tokenizer,
        tp_size=2,
        ep_size=2,
        enable_attention_dp=enable_attention_dp,
        moe_config={"count_load": True, "load_balancer": balancer},
        **SETTINGS,
    ) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)] == outputs
        assert llm.get_stats().expert_load == stats.expert_load
