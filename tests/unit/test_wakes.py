"""An event loop's readers: woken at once, or all together and not too often, on a clock of the test's own."""

import asyncio

import pytest

from deepseek_fp4_plugin.engine.wakes import LONGEST, Wakes


class Clock:
    """Stands in for the running loop: its time goes on by `pass_to` alone."""

    def __init__(self):
        self.now, self.timers = 100.0, []

    def time(self) -> float:
        return self.now

    def call_at(self, when, work, *args):
        self.timers.append((when, work, args))
        return self.timers[-1]

    def pass_to(self, now: float) -> None:
        self.now = now
        due = [timer for timer in self.timers if timer[0] <= now]
        self.timers = [timer for timer in self.timers if timer[0] > now]
        for _, work, args in due:
            work(*args)


class Reader:
    def __init__(self, urgent: bool = False):
        self.urgent, self.woken = urgent, 0

    def wake(self) -> None:
        self.woken += 1


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    return clock


def counts(readers: list[Reader]) -> list[int]:
    return [reader.woken for reader in readers]


def test_without_a_rate_every_step_wakes(clock):
    wakes, readers = Wakes(), [Reader() for _ in range(3)]
    for _ in range(5):
        wakes.add(readers)
    assert counts(readers) == [5, 5, 5]
    assert not clock.timers


def test_many_readers_are_woken_together_and_no_more_often_than_the_rate(clock):
    wakes, readers = Wakes(rate=1000.0), [Reader() for _ in range(20)]  # every 20 ms
    wakes.add(readers)
    assert counts(readers) == [1] * 20  # nobody was woken before
    for step in range(1, 4):
        clock.pass_to(100.0 + 0.006 * step)
        wakes.add(readers[:10] if step % 2 else readers)
    assert counts(readers) == [1] * 20
    assert len(clock.timers) == 1
    clock.pass_to(100.021)  # with no step at all
    assert counts(readers) == [2] * 20
    assert not clock.timers
    clock.pass_to(100.1)
    wakes.add(readers)  # a slow engine is not waited for
    assert counts(readers) == [3] * 20


def test_few_readers_are_woken_at_every_step_of_a_fast_engine(clock):
    wakes, reader = Wakes(rate=1000.0), Reader()
    for step in range(50):
        clock.pass_to(100.0 + 0.002 * step)
        wakes.add([reader])
    assert reader.woken == 50


def test_beginnings_and_ends_do_not_wait(clock):
    wakes, readers = Wakes(rate=1000.0), [Reader() for _ in range(20)]
    wakes.add(readers)
    clock.pass_to(100.001)
    wakes.add(readers)
    readers[3].urgent = True
    wakes.add([readers[3], Reader()])
    assert counts(readers) == [1, 1, 1, 2] + [1] * 16
    clock.pass_to(100.03)
    assert counts(readers) == [2] * 20  # the urgent one not once more


def test_nothing_is_held_back_longer_than_the_longest(clock):
    wakes, readers = Wakes(rate=10.0), [Reader() for _ in range(1000)]
    wakes.add(readers)
    clock.pass_to(100.001)
    wakes.add(readers)
    clock.pass_to(100.0 + LONGEST + 0.001)
    assert counts(readers) == [2] * 1000
