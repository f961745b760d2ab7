"""How long a heavy request makes everybody else wait: /health and the other streams of a busy server.

    deepseek-fp4 serve r1_nano --max_batch_size 80 --max_seq_len 8192 --tool_parser deepseek_v3 &
    python benchmarks/busy_server.py --url http://localhost:8000 --streams 64 --json busy.jsonl

While `--streams` endless streams run, another process asks /health every few milliseconds. For each kind of heavy
request the same is measured twice, without and with it (sent again and again for `--seconds`): the delays of /health,
the gaps between two pieces of a stream, the engine's steps meanwhile, and how long the heavy request itself took and
what came of it. The delays are a client's: they contain what the machine's other programs take.

A step is what a stream waits for at the least: one pass of the model over everything that runs, and what a prompt may
add to it (--max_prompt_seconds of the server). Its seconds are the engine's own (/iteration_stats). What a stream waits
beyond, its gap less the step, is the server's doing and the client's.
"""

import argparse
import asyncio
import datetime
import json
import multiprocessing
import platform
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

PAUSE = 0.004  # seconds between two questions


def words(size: int) -> str:
    """English of so many bytes."""
    text = "the quick brown fox jumps over the lazy dog and finds 42 reasons to go home "
    return (text * (size // len(text) + 1))[:size]


def completion(prompt: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": prompt, "max_tokens": 1, **fields}


def chat(messages: list[dict[str, Any]], **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": messages, "max_tokens": 1, **fields}


def schema(properties: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(properties)}}


KINDS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "text, 100 KB": lambda: completion(words(100_000)),
    "text, 1.5 MB": lambda: completion(words(1_500_000)),
    "text, 6 MB": lambda: completion(words(6_000_000)),
    "text, 15 MB": lambda: completion(words(15_000_000)),
    "one long word, 6 MB": lambda: completion("a" * 6_000_000),
    "tokens, 3 million": lambda: completion([7] * 3_000_000),
    "tokens, 100 lists of 20,000": lambda: completion([[7] * 20_000] * 100),
    "chat, 6 MB": lambda: chat([{"role": "user", "content": words(6_000_000)}]),
    "chat, 100,000 messages": lambda: chat([{"role": "user", "content": "hi"}] * 100_000),
    "chat, 4 million empty messages": lambda: chat([{}] * 4_000_000),
    "response, 100,000 items": lambda: (
        "/v1/responses", {"input": [{"role": "user", "content": "hi"}] * 100_000, "max_output_tokens": 1}),
    "response that goes on, 100,000 items": lambda: (
        "/v1/responses", {"input": [{"role": "user", "content": "hi"}] * 100_000, "previous_response_id": "",
                          "max_output_tokens": 1}),
    "response that goes on, 1,000 items": lambda: (
        "/v1/responses", {"input": [{"role": "user", "content": "hi"}] * 1_000, "previous_response_id": "",
                          "max_output_tokens": 1}),
    "message, 100,000 turns": lambda: (
        "/v1/messages", {"messages": [{"role": "user", "content": "hi"}] * 100_000, "max_tokens": 1}),
    "chat, 2,000 messages": lambda: chat([{"role": "user", "content": "hi"}] * 2_000),
    "chat, 100 tools of 20 KB": lambda: chat(
        [{"role": "user", "content": "hi"}], tool_choice="required",
        tools=[{"type": "function", "function": {"name": f"f{i}", "parameters": schema(500)}} for i in range(100)]),
    "choice, 5 MB": lambda: chat(
        [{"role": "user", "content": "hi"}], guided_choice=[words(5000) + str(i) for i in range(1000)]),
    "schema, 3,000 properties": lambda: chat([{"role": "user", "content": "hi"}], guided_json=schema(3000)),
    "unknown field, 15 MB": lambda: completion("hi", unknown=words(15_000_000)),
    "/tokenize, 6 MB": lambda: ("/tokenize", {"prompt": words(6_000_000)}),
    "/detokenize, 3 million": lambda: ("/detokenize", {"tokens": [7] * 3_000_000}),
    "log-probabilities, 1,000 tokens, top 20": lambda: completion("a", max_tokens=1000, logprobs=20, ignore_eos=True),
    "n of 64, 64 tokens": lambda: completion("a", max_tokens=64, n=16, temperature=1.0, ignore_eos=True),
}  # fmt: skip


def ping(host: str, port: int, pipe: Any) -> None:
    """Ask /health on one connection until told to stop; answers (when, seconds)."""
    question = f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    delays: list[tuple[float, float]] = []
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not pipe.poll():
            began = time.perf_counter()
            connection.sendall(question)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            delays.append((began, time.perf_counter() - began))
            time.sleep(PAUSE)
    pipe.recv()
    pipe.send(delays)


async def stream(url: str, model: str, number: int, gaps: list[tuple[float, float]], stop: threading.Event) -> None:
    """One endless stream; every gap between two of its pieces, (when, seconds)."""
    address = urllib.parse.urlsplit(url)
    body = json.dumps({"model": model, "prompt": [7, 8, 9 + number], "max_tokens": 1_000_000, "ignore_eos": True,
                       "temperature": 1.0, "seed": number, "stream": True}).encode()  # fmt: skip
    while not stop.is_set():
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                     "Content-Type: application/json\r\n\r\n".encode() + body)  # fmt: skip
        last = None
        while not stop.is_set() and (piece := await reader.read(1 << 16)):
            now = time.perf_counter()
            if last is not None:
                gaps.append((last, now - last))
            last = now
            if b"[DONE]" in piece:
                break
        writer.close()


def streams(url: str, model: str, count: int, pipe: Any) -> None:
    gaps: list[tuple[float, float]] = []
    stop = threading.Event()

    async def run() -> None:
        tasks = [asyncio.create_task(stream(url, model, number, gaps, stop)) for number in range(count)]
        await asyncio.to_thread(pipe.recv)
        stop.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    pipe.send(gaps)


def send(url: str, path: str, body: bytes, until: float) -> tuple[list[float], list[str]]:
    """The request again and again; seconds of each and what came of it."""
    seconds, outcomes = [], []
    while time.perf_counter() < until or not seconds:
        began = time.perf_counter()
        answer = httpx.post(f"{url}{path}", content=body, headers={"Content-Type": "application/json"}, timeout=600)
        seconds.append(time.perf_counter() - began)
        message = answer.json().get("error", {}).get("message", "") if answer.status_code != 200 else ""
        outcomes.append(f"{answer.status_code} {message[:60]}".strip())
    return seconds, outcomes


def earlier(url: str, model: str) -> str:
    """The id of a response to go on from."""
    answer = httpx.post(f"{url}/v1/responses", json={"model": model, "input": "hi", "max_output_tokens": 1}, timeout=60)
    return answer.json()["id"]


def summary(found: list[tuple[float, float]], began: float, ended: float) -> dict[str, float]:
    """Milliseconds of what began in that time."""
    chosen = sorted(seconds * 1000 for when, seconds in found if began <= when < ended)
    if not chosen:
        return {"count": 0}
    return {"count": len(chosen), **{f"p{p}": chosen[min(len(chosen) - 1, len(chosen) * p // 100)] for p in (50, 99)},
            "longest": chosen[-1]}  # fmt: skip


def steps(url: str) -> list[float]:
    """Seconds of the engine's steps since this was last asked, the newest thousand at most."""
    return [step["seconds"] for step in httpx.get(f"{url}/iteration_stats", timeout=60).json()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="some of them")
    parser.add_argument("--json", type=Path, help="append a line for each kind to this file")
    args = parser.parse_args()
    model = httpx.get(f"{args.url}/v1/models").json()["data"][0]["id"]
    address = urllib.parse.urlsplit(args.url)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for target, arguments in ((ping, (address.hostname, address.port)), (streams, (args.url, model, args.streams))):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=target, args=(*arguments, theirs)))
        processes[-1].start()
        pipes.append(ours)
    time.sleep(3.0)
    times = []
    for kind in args.kinds:
        path, fields = KINDS[kind]()
        if "previous_response_id" in fields:
            fields["previous_response_id"] = earlier(args.url, model)
        body = json.dumps({"model": model, **fields}).encode()
        steps(args.url)
        quiet = time.perf_counter()
        time.sleep(args.seconds)
        began, without = time.perf_counter(), steps(args.url)
        seconds, outcomes = send(args.url, path, body, began + args.seconds)
        ended, with_it = time.perf_counter(), steps(args.url)
        times.append((kind, quiet, began, ended, seconds, outcomes, without, with_it))
    for pipe in pipes:
        pipe.send(None)
    delays, gaps = (pipe.recv() for pipe in pipes)
    for process in processes:
        process.join()
    facts = {"when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": platform.processor(),
             "streams": args.streams}  # fmt: skip
    print(f"p99 and longest, milliseconds, without and with each request\n{'':42}{'/health':>20}{'gap of a stream':>24}"
          f"{'step':>24}{'gap p99 less step p99':>24}  each request")  # fmt: skip
    for kind, quiet, began, ended, seconds, outcomes, *engine in times:
        parts = [summary(found, *span) for found in (delays, gaps) for span in ((quiet, began), (began, ended))]
        parts += [summary([(0.0, step) for step in part], 0.0, 1.0) for part in engine]
        shown = [f"{part.get('p99', 0):.0f}, {part.get('longest', 0):.0f}" for part in parts]
        pairs = [f"{without}; {with_it}" for without, with_it in zip(shown[::2], shown[1::2], strict=True)]
        beyond = [gap.get("p99", 0) - step.get("p99", 0) for gap, step in zip(parts[2:4], parts[4:], strict=True)]
        print(f"{kind:42}{pairs[0]:>20}{pairs[1]:>24}{pairs[2]:>24}{f'{beyond[0]:.0f}; {beyond[1]:.0f}':>24}  "
              f"{sum(seconds) / len(seconds):.2f} s x {len(seconds)}: {outcomes[0]}")  # fmt: skip
        if args.json:
            names = ("health_without", "health_with", "gaps_without", "gaps_with", "steps_without", "steps_with")
            line = {**facts, "kind": kind, **dict(zip(names, parts, strict=True)), "seconds": seconds,
                    "outcome": outcomes[0]}  # fmt: skip
            with args.json.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
