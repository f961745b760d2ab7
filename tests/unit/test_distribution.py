"""Which attention-data-parallel rank gets which request: TensorRT-LLM's rule, on schedulers without an engine."""

import time

import pytest

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.distribution import Balance, Distributor
from deepseek_fp4_plugin.engine.request import Request, Stopping
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import Sampling


def schedulers(ranks: int, batch: int = 8) -> list[Scheduler]:
    return [Scheduler(BlockManager(256, 4, True), batch, 512, 512) for _ in range(ranks)]


def request(number: int, tokens: int, **fields) -> Request:
    return Request(number, [number] * tokens, Sampling(), Stopping(8), **fields)


def running(scheduler: Scheduler, *lengths: int) -> None:
    """Give a scheduler requests of these lengths, and let them run."""
    for length in lengths:
        scheduler.add(request(1, length))
    scheduler.schedule()
    assert len(scheduler.running) == len(lengths)


def assign(distributor: Distributor, ranks: list[Scheduler]) -> dict[int, int]:
    """The rank of each request that leaves, which is then given to it."""
    leaving = distributor.assign()
    for r, scheduler in leaving:
        scheduler.add(r)
    return {r.request_id: ranks.index(scheduler) for r, scheduler in leaving}


def distributed(ranks: list[Scheduler], *requests: Request, balance: Balance | None = None) -> dict[int, int]:
    distributor = Distributor(ranks, balance)
    for r in requests:
        distributor.add(r)
    return assign(distributor, ranks)


def test_the_longest_prompt_goes_where_there_are_fewest_tokens():
    ranks = schedulers(2)
    running(ranks[0], 10)
    running(ranks[1], 30)
    # 2 + 4 requests: three each. 40 to rank 0 (10 tokens), 20 to rank 1 (30), 9 and 8 to the smaller of each.
    given = distributed(ranks, request(8, 8), request(20, 20), request(40, 40), request(9, 9))
    assert given == {40: 0, 20: 1, 9: 0, 8: 1}


def test_no_rank_gets_more_requests_than_its_share():
    ranks = schedulers(2)
    running(ranks[0], 100)
    given = distributed(ranks, *[request(i, 2) for i in range(5)])
    # (1 + 5) / 2 = 3 each, though all five together are shorter than what rank 0 has.
    assert sorted(given.values()) == [0, 0, 1, 1, 1]


def test_a_crowded_rank_sets_the_share():
    ranks = schedulers(3)
    running(ranks[0], 5, 5, 5, 5)
    given = distributed(ranks, *[request(i, 3) for i in range(4)])
    assert sorted(given.values()) == [1, 1, 2, 2]


def test_pinned_requests_come_first_and_wait_for_their_rank():
    ranks = schedulers(2, batch=2)
    running(ranks[1], 4)
    distributor = Distributor(ranks)
    for r in (request(1, 9, dp_rank=1), request(2, 3, dp_rank=1), request(3, 3)):
        distributor.add(r)
    assert assign(distributor, ranks) == {1: 1, 3: 0}
    assert distributor.num_waiting == 1
    ranks[1].schedule()
    ranks[1].finish(ranks[1].running[0], "stop")
    assert assign(distributor, ranks) == {2: 1}
    assert distributor.num_waiting == 0


def test_a_relaxed_request_goes_elsewhere_when_its_rank_is_full():
    ranks = schedulers(2, batch=1)
    running(ranks[1], 4)
    assert distributed(ranks, request(1, 5, dp_rank=1, dp_relax=True)) == {1: 0}
    ranks = schedulers(2, batch=2)
    assert distributed(ranks, request(1, 5, dp_rank=1, dp_relax=True)) == {1: 1}


def test_a_strictly_pinned_request_goes_before_a_relaxed_one():
    ranks = schedulers(2, batch=1)
    assert distributed(ranks, request(1, 5, dp_rank=0, dp_relax=True), request(2, 5, dp_rank=0)) == {1: 1, 2: 0}


def test_higher_priority_leaves_first_and_others_wait_for_room():
    ranks = schedulers(2, batch=1)
    distributor = Distributor(ranks)
    for r in (request(1, 3), request(2, 3), request(3, 3, priority=5)):
        distributor.add(r)
    assert set(assign(distributor, ranks)) == {1, 3}
    assert assign(distributor, ranks) == {}
    assert distributor.num_waiting == 1


def test_requests_end_while_they_wait():
    ranks = schedulers(2, batch=1)
    distributor = Distributor(ranks)
    late, gone = request(1, 3, deadline=time.monotonic() - 1), request(2, 3)
    distributor.add(late)
    distributor.add(gone)
    assert distributor.expired() == [late]
    distributor.finish(late, "timeout")
    distributor.finish(gone, "cancelled")
    assert distributor.num_waiting == 0
    assert assign(distributor, ranks) == {}


def test_balanced_prompts_wait_for_each_other_but_not_for_ever():
    ranks = schedulers(2)
    running(ranks[0], 5)
    running(ranks[1], 5)
    distributor = Distributor(ranks, Balance(timeout_iters=3, batching_wait_iters=2))
    distributor.add(request(1, 5))
    assert [assign(distributor, ranks) for _ in range(3)] == [{}, {}, {1: 0}]  # one prompt, two ranks: the timeout
    for r in (request(2, 5), request(3, 5)):
        distributor.add(r)
    waits = [assign(distributor, ranks) for _ in range(3)]
    assert waits[:2] == [{}, {}] and sorted(waits[2].values()) == [0, 1]  # both can start: they wait for company


def test_balanced_prompts_do_not_wait_for_an_idle_rank():
    ranks = schedulers(2)
    running(ranks[0], 5)
    assert distributed(ranks, request(1, 5), balance=Balance()) == {1: 1}


@pytest.mark.parametrize("seed", range(20))
def test_everything_is_dealt_once_and_no_rank_overflows(seed):
    import random

    rng = random.Random(seed)
    ranks = schedulers(rng.randint(2, 5), batch=rng.randint(1, 6))
    distributor = Distributor(ranks)
    number, dealt = 0, []
    for _ in range(30):
        for _ in range(rng.randint(0, 8)):
            rank = rng.choice((None, rng.randrange(len(ranks))))
            distributor.add(request(number, rng.randint(1, 30), dp_rank=rank, dp_relax=rng.random() < 0.5))
            number += 1
        dealt += list(assign(distributor, ranks))
        for scheduler in ranks:
            assert len(scheduler.running) + scheduler.num_waiting <= scheduler.max_batch_size
            scheduler.schedule()
            for r in [r for r in scheduler.running if rng.random() < 0.5]:
                scheduler.finish(r, "stop")
    assert len(dealt) == len(set(dealt)) == number - distributor.num_waiting
