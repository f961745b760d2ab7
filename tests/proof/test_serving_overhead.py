"""What HTTP costs: streaming throughput at 64 concurrent and time to first token, against LLM.generate_async.

Both sides take turns in short rounds, in alternating order, and each round is compared with its own other side: what
the machine does meanwhile comes and goes slower than a round, and a median forgets the few rounds that it hit.
"""

import asyncio
import contextlib
import gc
import json
import multiprocessing
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from deepseek_fp4_plugin.config import SamplingParams
from deepseek_fp4_plugin.llm import LLM
from tests.end_to_end.server_process import R1_NANO, running_server

CONCURRENT, TOKENS, ROUNDS, FIRSTS = 64, 128, 15, 8
ENGINE = {"max_batch_size": CONCURRENT, "max_seq_len": 512, "max_num_tokens": 2048}


def prompt(number: int) -> list[int]:
    return [100 + (7 * number + 3 * i) % 500 for i in range(24)]


def question(number: int, tokens: int) -> bytes:
    body = {"model": R1_NANO.name, "prompt": prompt(number), "max_tokens": tokens, "ignore_eos": True,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + payload


def http_round(port: int, questions: list[bytes], tokens: int) -> tuple[float, float]:
    """Seconds to the first event of any stream and to the end of all, read from bare sockets: a client costs little."""
    chooser, first = selectors.EpollSelector(), None
    began = time.perf_counter()
    for asked in questions:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(asked)
        chooser.register(connection, selectors.EVENT_READ, [b""])
    ends = []
    while chooser.get_map():
        for key, _ in chooser.select():
            chunk = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            if first is None and b"data: " in chunk:
                first = time.perf_counter() - began
            if chunk:
                key.data[0] = (key.data[0] + chunk)[-2000:]
                continue
            chooser.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
            ends.append(key.data[0])
    seconds = time.perf_counter() - began
    for end in ends:
        assert b"data: [DONE]" in end
        assert json.loads(end[end.rindex(b'"usage":') + 8 :].split(b"\n")[0][:-1])["completion_tokens"] == tokens
    assert first is not None
    return first, seconds


def http_client(pipe: Any) -> None:
    """Rounds as they are asked for: (port, numbers of prompts, tokens)."""
    while (asked := pipe.recv()) is not None:
        port, numbers, tokens = asked
        pipe.send(http_round(port, [question(number, tokens) for number in numbers], tokens))


@contextlib.contextmanager
def client_process() -> Iterator[Callable[[int, range, int], tuple[float, float]]]:
    """`http_round` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=http_client, args=(theirs,))
    process.start()
    theirs.close()  # so that a client that is lost ends the test

    def ask(port: int, numbers: range, tokens: int) -> tuple[float, float]:
        ours.send((port, numbers, tokens))
        return ours.recv()

    try:
        yield ask
    finally:
        ours.send(None)
        process.join()


def direct_round(llm: LLM, numbers: range, tokens: int) -> tuple[float, float]:
    """The same without HTTP."""
    params, first = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0), None

    async def one(number: int) -> int:
        nonlocal first
        count = 0
        async for output in llm.generate_async(prompt(number), params, streaming=True):
            first = first or time.perf_counter() - began
            count += len(output.outputs[0].token_ids_diff)
        return count

    async def run() -> list[int]:
        return await asyncio.gather(*(one(number) for number in numbers))

    began = time.perf_counter()
    counts = asyncio.run(run())
    seconds = time.perf_counter() - began
    assert counts == [tokens] * len(numbers)
    assert first is not None
    return first, seconds


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@pytest.mark.proof
@pytest.mark.alone
def test_streaming_over_http_keeps_most_of_the_engines_throughput(tmp_path):
    flags = [f"--{name}={value}" for name, value in ENGINE.items()]
    seconds: dict[str, dict[int, float]] = {"direct": {}, "http": {}, "coarse": {}}  # of a round, by its number
    cpu: dict[str, list[float]] = {name: [] for name in seconds}
    added = []  # seconds to the first token, one median of differences a round
    (tmp_path / "coarse").mkdir()
    with (
        running_server(tmp_path, *flags) as server,
        running_server(tmp_path / "coarse", *flags, "--stream_interval=4") as coarse,
        client_process() as http,
        LLM(model=R1_NANO, **ENGINE) as llm,
    ):
        sides = {
            "direct": (lambda *asked: direct_round(llm, *asked), psutil.Process()),
            "http": (lambda *asked: http(server.port, *asked), psutil.Process(server.process.pid)),
            "coarse": (lambda *asked: http(coarse.port, *asked), psutil.Process(coarse.process.pid)),
        }
        gc.collect()
        gc.freeze()  # as a server does
        for number in range(ROUNDS + 1):
            chosen = list(sides) if number % 3 == 0 else ["direct", "http"]
            for name in chosen[:: 1 if number % 2 else -1]:
                ask, process = sides[name]
                before = cpu_seconds(process)
                seconds[name][number] = ask(range(CONCURRENT), TOKENS)[1]
                cpu[name].append(cpu_seconds(process) - before)
            differences = []
            for pair in range(FIRSTS):
                one = range(pair + 100, pair + 101)
                firsts = {name: sides[name][0](one, 2)[0] for name in ("direct", "http")[:: 1 if pair % 2 else -1]}
                differences.append(firsts["http"] - firsts["direct"])
            added.append(statistics.median(differences))
        gc.unfreeze()
        assert httpx.get(f"{server.url}/health").status_code == 200
    for values in seconds.values():
        del values[0]  # everybody's warming up
    ratios = {
        name: [seconds["direct"][number] / own for number, own in seconds[name].items()] for name in ("http", "coarse")
    }
    rates = {name: CONCURRENT * TOKENS / statistics.median(values.values()) for name, values in seconds.items()}
    first_token = statistics.median(added[1:]) * 1000
    print(f"\ntokens/s: {', '.join(f'{name} {rate:.0f}' for name, rate in rates.items())}")
    for name, values in ratios.items():
        print(f"{name} / direct: median {statistics.median(values):.3f}, quartiles "
              f"{', '.join(f'{q:.3f}' for q in statistics.quantiles(values))}, of {len(values)}")  # fmt: skip
    print(f"first token: {first_token:.2f} ms later, rounds {', '.join(f'{s * 1000:.1f}' for s in added[1:])}")
    print("CPU seconds a round: "
          + ", ".join(f"{name} {statistics.median(values[1:]):.2f}" for name, values in cpu.items()))  # fmt: skip
    assert statistics.median(ratios["coarse"]) >= 0.85
    assert statistics.median(ratios["http"]) >= 0.85
    assert first_token < 5
