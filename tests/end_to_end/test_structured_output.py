"""Structured output and speculation: the same text with drafts as without, never a token that the grammar forbids."""

import json

import pytest

from deepseek_fp4_plugin.config import GuidedDecodingParams, SamplingParams
from deepseek_fp4_plugin.llm import LLM
from tests.end_to_end.server_process import R1_NANO

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "unit": {"enum": ["apples", "cards"]}},
    "required": ["answer", "unit"],
    "additionalProperties": False,
}
QUESTIONS = ["What is 607 + 68?", "Max has 97 apples. Max gives 2 to Tom and 31 to a friend. How many apples are left?"]
RELAXED = {"use_relaxed_acceptance_for_thinking": True, "relaxed_topk": 10, "relaxed_delta": 0.6}


def answers(params: SamplingParams, thinking: bool, **config) -> list[str]:
    with LLM(model=R1_NANO, max_batch_size=4, max_seq_len=1024, **config) as llm:
        assert llm.tokenizer is not None
        prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
        if not thinking:
            prompts = [[*prompt, *llm.tokenizer.encode("<think>\n</think>")] for prompt in prompts]
        return [output.outputs[0].text for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("thinking", [True, False])
def test_drafts_change_nothing(thinking):
    params = SamplingParams(max_tokens=400, temperature=0, guided_decoding=GuidedDecodingParams(json=SCHEMA))
    plain = answers(params, thinking)
    drafted = answers(params, thinking, speculative_config={"num_nextn_predict_layers": 3})
    assert drafted == plain
    for text in plain:
        assert ("</think>" in text) == thinking
        assert set(json.loads(text.rpartition("</think>")[2])) == {"answer", "unit"}


def test_relaxed_acceptance_stops_where_the_grammar_begins():
    params = SamplingParams(max_tokens=400, temperature=1.0, seed=5, guided_decoding=GuidedDecodingParams(json=SCHEMA))
    config = {
        "speculative_config": {"num_nextn_predict_layers": 3, **RELAXED, "relaxed_topk": 832, "relaxed_delta": 1.0}
    }
    for text in answers(params, True, **config):
        head, tag, tail = text.partition("</think>")
        if tag:  # with everything accepted the thinking may ramble to the limit
            assert set(json.loads(tail)) == {"answer", "unit"}
        else:
            assert len(head) > 300
