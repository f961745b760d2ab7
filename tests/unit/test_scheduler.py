"""The scheduler's policy, with an executor without a model: who computes how much, waits, gives way, is found again.

What a request's output is must never show how it was scheduled; FakeExecutor answers from what the block tables hold.
"""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_fp4_plugin.engine import scheduler
from deepseek_fp4_plugin.engine.engine import LLMEngine
from deepseek_fp4_plugin.engine.request import Request, Stopping
from deepseek_fp4_plugin.engine.step_plan import Sampling
from tests.fake_executor import continuation, fake_engine, next_token


def request(number: int, prompt, max_tokens: int = 8, **fields) -> Request:
    return Request(number, list(prompt), fields.pop("sampling", Sampling()), Stopping(max_tokens), **fields)


def prompt(number: int, length: int) -> list[int]:
    """No two of them share a first token."""
    return [number, *range(100, 99 + length)]


def serve(engine: LLMEngine, requests: list[Request], max_steps: int = 2000) -> dict[int, list[int]]:
    """Serve all; outputs in the order in which the requests ended. The books are checked at every step."""
    outputs: dict[int, list[int]] = {}
    ended: dict[int, list[int]] = {}
    for r in requests:
        engine.check(r)
        engine.add(r)
    for _ in range(max_steps):
        if not engine.has_work:
            break
        for emission in engine.step():
            number = emission.request.request_id
            outputs.setdefault(number, []).extend(emission.tokens)
            if emission.finish_reason:
                ended[number] = outputs[number]
        engine.schedulers[0].blocks.check([r.blocks for r in engine.schedulers[0].running])
    assert not engine.has_work, "the engine did not finish"
    engine.schedulers[0].blocks.check([])
    for plan in engine.executor.plans:
        assert plan.num_tokens == sum(row.num_tokens for row in plan.rows) <= engine.schedulers[0].max_num_tokens
        assert len(plan.rows) <= engine.schedulers[0].max_batch_size
    return ended


def rows_of(engine: LLMEngine, first_token: int) -> list[tuple[int, int]]:
    """(start, tokens) of every row of the request whose prompt begins with this token."""
    return [(start, count) for first, start, count in engine.executor.rows if first == first_token]


# ------------------------------------------------------------------ tokens and budgets


def test_requests_come_out_as_if_each_were_alone():
    engine = fake_engine(tokens=16, batch=3)
    prompts = {i: prompt(i, 5 + 3 * i) for i in range(6)}
    outputs = serve(engine, [request(i, p) for i, p in prompts.items()])
    assert outputs == {i: continuation(p, 8) for i, p in prompts.items()}


def test_a_long_prompt_is_cut_to_the_budget_and_computed_once():
    engine = fake_engine(tokens=10, reuse=False)
    serve(engine, [request(1, prompt(1, 47), max_tokens=3)])
    rows = rows_of(engine, 1)
    assert rows[:5] == [(0, 10), (10, 10), (20, 10), (30, 10), (40, 7)]
    assert [count for start, count in rows[5:] if start >= 47] == [1] * len(rows[5:])


def test_running_requests_go_on_while_a_long_prompt_is_computed():
    engine = fake_engine(tokens=8, reuse=False)
    first = request(1, prompt(1, 4), max_tokens=20)
    engine.add(first)
    for _ in range(3):
        engine.step()
    had = len(first.token_ids)
    engine.add(request(2, prompt(2, 40), max_tokens=2))
    for _ in range(5):
        engine.step()
    assert len(first.token_ids) == had + 5  # one in every step, with the chunk of the other beside it
    chunks = rows_of(engine, 2)
    assert [count for _, count in chunks[:5]] == [7] * 5


def test_no_more_requests_run_than_a_batch_takes():
    engine = fake_engine(batch=2, tokens=64)
    requests = [request(i, prompt(i, 4), max_tokens=5) for i in range(5)]
    for r in requests:
        engine.add(r)
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 3)
    while engine.has_work:
        engine.step()
        assert engine.stats().running <= 2
    assert all(r.finish_reason == "length" for r in requests)


# ------------------------------------------------------------------ order


def test_equal_priorities_are_served_in_order_of_arrival():
    engine = fake_engine(batch=1)
    assert list(serve(engine, [request(i, prompt(i, 6)) for i in (3, 1, 2)])) == [3, 1, 2]


def test_a_higher_priority_goes_first():
    engine = fake_engine(batch=1)
    requests = [request(i, prompt(i, 6), priority=p) for i, p in ((1, 0), (2, -1), (3, 5), (4, 5), (5, 0))]
    assert list(serve(engine, requests)) == [3, 4, 1, 5, 2]


# ------------------------------------------------------------------ a full cache


def test_the_youngest_gives_way_and_starts_over_unharmed():
    # 10 blocks of 4 tokens; each request grows to 28 tokens: 7 blocks.
    engine = fake_engine(blocks=10, reuse=False)
    old, young = request(1, prompt(1, 8), max_tokens=20), request(2, prompt(2, 8), max_tokens=20)
    outputs = serve(engine, [old, young])
    assert (old.num_preemptions, young.num_preemptions > 0) == (0, True)
    assert list(outputs) == [1, 2]
    assert outputs == {i: continuation(prompt(i, 8), 20) for i in (1, 2)}
    assert engine.stats().preemptions == young.num_preemptions


def test_a_lower_priority_gives_way_even_if_it_is_older():
    engine = fake_engine(blocks=10, reuse=False)
    low, high = (
        request(1, prompt(1, 8), max_tokens=20, priority=-1),
        request(2, prompt(2, 8), max_tokens=20, priority=1),
    )
    engine.add(low)
    for _ in range(3):
        engine.step()
    outputs = serve(engine, [high])
    assert (low.num_preemptions > 0, high.num_preemptions) == (True, 0)
    assert outputs[2] == continuation(prompt(2, 8), 20)
    assert low.token_ids[8:] == continuation(prompt(1, 8), 20)


def test_a_preempted_request_returns_its_blocks_at_once():
    engine = fake_engine(blocks=10, reuse=False)
    requests = [request(i, prompt(i, 8), max_tokens=20) for i in (1, 2)]
    for r in requests:
        engine.add(r)
    while not requests[1].num_preemptions:
        engine.step()
    assert len(requests[1].blocks) == 0
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (1, 1)
    assert stats.cache_blocks_used == len(requests[0].blocks)


def test_who_gave_way_does_not_take_the_blocks_straight_back():
    engine = fake_engine(blocks=10, tokens=4, reuse=False)  # a chunk of 3 tokens would fit into what it gave back
    requests = [request(i, prompt(i, 8), max_tokens=20) for i in (1, 2)]
    for r in requests:
        engine.add(r)
    while not requests[1].num_preemptions:
        engine.step()
    assert len(engine.executor.plans[-1].rows) == 1
    while engine.has_work:
        engine.step()
    assert [r.token_ids[8:] for r in requests] == [continuation(prompt(i, 8), 20) for i in (1, 2)]


def test_a_preempted_prefix_is_found_again():
    engine = fake_engine(blocks=10)
    requests = [request(i, prompt(i, 8), max_tokens=20) for i in (1, 2)]
    outputs = serve(engine, requests)
    assert outputs == {i: continuation(prompt(i, 8), 20) for i in (1, 2)}
    assert requests[1].num_preemptions > 0
    # It does not count as a hit of the prompt: a preemption is ours, not the caller's.
    assert engine.stats().cached_prompt_tokens == 0 and engine.stats().prompt_tokens == 16


def test_requests_that_fit_one_by_one_all_come_through():
    engine = fake_engine(blocks=6, batch=5, tokens=12)
    prompts = {i: prompt(i, 3 + 2 * i) for i in range(5)}
    outputs = serve(engine, [request(i, p, max_tokens=10) for i, p in prompts.items()])
    assert outputs == {i: continuation(p, 10) for i, p in prompts.items()}


# ------------------------------------------------------------------ prefixes


def test_a_known_prefix_is_not_computed_again():
    engine = fake_engine()
    shared = prompt(1, 16)
    serve(engine, [request(1, [*shared, 7, 8])])
    outputs = serve(engine, [second := request(2, [*shared, 9])])
    assert outputs[2] == continuation([*shared, 9], 8)
    assert second.num_cached == 16
    assert [start for start, _ in rows_of(engine, 1)].count(0) == 1
    assert engine.stats().cached_prompt_tokens == 16


def test_the_same_prompt_again_computes_its_last_block():
    """A token must be computed to have logits, so a prompt of whole blocks leaves one of them out."""
    engine = fake_engine()
    for number, cached in ((1, 0), (2, 12)):
        again = request(number, prompt(5, 16))
        assert serve(engine, [again])[number] == continuation(prompt(5, 16), 8)
        assert again.num_cached == cached


def test_what_was_generated_is_a_prefix_too():
    engine = fake_engine()
    first = serve(engine, [request(1, prompt(1, 8), max_tokens=16)])[1]
    chat = [*prompt(1, 8), *first, 500, 501]
    second = request(2, chat)
    assert serve(engine, [second])[2] == continuation(chat, 8)
    assert second.num_cached >= 20


@pytest.mark.parametrize("reason", ["no reuse", "another salt", "log-probabilities of the prompt"])
def test_when_a_known_prefix_is_not_taken(reason):
    engine = fake_engine(reuse=reason != "no reuse")
    serve(engine, [request(1, prompt(1, 16), salt="a")])
    sampling = Sampling(prompt_logprobs=1) if reason.startswith("log") else Sampling()
    second = request(2, prompt(1, 16), salt="b" if reason == "another salt" else "a", sampling=sampling)
    serve(engine, [second])
    assert second.num_cached == 0 and engine.stats().cached_prompt_tokens == 0


# ------------------------------------------------------------------ endings


def test_max_tokens_and_max_seq_len_end_a_request():
    engine = fake_engine(max_seq_len=20)
    outputs = serve(engine, [request(1, prompt(1, 6), max_tokens=5), request(2, prompt(2, 6), max_tokens=100)])
    assert [len(outputs[i]) for i in (1, 2)] == [5, 14]


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_stop_token_ends_a_request_even_among_accepted_drafts(drafts):
    tokens = continuation(prompt(1, 6), 12)
    stop = tokens[6]
    engine = fake_engine(drafts=drafts)
    r = Request(1, prompt(1, 6), Sampling(), Stopping(12, stop_ids=frozenset({stop})))
    assert serve(engine, [r])[1] == tokens[:7]
    assert (r.finish_reason, r.stop_reason) == ("stop", stop)
    ending = Request(2, prompt(1, 6), Sampling(), Stopping(12, frozenset({stop}), eos_ids=frozenset({stop})))
    serve(engine, [ending])
    assert (ending.finish_reason, ending.stop_reason) == ("stop", None)


@pytest.mark.parametrize("state", ["waiting", "running", "preempted", "finished"])
def test_a_request_can_be_ended_in_any_state_and_only_once(state):
    engine = fake_engine(blocks=10, batch=1 if state == "waiting" else 2, reuse=False)
    first, second = request(1, prompt(1, 8), max_tokens=20), request(2, prompt(2, 8), max_tokens=20)
    engine.add(first)
    engine.add(second)
    done = {
        "waiting": lambda: engine.stats().waiting == 1,
        "running": lambda: engine.stats().running == 2,
        "preempted": lambda: second.num_preemptions > 0,
        "finished": lambda: second.finish_reason is not None,
    }[state]
    while not done():
        engine.step()
    emission = engine.abort(second)
    assert (emission is None) == (state == "finished")
    assert engine.abort(second) is None
    while engine.has_work:
        assert all(e.request is first for e in engine.step())
    assert first.token_ids[8:] == continuation(prompt(1, 8), 20)
    engine.schedulers[0].blocks.check([])
    assert sum(engine.stats().finished.values()) == 2


def test_a_deadline_ends_what_runs_and_what_waits_with_what_there_is(monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr(scheduler, "time", clock)
    engine = fake_engine(batch=1)
    running = request(1, prompt(1, 6), max_tokens=100, deadline=200.0)
    waiting = request(2, prompt(2, 6), deadline=200.0)
    free = request(3, prompt(3, 6), deadline=300.0)
    for r in (running, waiting, free):
        engine.add(r)
    for _ in range(4):
        engine.step()
    had = running.num_output_tokens
    assert had > 0
    clock.monotonic = lambda: 200.0
    emissions = engine.step()
    assert {e.request.request_id: e.finish_reason for e in emissions if e.finish_reason} == {1: "timeout", 2: "timeout"}
    assert running.token_ids[6 : 6 + had] == continuation(prompt(1, 6), had)
    while engine.has_work:
        engine.step()
    assert free.finish_reason == "length" and free.token_ids[6:] == continuation(prompt(3, 6), 8)
    engine.schedulers[0].blocks.check([])


# ------------------------------------------------------------------ drafts, and everything at once


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_drafts_save_steps_and_change_nothing(drafts):
    plain, drafted = fake_engine(), fake_engine(drafts=drafts)
    one, other = (serve(e, [request(i, prompt(i, 7), max_tokens=30) for i in range(3)]) for e in (plain, drafted))
    assert one == other
    assert len(drafted.executor.plans) < len(plain.executor.plans)
    counts = drafted.stats().answer
    assert 0 < sum(counts.accepted) < sum(counts.drafted)
    assert counts.emitted == 90


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_schedules(data):
    drafts, size = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 5))
    longest = 30  # prompt and output
    least = -(-(longest + drafts) // size)
    engine = fake_engine(
        blocks=data.draw(st.integers(least, 3 * least)),
        block_size=size,
        batch=data.draw(st.integers(1, 6)),
        tokens=data.draw(st.integers(1 + drafts, 40)),
        drafts=drafts,
        reuse=data.draw(st.booleans()),
        overlap=data.draw(st.booleans()),
    )
    shared = list(range(20))
    prompts, requests = {}, []
    for i in range(data.draw(st.integers(1, 10))):
        cut = data.draw(st.integers(0, 15))
        prompts[i] = [*shared[:cut], 100 + data.draw(st.integers(0, 2))]
        requests.append(request(i, prompts[i], data.draw(st.integers(1, 14)), priority=data.draw(st.integers(-1, 1))))
    outputs = serve(engine, requests)
    for r in requests:
        assert outputs[r.request_id] == continuation(prompts[r.request_id], r.stopping.max_tokens)


# ------------------------------------------------------------------ a step planned while another is under way


def watched(engine: LLMEngine) -> list[str]:
    """What the engine asks of its executor, in order."""
    log: list[str] = []
    submit, collect = engine.executor.submit, engine.executor.collect
    engine.executor.submit = lambda plans: (log.append("submit"), submit(plans))[1]
    engine.executor.collect = lambda: (log.append("collect"), collect())[1]
    return log


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_next_step_is_started_before_the_last_one_is_awaited(drafts):
    engine = fake_engine(overlap=True, drafts=drafts)
    log = watched(engine)
    prompts = {i: prompt(i, 5 + i) for i in range(3)}
    outputs = serve(engine, [request(i, p, max_tokens=40) for i, p in prompts.items()])
    assert outputs == {i: continuation(p, 40) for i, p in prompts.items()}
    assert log[:2] == ["submit", "submit"] and log.count("submit") == log.count("collect")
    under_way = [log[:n].count("submit") - log[:n].count("collect") for n in range(len(log) + 1)]
    assert max(under_way) == 2 and min(under_way[2:-1]) >= 1  # the executor always has a step until the last
    assert engine.stats().waits == {}


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_request_that_has_ended_wastes_at_most_one_share(drafts):
    """Its end by length is foreseen without drafts; a stop token is not."""
    engine = fake_engine(overlap=True, drafts=drafts)
    tokens = prompt(1, 6)
    stop = continuation(tokens, 9)[8]
    r = Request(1, list(tokens), Sampling(), Stopping(100, frozenset({stop})))
    other = request(2, prompt(2, 6), max_tokens=60)
    serve(engine, [r, other])
    assert r.finish_reason == "stop" and r.token_ids[6:] == continuation(tokens, 9)
    serial = fake_engine(drafts=drafts)
    serve(serial, [Request(1, list(tokens), Sampling(), Stopping(100, frozenset({stop})))])
    assert len(rows_of(engine, 1)) - len(rows_of(serial, 1)) <= 1
    assert other.token_ids[6:] == continuation(prompt(2, 6), 60)


def test_an_end_by_length_is_foreseen():
    plain, ahead = fake_engine(), fake_engine(overlap=True)
    for engine in (plain, ahead):
        serve(engine, [request(1, prompt(1, 6), max_tokens=10)])
    assert len(ahead.executor.plans) == len(plain.executor.plans)


@pytest.mark.parametrize("drafts", [0, 2])
def test_an_abort_under_way_gives_slot_and_blocks_to_the_next(drafts):
    engine = fake_engine(overlap=True, batch=1, blocks=12, drafts=drafts)
    first, second = request(1, prompt(1, 9), max_tokens=30), request(2, prompt(2, 9), max_tokens=12)
    engine.add(first)
    engine.add(second)
    for _ in range(4):
        engine.step()
    assert engine.executor._results  # a step of the first is under way
    engine.abort(first)
    engine.schedulers[0].blocks.check([])
    while engine.has_work:
        assert all(e.request is second for e in engine.step())
    assert second.token_ids[9:] == continuation(prompt(2, 9), 12)
    engine.schedulers[0].blocks.check([])


def test_nobody_gives_way_for_tokens_that_may_never_come():
    """A step under way is seen before anybody is preempted; then it is as without overlap."""
    engine = fake_engine(overlap=True, blocks=10, reuse=False)
    old, young = request(1, prompt(1, 8), max_tokens=20), request(2, prompt(2, 6), max_tokens=20)
    outputs = serve(engine, [old, young])
    assert outputs == {1: continuation(prompt(1, 8), 20), 2: continuation(prompt(2, 6), 20)}
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert engine.stats().waits["cache"] >= 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sampling": Sampling(frequency_penalty=0.5)}, "penalties"),
        ({"bad_words": ((999, 998),)}, "bad_words"),
    ],
    ids=["penalties", "bad_words"],
)
def test_requests_that_look_back_make_their_steps_wait_and_are_counted(fields, reason):
    engine = fake_engine(overlap=True)
    log = watched(engine)
    r = request(1, prompt(1, 6), max_tokens=10, **fields)
    assert serve(engine, [r])[1] == continuation(prompt(1, 6), 10)
    assert log == ["submit", "collect"] * 10
    assert engine.stats().waits == {reason: 10}


def test_min_tokens_wait_until_they_are_there():
    engine = fake_engine(overlap=True)
    r = Request(1, prompt(1, 6), Sampling(), Stopping(20, frozenset({1001}), min_tokens=5))
    serve(engine, [r])
    assert engine.stats().waits == {"min_tokens": 5} and r.token_ids[6:] == continuation(prompt(1, 6), 20)


def test_the_fake_model_depends_on_every_token():
    assert len({next_token(c) for c in ([1], [2], [1, 2], [2, 1], [1, 1, 2], [0, 1, 2])}) == 6
