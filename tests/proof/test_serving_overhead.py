"""What HTTP costs: streaming throughput at 64 concurrent and time to first token, against LLM.generate_async."""

import asyncio
import json
import multiprocessing
import statistics
import time

import httpx
import psutil
import pytest

from deepseek_fp4_plugin.config import SamplingParams
from deepseek_fp4_plugin.llm import LLM
from tests.end_to_end.server_process import R1_NANO, running_server

CONCURRENT, TOKENS, ROUNDS = 64, 128, 5
ENGINE = {"max_batch_size": CONCURRENT, "max_seq_len": 512, "max_num_tokens": 2048}


def prompt(number: int) -> list[int]:
    return [100 + (7 * number + 3 * i) % 500 for i in range(24)]


async def stream(port: int, number: int, tokens: int) -> tuple[float, int]:
    """Seconds to the first event and the number of tokens, read from a bare socket so that the client costs little."""
    body = {"model": R1_NANO.name, "prompt": prompt(number), "max_tokens": tokens, "ignore_eos": True,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.perf_counter()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + payload)
    first, tail = None, b""
    while chunk := await reader.read(1 << 16):
        if first is None and b"data: " in chunk:
            first = time.perf_counter() - began
        tail = (tail + chunk)[-2000:]
    writer.close()
    assert b"data: [DONE]" in tail
    usage = json.loads(tail[tail.rindex(b'"usage":') + 8 :].split(b"\n")[0][:-1])
    assert first is not None
    return first, usage["completion_tokens"]


async def http_round(port: int, concurrent: int, tokens: int) -> float:
    began = time.perf_counter()
    results = await asyncio.gather(*(stream(port, n, tokens) for n in range(concurrent)))
    assert all(count == tokens for _, count in results)
    return concurrent * tokens / (time.perf_counter() - began)


async def direct_round(llm: LLM, concurrent: int, tokens: int) -> float:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)

    async def one(number: int) -> int:
        count = 0
        async for output in llm.generate_async(prompt(number), params, streaming=True):
            count += len(output.outputs[0].token_ids_diff)
        return count

    began = time.perf_counter()
    counts = await asyncio.gather(*(one(n) for n in range(concurrent)))
    assert counts == [tokens] * concurrent
    return concurrent * tokens / (time.perf_counter() - began)


async def direct_first(llm: LLM, number: int) -> float:
    began = time.perf_counter()
    handle = llm.generate_async(prompt(number), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True), True)
    first = None
    async for _ in handle:
        first = first or time.perf_counter() - began
    assert first is not None
    return first


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def http_client(port: int, concurrent: int, tokens: int, answer) -> None:
    answer.send(asyncio.run(http_round(port, concurrent, tokens)))


@pytest.mark.proof
@pytest.mark.alone
def test_streaming_over_http_keeps_most_of_the_engines_throughput(tmp_path):
    flags = [f"--{name}={value}" for name, value in ENGINE.items()]
    context = multiprocessing.get_context("spawn")

    def rate_of(port: int) -> float:
        receive, send = context.Pipe(duplex=False)
        client = context.Process(target=http_client, args=(port, CONCURRENT, TOKENS, send))
        client.start()
        rate = receive.recv()
        client.join()
        return rate

    ratios, direct_rates, http_rates, direct_ttft, http_ttft = [], [], [], [], []
    direct_cpu, http_cpu, coarse_ratios = [], [], []
    (tmp_path / "coarse").mkdir()
    with (
        running_server(tmp_path, *flags) as server,
        running_server(tmp_path / "coarse", *flags, "--stream_interval=4") as coarse,
        LLM(model=R1_NANO, **ENGINE) as llm,
    ):
        for port in (server.port, coarse.port):
            asyncio.run(http_round(port, 8, 8))
        asyncio.run(direct_round(llm, 8, 8))
        processes = psutil.Process(), psutil.Process(server.process.pid)
        for _ in range(ROUNDS):  # side by side, so that a busy machine is busy for both
            before = [cpu_seconds(process) for process in processes]
            direct_rates.append(asyncio.run(direct_round(llm, CONCURRENT, TOKENS)))
            direct_cpu.append(cpu_seconds(processes[0]) - before[0])
            http_rates.append(rate_of(server.port))
            http_cpu.append(cpu_seconds(processes[1]) - before[1])
            ratios.append(http_rates[-1] / direct_rates[-1])
            coarse_ratios.append(rate_of(coarse.port) / direct_rates[-1])
        for number in range(100, 140):
            direct_ttft.append(asyncio.run(direct_first(llm, number)))
            http_ttft.append(asyncio.run(stream(server.port, number, 2))[0])
        assert httpx.get(f"{server.url}/health").status_code == 200
    added = (statistics.median(http_ttft) - statistics.median(direct_ttft)) * 1000
    print(f"\ntokens/s direct {direct_rates}, over HTTP {http_rates}: ratios {ratios}")
    print(f"ratios with --stream_interval=4 {coarse_ratios}")
    print(f"TTFT median direct {statistics.median(direct_ttft) * 1000:.2f} ms, HTTP adds {added:.2f} ms")
    print(f"CPU seconds of {CONCURRENT * TOKENS} tokens: direct {direct_cpu}, the server's {http_cpu}")
    assert statistics.median(coarse_ratios) >= 0.85
    assert statistics.median(ratios) >= 0.85
    assert added < 5
