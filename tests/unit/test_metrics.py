"""Metrics without a server: drafts by position, and vLLM's names only where they are asked for."""

from deepseek_fp4_plugin.engine.request import SpeculationCounts
from deepseek_fp4_plugin.llm import EngineStats
from deepseek_fp4_plugin.serving.metrics import Metrics

STATS = EngineStats(thinking=SpeculationCounts({(3, 2): 5, (3, 0): 1}), answer=SpeculationCounts({(2, 2): 2}))


def test_drafts_are_counted_by_position():
    text = Metrics(lambda: STATS, "m").exposition().decode()
    line = 'deepseek_fp4_{}_tokens_total{{model_name="m",phase="{}",position="{}"}} {}'
    for name, phase, position, value in (
        ("drafted", "thinking", 0, 6.0), ("drafted", "thinking", 2, 6.0), ("drafted", "answer", 1, 2.0),
        ("accepted", "thinking", 1, 5.0), ("accepted", "thinking", 2, 0.0), ("accepted", "answer", 1, 2.0),
    ):  # fmt: skip
        assert line.format(name, phase, position, value) in text
    assert "vllm:" not in text


def test_vllm_sums_drafts_over_phases():
    text = Metrics(lambda: STATS, 'a "name"', vllm_names=True).exposition().decode()
    labels = r'engine="0",model_name="a \"name\""'
    for line in (
        f"vllm:spec_decode_num_drafts_total{{{labels}}} 8.0",
        f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} 22.0",
        f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} 14.0",
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="1"}} 7.0',
    ):
        assert line in text


def test_vllm_has_three_reasons_and_abort():
    metrics = Metrics(EngineStats, "m", vllm_names=True)
    for reason in ("stop", "length", "cancelled", "timeout", "unfinished", "error"):
        metrics.finished.labels(reason).inc()
    text = metrics.exposition().decode()
    for reason, count in (("stop", 1.0), ("length", 1.0), ("abort", 3.0), ("error", 1.0)):
        assert f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="m"}} {count}' in text
