"""Faults: clients that vanish or read slowly, far too many, SIGTERM under load, a dead engine. Nothing may leak."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time

import httpx
import psutil
import pytest

from tests.end_to_end.server_process import Server, running_server

pytestmark = pytest.mark.proof


def request_bytes(server: Server, **fields) -> bytes:
    body = json.dumps({"model": server.name, "prompt": "abc", "max_tokens": 64, "ignore_eos": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


def held(server: Server) -> tuple[int, float]:
    """Open file descriptors and resident MiB of the server."""
    process = psutil.Process(server.process.pid)
    return process.num_fds(), process.memory_info().rss / 2**20


def settle(server: Server, fds: int, seconds: float = 30) -> tuple[int, float]:
    server.wait_idle(seconds)
    deadline = time.monotonic() + seconds
    while held(server)[0] > fds and time.monotonic() < deadline:
        time.sleep(0.1)
    return held(server)


async def vanish(server: Server, rng: random.Random) -> None:
    """Connect, send all or part of a request, read for a while or not, and go without a word."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    fields = {"stream": rng.random() < 0.6, "max_tokens": rng.choice([1, 64, 1000]), "n": rng.choice([1, 1, 3])}
    data = request_bytes(server, temperature=1.0, prompt="x" * rng.randrange(1, 200), **fields)
    writer.write(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
    if rng.random() < 0.7:
        with contextlib.suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(reader.read(rng.choice([1, 100, 4000])), rng.random() * 2)
    if rng.random() < 0.5:
        writer.transport.abort()  # a reset
    else:
        writer.close()


def test_five_hundred_clients_that_vanish(tmp_path):
    with running_server(tmp_path, "--max_batch_size", "16", "--max_seq_len", "2048", "--max_queue", "1000") as server:

        async def storm(seed: int) -> None:
            rng = random.Random(seed)

            async def one() -> None:
                await asyncio.sleep(rng.random() * 5)
                await vanish(server, rng)

            await asyncio.gather(*(one() for _ in range(500)))

        # Resident memory rises while the allocators of the engine's threads find their size, then it must stand still.
        sizes, fds = [], []
        for seed in range(24):
            asyncio.run(storm(seed))
            now_fds, memory = settle(server, fds[0] + 2 if fds else 60)
            sizes.append(round(memory, 1))
            fds.append(now_fds)
            if len(sizes) > 4 and sizes[-1] < sizes[-4] * 1.03:
                break
        print(f"\nafter each 500 clients: file descriptors {fds}, resident MiB {sizes}")
        assert sizes[-1] < sizes[-4] * 1.03
        assert fds[-1] <= fds[0] + 2
        assert server.wait_idle()["deepseek_fp4_kv_cache_blocks_used"] == 0
        assert server.complete("a" * 1500, max_tokens=4).status_code == 200
        assert "Traceback" not in server.log


def test_slow_readers_do_not_hold_others_up_and_end(tmp_path):
    arguments = ["--max_batch_size", "8", "--max_seq_len", "8192", "--stall_timeout", "5"]
    with running_server(tmp_path, *arguments) as server:
        fds, _ = settle(server, 60)
        stalled = []
        for _ in range(4):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(request_bytes(server, stream=True, max_tokens=6000, logprobs=5))
            stalled.append(connection)
        time.sleep(2)
        began = time.monotonic()
        assert server.complete(max_tokens=8).status_code == 200
        print(f"\na request beside four that do not read: {time.monotonic() - began:.2f} s")
        server.wait_idle(240)  # the kernel gives the stalled connections up
        for connection in stalled:
            connection.close()
        assert settle(server, fds)[0] <= fds + 2


def test_ten_times_capacity_for_a_minute(tmp_path):
    arguments = ["--max_batch_size", "8", "--max_queue", "8", "--max_seq_len", "1024"]
    with running_server(tmp_path, *arguments) as server:
        statuses: dict[object, int] = {}

        async def client(number: int, until: float) -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
                while time.monotonic() < until:
                    body = {"model": server.name, "prompt": f"client {number}", "max_tokens": 32, "ignore_eos": True,
                            "stream": number % 2 == 0}  # fmt: skip
                    response = await http.post("/v1/completions", json=body)
                    kind: object = response.status_code
                    if kind == 200 and number % 2 == 0 and not response.text.rstrip().endswith("[DONE]"):
                        kind = "cut"
                    statuses[kind] = statuses.get(kind, 0) + 1
                    if kind == 429:
                        assert int(response.headers["retry-after"]) >= 1
                        await asyncio.sleep(0.5)

        async def run() -> None:
            until = time.monotonic() + 60
            await asyncio.gather(*(client(n, until) for n in range(160)))

        fds, memory = settle(server, 60)
        asyncio.run(run())
        now_fds, now_memory = settle(server, fds + 2)
        print(f"\n{statuses}; file descriptors {fds} -> {now_fds}, resident {memory:.1f} -> {now_memory:.1f} MiB")
        assert set(statuses) == {200, 429}
        assert statuses[200] > 50
        assert now_fds <= fds + 2
        assert server.wait_idle()["deepseek_fp4_kv_cache_blocks_used"] == 0
        assert server.complete().status_code == 200


def test_sigterm_under_load_answers_or_fails_everyone(tmp_path):
    arguments = ["--max_batch_size", "8", "--max_queue", "100", "--max_seq_len", "4096", "--drain_timeout", "5"]
    with running_server(tmp_path, *arguments) as server:
        answered = 0

        async def one(http: httpx.AsyncClient, number: int) -> str:
            nonlocal answered
            body = {"model": server.name, "prompt": f"n{number}", "max_tokens": 20 if number % 2 else 4000,
                    "ignore_eos": True, "stream": number % 3 == 0}  # fmt: skip
            try:
                response = await http.post("/v1/completions", json=body)
            except httpx.TransportError as error:
                # A connection that had brought no request yet; no request was accepted on it.
                return f"refused: {type(error).__name__}"
            if response.status_code != 200:
                return f"status {response.status_code}"
            if number % 3 == 0 and not response.text.rstrip().endswith("[DONE]"):
                return "error event" if '"error"' in response.text.rsplit("data: ", 1)[1] else "cut"
            answered += 1
            return "answered"

        async def run() -> list[str]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
                tasks = [asyncio.create_task(one(http, n)) for n in range(60)]
                while not answered:
                    await asyncio.sleep(0.05)
                server.process.send_signal(signal.SIGTERM)
                return await asyncio.gather(*tasks)

        outcomes = asyncio.run(run())
        counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
        print(f"\n{counts}")
        assert "cut" not in counts
        assert counts["answered"] >= 1
        assert counts["status 503"] + counts.get("error event", 0) >= 10
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log


def test_a_dead_engine_is_reported(tmp_path):
    # The engine's thread is made to fail from outside its code: a step of the running process raises.
    program = (
        "import threading, time\n"
        "from deepseek_fp4_plugin.engine import engine\n"
        "step, began = engine.LLMEngine.step, []\n"
        "def failing(self):\n"
        "    if self.schedulers[0].running: began.append(1)\n"
        "    if len(began) > 20: raise RuntimeError('injected fault')\n"
        "    return step(self)\n"
        "engine.LLMEngine.step = failing\n"
        "from deepseek_fp4_plugin.cli import main\n"
        "main()\n"
    )
    with running_server(tmp_path, "--max_batch_size", "4", "--max_seq_len", "2048", program=program) as server:

        async def run() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
                body = {"model": server.name, "prompt": "a", "max_tokens": 500, "ignore_eos": True}
                return await asyncio.gather(
                    *(http.post("/v1/completions", json={**body, "stream": n % 2 == 0}) for n in range(12))
                )

        for number, response in enumerate(asyncio.run(run())):
            if number % 2:
                assert response.status_code == 503
                assert response.json()["error"]["type"] == "ServiceUnavailableError"
            else:
                assert '"error"' in response.text or response.status_code == 503
                assert "[DONE]" not in response.text
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert "injected fault" in health.json()["error"]["message"]
        assert server.complete().status_code == 503
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_malformed_requests_by_the_thousand(tmp_path):
    with running_server(tmp_path, "--max_batch_size", "4", "--max_seq_len", "512") as server:
        rng = random.Random(0)
        fds, memory = settle(server, 60)
        good = request_bytes(server, max_tokens=2)
        for _ in range(2000):
            data = bytearray(good)
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
                connection.sendall(bytes(data))
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(12)
            assert b" 5" not in answer[8:10], (bytes(data), answer)
        now_fds, now_memory = settle(server, fds + 2)
        print(f"\nfile descriptors {fds} -> {now_fds}, resident {memory:.1f} -> {now_memory:.1f} MiB")
        assert now_fds <= fds + 2
        assert now_memory < memory + 30
        assert server.complete().status_code == 200
        assert "Traceback" not in server.log
