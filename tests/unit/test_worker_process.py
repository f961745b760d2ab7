"""A worker's loop between its front and its runner: order, questions, and failures, with and without overlap."""

import pickle
import threading
from multiprocessing import Pipe

import pytest

from deepseek_fp4_plugin.engine.worker_process import Question, compute


class SlowRunner:
    """Answers 10 times the plan; a step is computed when it is collected, as beside the host. Plan 7 is a fault."""

    def __init__(self):
        self.submitted, self.most = [], 0
        self.gate = threading.Semaphore(0)

    def submit(self, plan: int) -> None:
        self.submitted.append(plan)
        self.most = max(self.most, len(self.submitted))

    def collect(self) -> int:
        self.gate.acquire()
        plan = self.submitted.pop(0)
        if plan == 7:
            raise RuntimeError("device lost")
        return 10 * plan

    def explain(self, token_ids: list[int]) -> str:
        if not token_ids:
            raise ValueError("no tokens")
        return f"because of {token_ids}"


def start(runner: SlowRunner, asynchronous: bool, answers: bool = True):
    """The front's end of the connection, and a list that holds what ended the loop."""
    front, work = Pipe()
    ended: list[BaseException] = []

    def run() -> None:
        try:
            compute(work, runner, answers, asynchronous)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return front, thread, ended


@pytest.mark.parametrize("asynchronous", [False, True])
def test_answers_come_in_order_and_a_closed_group_ends_the_loop(asynchronous):
    runner = SlowRunner()
    front, thread, ended = start(runner, asynchronous)
    for asked in (1, 2, Question([5]), 3, Question([])):
        front.send_bytes(pickle.dumps(asked))
    runner.gate.release(3)
    answers = [front.recv() for _ in range(5)]
    assert answers[:4] == [10, 20, "because of [5]", 30]
    assert "no tokens" in str(answers[4])
    front.close()
    thread.join(5)
    assert isinstance(ended[0], EOFError | OSError)


def test_a_step_is_started_while_the_one_before_it_is_computed():
    runner = SlowRunner()
    front, *_ = start(runner, asynchronous=True)
    front.send(1)
    front.send(2)
    for _ in range(500):
        if runner.most == 2:
            break
        threading.Event().wait(0.01)
    assert runner.most == 2 and not front.poll()
    runner.gate.release(2)
    assert [front.recv(), front.recv()] == [10, 20]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_step_is_what_ends_the_loop(asynchronous):
    runner = SlowRunner()
    front, thread, ended = start(runner, asynchronous)
    front.send(7)
    runner.gate.release()
    thread.join(5)
    assert str(ended[0]) == "device lost"


def test_a_rank_that_is_not_asked_says_nothing():
    runner = SlowRunner()
    front, *_ = start(runner, asynchronous=False, answers=False)
    front.send(1)
    runner.gate.release()
    assert not front.poll(0.2)
    assert runner.submitted == []
