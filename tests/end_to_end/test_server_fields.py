"""Every documented request field, on a real server: it acts, or it is refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest
from tests.end_to_end import test_server_forms  # noqa: F401 - its fields are covered, too
from tests.end_to_end.server_fields import covered, events, field, ids_of, ok, refused, speculating_server, text, tokens


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with speculating_server(tmp_path_factory) as running:
        yield running


# ---------------------------------------------------------------------------- sampling


@field("model")
def test_model(server):
    wrong = httpx.post(f"{server.url}/v1/completions", json={"model": "gpt", "prompt": "a"})
    assert wrong.status_code == 404
    assert wrong.json()["error"]["code"] == "model_not_found"
    assert server.name in wrong.json()["error"]["message"]
    assert ok(server.complete())["model"] == server.name


@field("temperature", "top_p", "seed")
def test_defaults_are_the_models_own_advice(server):
    advised = [tokens(server, temperature=None, seed=s, max_tokens=40) for s in range(3)]
    explicit = [tokens(server, temperature=0.6, top_p=0.95, seed=s, max_tokens=40) for s in range(3)]
    other = [tokens(server, temperature=1.0, top_p=1.0, seed=s, max_tokens=40) for s in range(3)]
    assert advised == explicit
    assert advised != other
    assert len({tuple(t) for t in other}) > 1
    assert tokens(server, temperature=1.0, seed=-5) == tokens(server, temperature=1.0, seed=-5)


@field("top_k", "min_p")
def test_every_way_to_be_greedy_gives_the_same(server):
    chat = {"messages": [{"role": "user", "content": "What is 607 + 68?"}]}  # the model is sure here: no ties
    prompt = ok(httpx.post(f"{server.url}/tokenize", json=chat))["tokens"]
    greedy = tokens(server, prompt, max_tokens=20)
    for fields in ({"top_k": 1}, {"top_p": 0}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert tokens(server, prompt, max_tokens=20, **{"temperature": 1.0, **fields}) == greedy, fields


@field("n", "best_of")
def test_n(server):
    body = ok(server.complete(["abc", "xyz"], n=3, temperature=1.0, best_of=3))
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    chunks = events(server.complete(["abc", "xyz"], n=2, temperature=1.0, stream=True))
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == set(range(4))
    refused(server.complete(n=2, best_of=3), "best_of")


@field("frequency_penalty", "presence_penalty", "repetition_penalty")
def test_penalties_push_repetition_out(server):
    # With every other token banned but two, the penalized one gives way to the other.
    two = {str(t): 100 for t in ids_of(server, "qz")}
    plain = tokens(server, logit_bias=two, max_tokens=12)
    assert set(plain) <= set(ids_of(server, "qz"))
    for fields in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 1.5}):
        assert tokens(server, logit_bias=two, max_tokens=12, **fields) != plain or len(set(plain)) == 2
        assert len(set(tokens(server, logit_bias=two, max_tokens=12, **fields))) == 2


@field("logit_bias")
def test_logit_bias(server):
    (wanted,) = ids_of(server, "Q")
    assert tokens(server, logit_bias={str(wanted): 100}) == [wanted] * 8
    first = tokens(server)[0]
    assert first not in tokens(server, logit_bias={str(first): -100})
    refused(server.complete(logit_bias={"9999999": 1}), "logit_bias")
    refused(server.complete(logit_bias={"abc": 1}), "logit_bias")


@field("bad_words")
def test_bad_words(server):
    spelled = dict(zip(map(str, ids_of(server, "Qx")), (100, 60), strict=True))
    assert set(text(server, logit_bias=spelled)) == {"Q"}
    assert "Q" not in text(server, logit_bias=spelled, bad_words=["Q"])


# ---------------------------------------------------------------------------- ends


@field("stop", "include_stop_str_in_output")
def test_stop(server):
    q, x = (str(t) for t in ids_of(server, "Qx"))
    # A pattern of known text: Q has the larger bias, the frequency penalty lets x in.
    fields = {"logit_bias": {q: 100, x: 99}, "frequency_penalty": 2, "max_tokens": 20}
    whole = text(server, **fields)
    assert {"Q", "x"} == set(whole)
    at = whole.index("xQ")
    body = ok(server.complete(stop=["nothing", "xQ"], temperature=0, **fields))["choices"][0]
    assert (body["text"], body["finish_reason"], body["stop_reason"]) == (whole[:at], "stop", "xQ")
    assert text(server, stop="xQ", include_stop_str_in_output=True, **fields) == whole[:at] + "xQ"
    streamed = events(server.complete(stop="xQ", stream=True, temperature=0, **fields))
    assert "".join(c["choices"][0]["text"] for c in streamed) == whole[:at]


@field("stop_token_ids", "ignore_eos", "min_tokens", "max_tokens")
def test_ends(server):
    eos = {"1": 100}
    body = ok(server.complete(logit_bias=eos))
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("", "stop")
    assert body["choices"][0]["stop_reason"] is None
    assert len(tokens(server, logit_bias=eos, ignore_eos=True)) == 8
    assert len(tokens(server, logit_bias=eos, min_tokens=5)) >= 5
    (q,) = ids_of(server, "Q")
    body = ok(server.complete(logit_bias={str(q): 100}, stop_token_ids=[q]))["choices"][0]
    assert (body["text"], body["finish_reason"], body["stop_reason"]) == ("", "stop", q)
    body = ok(server.complete(max_tokens=3, ignore_eos=True))
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    refused(server.complete(min_tokens=9), "min_tokens")
    refused(server.complete(max_tokens=0), "max_tokens")


@field("max_completion_tokens")
def test_both_names_of_the_limit(server):
    both = {"max_tokens": 3, "max_completion_tokens": 3}
    for fields in ({"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}, both):
        assert ok(server.chat(ignore_eos=True, **fields))["usage"]["completion_tokens"] == 3
    refused(server.chat(max_tokens=3, max_completion_tokens=4), "max_completion_tokens")


@field("skip_special_tokens", "spaces_between_special_tokens")
def test_special_tokens(server):
    special = {str(ids_of(server, "<|EOT|>")[0]): 100}
    assert text(server, logit_bias=special) == ""
    assert text(server, logit_bias=special, skip_special_tokens=False) == "<|EOT|>" * 8
    refused(server.complete(spaces_between_special_tokens=False), "spaces_between_special_tokens")


# ---------------------------------------------------------------------------- prompts


@field("prompt", "echo", "logprobs", "prompt_logprobs")
def test_prompts_echo_and_logprobs(server):
    ids = ids_of(server, "abc")
    body = ok(server.complete([ids, ids], echo=True, logprobs=2, max_tokens=2, temperature=0, ignore_eos=True))
    first, second = body["choices"]
    assert first["text"].startswith("abc")
    assert first["text"] == second["text"]
    logprobs = first["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 5
    assert logprobs["tokens"][:3] == ["a", "b", "c"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][:4] == [0, 1, 2, 3]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    # The prompt's log-probabilities are those of generating it.
    again = ok(server.complete("ab", logprobs=20, max_tokens=1, temperature=0))["choices"][0]["logprobs"]
    if "c" in again["top_logprobs"][0]:
        assert again["top_logprobs"][0]["c"] == pytest.approx(logprobs["token_logprobs"][2], abs=0.05)
    body = ok(server.complete("abc", echo=True, max_tokens=0, logprobs=1))["choices"][0]
    assert body["text"] == "abc"
    assert len(body["logprobs"]["tokens"]) == 3
    body = ok(server.complete("abc", prompt_logprobs=3))["choices"][0]
    assert body["prompt_logprobs"][0] is None
    assert str(ids[1]) in body["prompt_logprobs"][1]
    refused(server.complete("abc", prompt_logprobs=3, stream=True), "prompt_logprobs")
    streamed = events(server.complete("abc", echo=True, logprobs=0, max_tokens=3, stream=True, temperature=0))
    assert "".join(c["choices"][0]["text"] for c in streamed) == "abc" + text(server, max_tokens=3)
    refused(server.complete([10**8]), "vocabulary")
    refused(server.complete(""), "empty")
    refused(server.complete("a" * 3000), "2048")


@field("top_logprobs")
def test_chat_logprobs(server):
    body = ok(server.chat(logprobs=True, top_logprobs=3, temperature=0, max_tokens=4))["choices"][0]
    content = body["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["token"] == entry["top_logprobs"][0]["token"]
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])
        if not entry["token"].startswith("bytes:"):
            assert bytes(entry["bytes"]).decode() == entry["token"]
    assert ok(server.chat(logprobs=True))["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    chunks = events(server.chat(logprobs=True, top_logprobs=1, temperature=0, max_tokens=4, stream=True))
    assert sum(len(c["choices"][0]["logprobs"]["content"]) for c in chunks if c["choices"][0]["logprobs"]) == 4
    refused(server.chat(top_logprobs=2), "top_logprobs")


@field("suffix", "add_special_tokens", "truncate_prompt_tokens")
def test_prompt_preparation(server):
    refused(server.complete(suffix="x"), "suffix")
    body = ok(server.complete("abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=1))
    assert body["usage"]["prompt_tokens"] == 2
    assert body["choices"][0]["text"].startswith("ef")
    # This tokenizer adds nothing of its own, so both settings give the prompt as it is.
    for flag in (True, False):
        assert ok(server.complete("abc", add_special_tokens=flag))["usage"]["prompt_tokens"] == 3


@field("messages", "add_generation_prompt", "chat_template_kwargs", "chat_template", "documents")
def test_chat_prompts(server):
    def count(messages, **fields):
        body = {"model": server.name, "messages": messages, "max_tokens": 1, **fields}
        return ok(httpx.post(f"{server.url}/v1/chat/completions", json=body))["usage"]["prompt_tokens"]

    user = {"role": "user", "content": "hi"}
    assert count([user]) == 5  # bos, User, h, i, Assistant
    assert count([{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]) == 5
    assert count([{"role": "system", "content": "sys"}, user]) == 8
    assert count([{"role": "developer", "content": "sys"}, user]) == 8
    answered = [user, {"role": "assistant", "content": "ok", "reasoning_content": "dropped"}]
    assert count(answered) == count(answered, add_generation_prompt=False) + 1
    tool_turn = [user, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"}]  # fmt: skip
    assert count(tool_turn) > 10
    tool_turn[2]["tool_call_id"] = "c2"
    refused(server.chat(messages=tool_turn), "tool_call_id")
    refused(server.chat(messages=[user, {"role": "assistant", "content": None}]), "content")
    refused(server.chat(chat_template_kwargs={"no_such_variable": 1}), "no_such_variable")
    refused(server.chat(chat_template="{{ x }}"), "chat_template")
    refused(server.chat(documents=[]), "documents")


# ---------------------------------------------------------------------------- streams


@field("stream", "stream_options")
def test_stream(server):
    whole = ok(server.chat(temperature=0, ignore_eos=True))
    chunks = events(server.chat(temperature=0, ignore_eos=True, stream=True))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "role" not in chunks[-1]["choices"][0]["delta"]
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        == (whole["choices"][0]["message"]["content"])
    )
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({c["id"] for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    for options, with_usage in (({"include_usage": True}, True), ({}, True), ({"include_usage": False}, False)):
        chunks = events(server.chat(temperature=0, ignore_eos=True, stream=True, stream_options=options))
        assert (chunks[-1]["choices"] == []) == with_usage
        if with_usage:
            assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    options = {"continuous_usage_stats": True}
    chunks = events(server.chat(temperature=0, stream=True, stream_options=options))
    assert all("usage" in c for c in chunks)
    refused(server.chat(stream_options={}), "stream_options")


@field("return_token_ids", "return_accepted_drafts")
def test_tokens_beside_the_text(server):
    body = ok(server.chat(temperature=0, return_token_ids=True, return_accepted_drafts=True))["choices"][0]
    assert len(body["token_ids"]) == len(body["tokens"])
    assert body["prompt_token_ids"][0] == 0
    assert "".join(t["text"] for t in body["tokens"]) == body["message"]["content"]
    chunks = events(server.chat(temperature=0, stream=True, return_token_ids=True, return_accepted_drafts=True))
    choices = [c["choices"][0] for c in chunks]
    assert [i for c in choices for i in c["token_ids"]] == body["token_ids"]
    assert [t for c in choices for t in c["tokens"]] == body["tokens"]


@field("return_token_ids")
def test_a_stream_has_the_ids_of_tokens_that_bring_no_text(server):
    """A character in two tokens is text when the second one comes; the first one's id is told all the same."""
    pair = ids_of(server, "\N{EN DASH}")
    assert len(pair) == 2
    fields = {"temperature": 0, "max_tokens": 6, "stream": True, "return_token_ids": True, "ignore_eos": True}
    chunks = events(server.complete(**fields, logit_bias={str(pair[0]): 100}))
    assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == pair[:1] * 6


@field("relaxed_acceptance", "relaxed_topk", "relaxed_delta")
def test_relaxed_acceptance_can_be_steered(server):
    # An open think block in the prompt makes the first step a thinking one; with every token in the top k, every
    # draft passes.
    prompt = ids_of(server, "<think>abc")
    base = {"max_tokens": 24, "ignore_eos": True, "temperature": 0, "return_accepted_drafts": True,
            "logit_bias": {str(ids_of(server, tag)[0]): -100 for tag in ("<think>", "</think>")}}  # fmt: skip

    def accepted(**fields) -> int:
        body = ok(server.complete(prompt, **base, **fields))["choices"][0]
        return sum(t["accepted_draft"] for t in body["tokens"])

    everything = accepted(relaxed_topk=1024, relaxed_delta=1.0)
    assert everything >= 16  # three of four, but for the ends
    strict = accepted(relaxed_acceptance=False)
    assert strict < everything
    assert accepted(relaxed_topk=1) == strict
    unspeculated = text(server, prompt=prompt, **{k: v for k, v in base.items() if k != "return_accepted_drafts"},
                        relaxed_acceptance=False)  # fmt: skip
    assert unspeculated == text(server, prompt=prompt, relaxed_topk=1, **{
        k: v for k, v in base.items() if k != "return_accepted_drafts"})  # fmt: skip


# ---------------------------------------------------------------------------- the rest


@field("cache_salt")
def test_cache_salt(server):
    prompt = "The same long beginning of a prompt, again and again. " * 4

    def cached(salt):
        body = ok(server.complete(prompt, cache_salt=salt, max_tokens=1))
        return body["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0
    assert cached("one") > 100
    assert cached("two") == 0


@field("priority")
def test_priority(server):
    """With every slot taken and both kinds waiting, the high ones leave the queue first, though they came last."""
    finished = []

    def run(name, **fields):
        ok(server.complete(ignore_eos=True, temperature=0, **fields))
        finished.append(name)

    with ThreadPoolExecutor(8) as threads:
        # Streams that nobody reads to the end keep the four slots until they are closed.
        with ExitStack() as busy:
            lines = []  # kept: a stream whose iterator is dropped closes
            for _ in range(4):
                body = {"model": server.name, "prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "stream": True}
                stream = busy.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=body))
                lines.append(stream.iter_lines())
                next(lines[-1])
            low = [threads.submit(run, "low", max_tokens=200, priority=-1) for _ in range(4)]
            server.wait_until_waiting(4)
            high = [threads.submit(run, "high", max_tokens=40, priority=1) for _ in range(4)]
            server.wait_until_waiting(8)
        for job in low + high:
            job.result()
    assert finished[:4] == ["high"] * 4
    assert finished[4:] == ["low"] * 4


@field("user")
def test_user_is_in_the_access_log_and_the_prompt_is_not(server):
    ok(server.chat("a very secret prompt", user="customer-17"))
    line = json.loads(server.wait_for_line('"customer-17"'))
    assert line["path"] == "/v1/chat/completions"
    assert line["status"] == 200
    assert line["completion_tokens"] >= 1
    assert "secret" not in server.log


@field("use_beam_search", "length_penalty", "early_stopping", "top_p_min", "thinking_token_budget")
def test_refused_fields(server):
    for fields in ({"use_beam_search": True}, {"length_penalty": 0.5}, {"early_stopping": True}, {"top_p_min": 0.1},
                   {"reasoning_effort": "enormous"}, {"thinking_token_budget": 10}, {"echo": True},
                   {"unknown_field": 1}):  # fmt: skip
        refused(server.chat(**fields), next(iter(fields)))


@field("store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
       "modalities", "verbosity", "prediction", "audio", "web_search_options", "functions", "function_call",
       "continue_final_message", "prompt_cache_options", "moderation", "allowed_token_ids", "logits_processors",
       "return_tokens_as_token_ids", "detokenize", "request_id", "lora_request", "disaggregated_params",
       "kv_transfer_params", "vllm_xargs", "include_reasoning", "mm_processor_kwargs", "media_io_kwargs")  # fmt: skip
@pytest.mark.parametrize(
    "fields",
    [
        {"store": False}, {"store": True}, {"metadata": {"a": "b"}}, {"metadata": None}, {"service_tier": "auto"},
        {"prompt_cache_key": "x"}, {"prompt_cache_retention": "24h"}, {"safety_identifier": "u"},
        {"modalities": ["text"]}, {"verbosity": "medium"}, {"prediction": None},
        {"prediction": {"type": "content", "content": "5"}}, {"audio": None, "web_search_options": None},
        {"functions": None, "function_call": None}, {"continue_final_message": False}, {"tool_choice": "auto"},
        {"n": None, "stream": None, "stream_options": None, "logprobs": None, "parallel_tool_calls": None,
         "response_format": None, "priority": None, "echo": None, "tools": None},
        {"top_k": -1, "temperature": 0}, {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
        {"moderation": None, "allowed_token_ids": None, "logits_processors": None, "request_id": None,
         "lora_request": None, "disaggregated_params": None, "kv_transfer_params": None, "vllm_xargs": None,
         "mm_processor_kwargs": None, "media_io_kwargs": None},
        {"return_tokens_as_token_ids": False, "detokenize": True, "include_reasoning": True},
    ],
)  # fmt: skip
def test_fields_that_cannot_change_the_text_change_nothing(server, fields):
    plain = ok(server.chat(temperature=0))["choices"]
    assert ok(server.chat(**{"temperature": 0, **fields}))["choices"] == plain
    streamed = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert events(server.chat(**{"temperature": 0, **fields, **streamed}))[0]["choices"][0]["delta"]


def test_fields_that_could_change_the_text_are_refused_still(server):
    for fields in ({"modalities": ["text", "audio"]}, {"audio": {"voice": "x"}}, {"functions": [{"name": "f"}]},
                   {"web_search_options": {}}, {"continue_final_message": True}, {"nonsense": None},
                   {"moderation": {"model": "m"}}, {"allowed_token_ids": [5]}, {"return_tokens_as_token_ids": True},
                   {"detokenize": False}, {"include_reasoning": False}, {"vllm_xargs": {"a": 1}}):  # fmt: skip
        refused(server.chat(**fields), next(iter(fields)))
    refused(server.complete(top_k=-2), "top_k")


def test_no_limit_of_top_k_overrides_the_servers(server):
    """-1 is vLLM's word for it."""
    free = tokens(server, top_k=0, temperature=1.0, seed=4, max_tokens=30)
    assert tokens(server, top_k=-1, temperature=1.0, seed=4, max_tokens=30) == free


def test_messages_of_all_clients(server):
    def answer(messages):
        return ok(server.chat(messages=messages, temperature=0))["choices"][0]["message"]["content"]

    plain = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
             {"role": "assistant", "content": "ok"}, {"role": "user", "content": "2 + 3?"}]  # fmt: skip
    wanted = answer(plain)
    for name in ("bob", None):
        assert answer([{**message, "name": name} for message in plain]) == wanted
    for thought in ({"reasoning_content": "t"}, {"reasoning": "t"}, {"reasoning_details": [{"type": "x", "text": "t"}]},
                    {"refusal": None, "audio": None, "tool_calls": None, "function_call": None}):  # fmt: skip
        assert answer([m | thought if m["role"] == "assistant" else m for m in plain]) == wanted


@field("reasoning_effort")
def test_reasoning_effort(server):
    whole = ok(server.chat(temperature=0))
    for level in ("minimal", "low", "medium", "high", "xhigh", "max", None):
        body = ok(server.chat(temperature=0, reasoning_effort=level))
        assert (body["choices"], body["usage"]) == (whole["choices"], whole["usage"])
    think = {str(ids_of(server, "<think>")[0]): 60}
    open_ = ok(server.chat(temperature=0, logit_bias=think, return_token_ids=True))["choices"][0]
    assert open_["message"]["content"].startswith("<think>")
    none = ok(server.chat(temperature=0, reasoning_effort="none", return_token_ids=True, max_tokens=200))["choices"][0]
    block = ids_of(server, "<think>\n\n</think>\n\n")
    assert none["prompt_token_ids"] == open_["prompt_token_ids"] + block
    assert "think>" not in none["message"]["content"]


def test_every_documented_field_has_a_test(server):
    schemas = ok(httpx.get(f"{server.url}/openapi.json"))["components"]["schemas"]
    documented = set(schemas["ChatCompletionRequest"]["properties"]) | set(schemas["CompletionRequest"]["properties"])
    assert documented == set(ChatCompletionRequest.model_fields) | set(CompletionRequest.model_fields)
    assert documented - covered == set()
