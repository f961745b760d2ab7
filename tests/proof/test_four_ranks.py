"""Four ranks give what one gives: seeds, grammars, stop strings, priorities, aborts, deadlines, logprobs.

FP32 on r1_nano. A greedy token may differ where the two best lie within 1e-3; such are counted.
"""

import json

import pytest

from deepseek_fp4_plugin import LLM, GuidedDecodingParams, SamplingParams
from deepseek_fp4_plugin.assets.held_out import load_held_out

pytestmark = pytest.mark.proof
TIE = 1e-3
SETTINGS = dict(
    dtype="float32",
    max_batch_size=8,
    max_seq_len=512,
    speculative_config={"decoding_type": "MTP", "num_nextn_predict_layers": 2},
)
MAPPINGS = {
    "TP4/EP2": dict(tensor_parallel_size=4, moe_expert_parallel_size=2),
    "DP4/EP4": dict(tensor_parallel_size=4, moe_expert_parallel_size=4, enable_attention_dp=True),
}


@pytest.fixture(scope="module")
def one():
    with LLM("r1_nano", **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module", params=list(MAPPINGS))
def four(request):
    with LLM("r1_nano", **SETTINGS, **MAPPINGS[request.param]) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(one) -> list[list[int]]:
    problems = load_held_out()[:12]
    return [one.tokenizer.encode_chat([{"role": "user", "content": problem.prompt}]) for problem in problems]


def test_greedy_with_logprobs(one, four, prompts):
    params = SamplingParams(max_tokens=64, logprobs=2, prompt_logprobs=0)
    excused = total = 0
    for alone, together in zip(one.generate(prompts, params), four.generate(prompts, params), strict=True):
        a, b = alone.outputs[0], together.outputs[0]
        same = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), None)
        if same is None:
            assert a.token_ids == b.token_ids
        else:
            best = sorted((entry.logprob for entry in a.logprobs[same].values()), reverse=True)
            assert best[0] - best[1] < TIE
            excused += 1
        total += len(a.token_ids)
        for mine, other in zip(a.logprobs[:same], b.logprobs[:same], strict=False):
            assert max(abs(mine[t].logprob - other[t].logprob) for t in mine if t in other) < 1e-4
        for mine, other in zip(alone.prompt_logprobs, together.prompt_logprobs, strict=True):
            assert abs(next(iter(mine.values())).logprob - next(iter(other.values())).logprob) < 1e-4
    print(f"  {excused} of {total} tokens were near ties")
    assert excused <= total // 1000


def test_seeds(one, four, prompts):
    params = [
        SamplingParams(max_tokens=48, temperature=0.8, top_p=0.95, seed=i, n=2, repetition_penalty=1.05)
        for i in range(len(prompts))
    ]
    for alone, together in zip(one.generate(prompts, params), four.generate(prompts, params), strict=True):
        assert [o.token_ids for o in together.outputs] == [o.token_ids for o in alone.outputs]


def test_structured_output_and_stop_strings(one, four, prompts):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    forms = [GuidedDecodingParams(json=schema), GuidedDecodingParams(regex="[0-9]{3}-[a-z]{4}"),
             GuidedDecodingParams(choice=("yes", "no", "perhaps"))]  # fmt: skip
    params = [
        SamplingParams(max_tokens=200, temperature=0.7, seed=i, guided_decoding=form) for i, form in enumerate(forms)
    ]
    texts = ["The person is", "The code is", "The answer is"]
    expected = [o.outputs[0].text for o in one.generate(texts, params)]
    assert [o.outputs[0].text for o in four.generate(texts, params)] == expected
    assert set(json.loads(expected[0])) == {"name", "age"}
    stop = [SamplingParams(max_tokens=96, stop=["</think>", "answer is"]) for _ in prompts]
    for alone, together in zip(one.generate(prompts, stop), four.generate(prompts, stop), strict=True):
        a, b = alone.outputs[0], together.outputs[0]
        assert (b.text, b.finish_reason, b.stop_reason) == (a.text, a.finish_reason, a.stop_reason)


def test_priorities_aborts_and_deadlines(one, four, prompts):
    """Requests of high priority overtake those that wait; aborted and late ones leave the others what they were."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    expected = {i: o.outputs[0].token_ids for i, o in enumerate(one.generate(prompts, params))}
    for llm in (one, four):
        # Every slot is taken, and they come free one after the other.
        lengths = [30 + 4 * i for i in range(8 * len(llm._engine.engine.schedulers))]
        fill = [
            llm.generate_async([7, 8, 9, i], SamplingParams(max_tokens=length, ignore_eos=True))
            for i, length in enumerate(lengths)
        ]
        late = llm.generate_async(prompts[0], params, timeout=0.01)
        low = [llm.generate_async(prompt, params) for prompt in prompts[:6]]
        high = [llm.generate_async(prompt, params, priority=5) for prompt in prompts[6:]]
        gone = llm.generate_async(prompts[1], params, priority=9)
        gone.abort()
        outputs = [handle.result() for handle in low + high]
        assert [output.outputs[0].token_ids for output in outputs] == list(expected.values())
        first = [output.metrics.first_token for output in outputs]
        assert max(first[6:]) < min(first[:6])
        assert late.result().outputs[0].finish_reason == "timeout"
        assert gone.result().outputs[0].finish_reason == "cancelled"
        assert [len(handle.result().outputs[0].token_ids) for handle in fill] == lengths
        assert llm.get_stats().cache_blocks_used == 0
