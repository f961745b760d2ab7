"""LLM: what a Python user touches, on the tiny model with a real tokenizer."""

import asyncio
import itertools
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.engine import scheduler
from deepseek_fp4_plugin.engine.async_engine import EngineDeadError
from deepseek_fp4_plugin.llm import RequestError

PROMPTS = ["Hello, my name is", "1 + 2 =", "The capital of France", "日期"]


@pytest.fixture(scope="module")
def llm(tiny_with_tokenizer):
    with LLM(tiny_with_tokenizer, dtype="float32", max_batch_size=64, max_seq_len=400) as llm:
        yield llm


@pytest.fixture(scope="module")
def mtp_llm(tiny_with_tokenizer):
    speculative = {"decoding_type": "MTP", "num_nextn_predict_layers": 3}
    with LLM(tiny_with_tokenizer, dtype="float32", speculative_config=speculative, max_seq_len=400) as llm:
        yield llm


def test_one_prompt_gives_one_output_and_a_list_gives_a_list(llm):
    one = llm.generate(PROMPTS[0])
    many = llm.generate(PROMPTS)
    assert one.outputs[0].text == many[0].outputs[0].text == many[0].text
    assert [output.prompt for output in many] == PROMPTS
    assert all(len(output.outputs[0].token_ids) == 32 for output in many)
    ids = llm.tokenizer.encode(PROMPTS[1])
    assert llm.generate(ids).text == many[1].text
    assert [o.text for o in llm.generate([ids, ids])] == [many[1].text] * 2


def test_default_length_belongs_to_the_llm(tiny_with_tokenizer):
    with LLM(tiny_with_tokenizer, max_new_tokens=5, max_batch_size=2) as llm:
        assert llm.generate("abc").outputs[0].length == 5
        assert llm.generate("abc", SamplingParams(temperature=0.7)).outputs[0].length == 5
        assert llm.generate("abc", SamplingParams(max_new_tokens=7)).outputs[0].length == 7
        assert llm.generate("abc", SamplingParams(max_tokens=32)).outputs[0].length == 32


def test_a_loaded_model_is_taken(tiny_with_tokenizer):
    from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM

    with LLM(DeepseekV3ForCausalLM.from_pretrained(tiny_with_tokenizer), max_batch_size=1, max_new_tokens=4) as llm:
        (output,) = llm.generate(["Hello, world!"], SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=10))
        assert output.outputs[0].length == 10


def test_mtp_does_not_show_greedy_or_seeded(llm, mtp_llm):
    for params in (SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=1.0, seed=3, top_p=0.9)):
        plain, drafted = llm.generate(PROMPTS, params), mtp_llm.generate(PROMPTS, params)
        assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in drafted]
        assert drafted[0].metrics.drafted > 0


def test_logprobs_are_the_same_with_mtp(llm, mtp_llm):
    params = SamplingParams(max_tokens=12, logprobs=2, prompt_logprobs=1)
    plain, drafted = llm.generate(PROMPTS[0], params), mtp_llm.generate(PROMPTS[0], params)
    for one, other in zip(plain.outputs[0].logprobs, drafted.outputs[0].logprobs, strict=True):
        assert list(one) == list(other)
        assert all(abs(one[t].logprob - other[t].logprob) < 1e-4 for t in one)
    assert len(plain.prompt_logprobs) == len(plain.prompt_token_ids) - 1
    assert plain.prompt_logprobs[0].keys() == drafted.prompt_logprobs[0].keys()
    assert plain.outputs[0].cumulative_logprob < 0


def test_several_answers_have_seeds_of_their_own(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=20)
    output = llm.generate(PROMPTS[0], params)
    assert len({o.text for o in output.outputs}) == 3
    assert [o.text for o in llm.generate(PROMPTS[0], params).outputs] == [o.text for o in output.outputs]
    assert (
        llm.generate(PROMPTS[0], SamplingParams(temperature=1.0, seed=2, max_tokens=20)).text == output.outputs[1].text
    )


def test_streaming_gives_the_same_text_in_pieces(llm, mtp_llm):
    for engine in (llm, mtp_llm):
        whole = engine.generate(PROMPTS[2]).outputs[0]
        pieces, tokens = [], []
        for output in engine.generate_async(PROMPTS[2], streaming=True):
            pieces.append(output.outputs[0].text_diff)
            tokens += output.outputs[0].token_ids_diff
        assert "".join(pieces) == whole.text
        assert tokens == whole.token_ids
        assert len(pieces) > 1


@pytest.mark.parametrize("choices", [1, 2])
def test_stream_interval_gives_fewer_pieces_of_the_same_text(llm, tiny_with_tokenizer, choices):
    params = SamplingParams(max_tokens=30, n=choices, temperature=0.8, seed=1)
    whole = [completion.token_ids for completion in llm.generate(PROMPTS[2], params).outputs]
    with LLM(tiny_with_tokenizer, dtype="float32", max_seq_len=400, stream_interval=4) as coarse:
        assert [completion.token_ids for completion in coarse.generate(PROMPTS[2], params).outputs] == whole
        tokens: list[list[int]] = [[] for _ in range(choices)]
        pieces = 0
        for output in coarse.generate_async(PROMPTS[2], params, streaming=True):
            pieces += 1
            for own, completion in zip(tokens, output.outputs, strict=True):
                own += completion.token_ids_diff
        assert tokens == whole
        assert pieces <= 12  # the first, every fourth step, the ends

        async def read() -> int:
            return len([None async for _ in coarse.generate_async(PROMPTS[2], params, streaming=True)])

        assert asyncio.run(read()) <= 12


def test_stop_strings_cross_tokens_and_are_left_out(llm, mtp_llm):
    whole = llm.generate(PROMPTS[0], SamplingParams(max_tokens=32)).outputs[0]
    stop = whole.text[9:13]  # one character a token: over token boundaries
    at = whole.text.index(stop)
    for engine in (llm, mtp_llm):
        kept = engine.generate(PROMPTS[0], SamplingParams(max_tokens=32, stop=[stop, "never there"])).outputs[0]
        assert (kept.text, kept.finish_reason, kept.stop_reason) == (whole.text[:at], "stop", stop)
        assert kept.token_ids == whole.token_ids[: len(kept.token_ids)]
        assert engine.tokenizer.decode(kept.token_ids) == kept.text
        included = engine.generate(
            PROMPTS[0], SamplingParams(max_tokens=32, stop=stop, include_stop_str_in_output=True)
        ).outputs[0]
        assert included.text == whole.text[: at + len(stop)]
        pieces = [
            o.outputs[0].text_diff
            for o in engine.generate_async(PROMPTS[0], SamplingParams(max_tokens=32, stop=stop), streaming=True)
        ]
        assert "".join(pieces) == whole.text[:at]


def test_stop_ids_minimum_and_ignored_end(llm):
    whole = llm.generate(PROMPTS[0]).outputs[0].token_ids
    stopped = llm.generate(PROMPTS[0], SamplingParams(stop_token_ids=[whole[4]])).outputs[0]
    assert stopped.token_ids == whole[: whole.index(whole[4])]
    assert stopped.stop_reason == whole[4]
    later = llm.generate(PROMPTS[0], SamplingParams(stop_token_ids=[whole[4]], min_tokens=10)).outputs[0]
    assert whole[4] not in later.token_ids[:10]
    ended = llm.generate(PROMPTS[0], SamplingParams(end_id=whole[6])).outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert llm.generate(PROMPTS[0], SamplingParams(end_id=whole[6], ignore_eos=True)).outputs[0].token_ids == whole


def test_bad_words_and_bias(llm):
    whole = llm.generate(PROMPTS[0]).outputs[0]
    without = llm.generate(PROMPTS[0], SamplingParams(bad_token_ids=[whole.token_ids[0]])).outputs[0]
    assert whole.token_ids[0] not in without.token_ids
    forced = llm.generate(PROMPTS[0], SamplingParams(logit_bias={77: 1000.0}, max_tokens=5)).outputs[0]
    assert forced.token_ids == [77] * 5


def test_many_readers_on_one_loop(mtp_llm):
    async def read(i):
        text = ""
        async for output in mtp_llm.generate_async(PROMPTS[i % 4], SamplingParams(max_tokens=5 + i), streaming=True):
            text += output.outputs[0].text_diff
        return text

    async def run():
        return await asyncio.gather(*(read(i) for i in range(64)))

    texts = asyncio.run(run())
    for i in (0, 5, 63):
        assert texts[i] == mtp_llm.generate(PROMPTS[i % 4], SamplingParams(max_tokens=5 + i)).text


def test_abort_and_deadline_deliver_what_there_is(llm, monkeypatch):
    handle = llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=300), streaming=True)
    for output in handle:
        if output.outputs[0].length > 3:
            handle.abort()
    assert handle.output.outputs[0].finish_reason == "cancelled"
    assert 3 < handle.output.outputs[0].length < 300
    # The scheduler's clock jumps when it has been looked at 20 times, once a step: so no engine is too fast for this.
    looks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + (1000 if next(looks) >= 20 else 0))
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "time", clock)
        late = llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=300), timeout=500).result()
    assert late.outputs[0].finish_reason == "timeout"
    assert 0 < late.outputs[0].length < 300
    until = time.monotonic() + 5
    while llm.get_stats().running and time.monotonic() < until:
        time.sleep(0.01)
    stats = llm.get_stats()
    assert (stats.running, stats.cache_blocks_used) == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("x" * 500, {}, "at most 399 fit"),
        ([], {}, "empty"),
        ([5, 1024], {}, "token id 1024"),
        ([5, -1], {}, "token id -1"),
        ("a", {"n": 10_000, "temperature": 1.0}, "n=10000"),
        ("a", {"logprobs": 5000}, "logprobs=5000"),
        ("a", {"logit_bias": {99999: 1.0}}, "99999"),
    ],
)
def test_bad_requests_are_refused_while_others_go_on(llm, prompt, params, words):
    running = llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=60))
    with pytest.raises(RequestError, match=words):
        llm.generate_async(prompt, SamplingParams(**params))
    assert running.result(timeout=60).outputs[0].length == 60


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"max_tokens": 0},
        {"max_tokens": 5, "max_new_tokens": 6},
        {"repetition_penalty": 0},
        {"min_tokens": 9, "max_tokens": 5},
        {"tempratur": 1},
    ],
)
def test_bad_parameters_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_a_dead_engine_says_so(tiny_with_tokenizer):
    llm = LLM(tiny_with_tokenizer, max_batch_size=2)

    def fail(plan):
        raise RuntimeError("device lost")

    llm._executor.runner.submit = fail
    with pytest.raises(EngineDeadError, match="device lost"):
        llm.generate("abc")
    with pytest.raises(EngineDeadError, match="device lost"):
        llm.check_health()
    with pytest.raises(EngineDeadError):
        llm.generate_async("abc")
    llm.shutdown()


def test_shutdown_answers_everyone(tiny_with_tokenizer):
    llm = LLM(tiny_with_tokenizer, max_batch_size=1)
    handles = [llm.generate_async("abc", SamplingParams(max_tokens=400)) for _ in range(4)]
    llm.shutdown()
    assert {handle.result(timeout=5).outputs[0].finish_reason for handle in handles} == {"cancelled"}
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate("abc")


def test_a_program_may_end_while_it_is_answered(tiny_with_tokenizer):
    """Nobody shuts the engine down, and its thread is in the middle of a step when the interpreter goes."""
    program = f"""
from deepseek_fp4_plugin import LLM, SamplingParams
llm = LLM({str(tiny_with_tokenizer)!r})
prompts = [[5 + i] * 100 for i in range(64)]
handles = [llm.generate_async(p, SamplingParams(max_tokens=400, ignore_eos=True), streaming=True) for p in prompts]
print(len(next(iter(handles[0])).outputs[0].token_ids) > 0)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_cache_salt_isolates(llm):
    prompt = [token % 300 for token in range(200)]
    llm.generate(prompt, SamplingParams(max_tokens=2), cache_salt="one")
    assert llm.generate(prompt, SamplingParams(max_tokens=2), cache_salt="one").metrics.cached_tokens == 192
    assert llm.generate(prompt, SamplingParams(max_tokens=2), cache_salt="two").metrics.cached_tokens == 0


def test_fp8_cache_changes_little(tiny_with_tokenizer):
    with LLM(tiny_with_tokenizer, kv_cache_config={"dtype": "fp8"}, max_batch_size=4) as llm:
        assert llm._executor.runner.cache.dtype is torch.float8_e4m3fn
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        fp8 = llm.generate(PROMPTS[0] * 4, params).prompt_logprobs
    with LLM(tiny_with_tokenizer, max_batch_size=4) as llm:
        bf16 = llm.generate(PROMPTS[0] * 4, params).prompt_logprobs
    gaps = [
        abs(next(iter(a.values())).logprob - next(iter(b.values())).logprob) for a, b in zip(fp8, bf16, strict=True)
    ]
    assert 0 < sum(gaps) / len(gaps) < 0.5  # a random model: chaotic, but no catastrophe
