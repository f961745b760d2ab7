"""Replay a public request trace against an OpenAI-compatible server: TTFT, ITL and E2E percentiles, and goodput.

    deepseek-fp4 serve r1_nano --port 8000 &
    python benchmarks/serving.py --url http://localhost:8000 --trace FILE [--rate 4 8 16] [--length-scale 0.1]

The traces are Azure's (AzureLLMInferenceTrace_*.csv: TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's
(*_trace.jsonl: timestamp in ms, input_length, output_length, hash_ids), gzipped or not. They hold no text: prompts are
made of seeded token ids, and Mooncake's equal hash_ids become equal blocks, so that prefix caching has its due. Arrival
times are scaled to each `--rate` (requests a second, mean), lengths by `--length-scale`. Requests are sent when the
trace says, whether or not earlier ones are done (open loop); answers are forced to the trace's length by `ignore_eos`.

Goodput counts the requests a second that met both limits, `--ttft-limit` and `--itl-limit` (their mean time between
tokens). A request refused or broken off is counted and meets no limit. One JSON line for each rate is appended to
`--json`; `--chart` draws percentiles and goodput over the rates (needs matplotlib).
"""

import argparse
import asyncio
import csv
import datetime
import gzip
import json
import platform
import random
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

BLOCK = 512  # tokens of one Mooncake hash id


@dataclass
class Arrival:
    """One request of a trace; `seconds` since its beginning."""

    seconds: float
    input_tokens: int
    output_tokens: int
    hash_ids: list[int] = field(default_factory=list)


@dataclass
class Result:
    """What became of one request. Times in seconds since it was sent."""

    status: str
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals in order. Raises ValueError for a file of neither form."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        if ".csv" in path.name:
            rows = list(csv.DictReader(file))
            times = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
            return [
                Arrival((when - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                for when, row in zip(times, rows, strict=True)
            ]
        if ".jsonl" in path.name:
            records = [json.loads(line) for line in file if line.strip()]
            return [
                Arrival(r["timestamp"] / 1000, r["input_length"], r["output_length"], r["hash_ids"]) for r in records
            ]
    raise ValueError(f"{path} is neither an Azure .csv nor a Mooncake .jsonl trace")


def scaled(arrivals: list[Arrival], count: int, rate: float, length_scale: float, limit: int) -> list[Arrival]:
    """The first `count` at a mean of `rate` a second, lengths scaled, prompt + answer cut to `limit` tokens."""
    chosen = arrivals[:count]
    span = chosen[-1].seconds - chosen[0].seconds
    stretch = (len(chosen) - 1) / rate / span if span > 0 else 0.0
    out = []
    for a in chosen:
        produced = min(max(1, round(a.output_tokens * length_scale)), limit // 2)
        given = min(max(1, round(a.input_tokens * length_scale)), limit - produced)
        out.append(Arrival((a.seconds - chosen[0].seconds) * stretch, given, produced, a.hash_ids))
    return out


def prompt_ids(arrival: Arrival, number: int, length_scale: float, vocabulary: tuple[int, int], seed: int) -> list[int]:
    """Seeded token ids; equal hash ids give equal blocks."""
    block = max(1, round(BLOCK * length_scale))
    keys = [f"{seed}/{h}" for h in arrival.hash_ids] or [f"{seed}/request {number}"]
    size = block if arrival.hash_ids else arrival.input_tokens
    ids: list[int] = []
    for key in keys:
        rng = random.Random(key)
        ids += [rng.randrange(*vocabulary) for _ in range(size)]
    rng = random.Random(f"{seed}/rest {number}")
    ids += [rng.randrange(*vocabulary) for _ in range(arrival.input_tokens - len(ids))]
    return ids[: arrival.input_tokens]


async def one(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Result:
    """Send one streaming completion and time its tokens by their arrival here."""
    began = time.perf_counter()
    result, previous = Result("ok"), None
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return Result(f"http {response.status_code}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    result.status = "error event"
                    break
                if chunk["choices"] and (count := len(chunk["choices"][0].get("token_ids", ()))):
                    now = time.perf_counter() - began
                    if previous is None:
                        result.first = now
                    else:
                        result.gaps += [(now - previous) / count] * count
                    previous = result.last = now
                    result.tokens += count
    except httpx.HTTPError as error:
        result.status = type(error).__name__
    return result


async def replay(args: argparse.Namespace, model: str, limit: int, rate: float, arrivals: list[Arrival]) -> dict:
    """Run one rate; the summary."""
    chosen = scaled(arrivals, args.requests, rate, args.length_scale, min(limit, args.max_context))
    vocabulary = (args.first_id, args.last_id)
    bodies = [
        {
            "model": model,
            "prompt": prompt_ids(a, i, args.length_scale, vocabulary, args.seed),
            "max_tokens": a.output_tokens,
            "ignore_eos": True,
            "temperature": args.temperature,
            "seed": i,
            "stream": True,
            "return_token_ids": True,
        }
        for i, a in enumerate(chosen)
    ]
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=args.timeout, limits=limits, headers=headers) as client:
        began = time.perf_counter()

        async def at(arrival: Arrival, body: dict[str, Any]) -> Result:
            await asyncio.sleep(max(0.0, arrival.seconds - (time.perf_counter() - began)))
            return await one(client, args.url, body)

        results = await asyncio.gather(*(at(a, b) for a, b in zip(chosen, bodies, strict=True)))
        wall = time.perf_counter() - began
    return summary(args, rate, chosen, results, wall)


def percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    at = {f"p{p}": ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] for p in (50, 90, 99)}
    return {k: round(v * 1000, 3) for k, v in {"mean": statistics.fmean(values), **at}.items()}


def summary(args, rate: float, chosen: list[Arrival], results: list[Result], wall: float) -> dict[str, Any]:
    """Milliseconds, but `wall_s`; rates in requests or tokens a second."""
    done = [r for r in results if r.status == "ok" and r.first is not None]
    good = [r for r in done if r.first * 1000 <= args.ttft_limit  # type: ignore[operator]
            and (not r.gaps or statistics.fmean(r.gaps) * 1000 <= args.itl_limit)]  # fmt: skip
    statuses: dict[str, int] = {}
    for r in results:
        statuses[r.status] = statuses.get(r.status, 0) + 1
    return {
        "trace": args.trace.name, "rate": rate, "length_scale": args.length_scale, "requests": len(results),
        "input_tokens": sum(a.input_tokens for a in chosen), "output_tokens": sum(r.tokens for r in done),
        "wall_s": round(wall, 3), "statuses": statuses,
        "ttft_ms": percentiles([r.first for r in done]),  # type: ignore[misc]
        "itl_ms": percentiles([gap for r in done for gap in r.gaps]),
        "e2e_ms": percentiles([r.last for r in done]),  # type: ignore[misc]
        "tokens_per_s": round(sum(r.tokens for r in done) / wall, 2),
        "requests_per_s": round(len(done) / wall, 3),
        "goodput_per_s": round(len(good) / wall, 3), "goodput_share": round(len(good) / len(results), 4),
        "ttft_limit_ms": args.ttft_limit, "itl_limit_ms": args.itl_limit, "temperature": args.temperature,
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Percentiles and goodput over the offered rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), constrained_layout=True)
    rates = [row["rate"] for row in rows]
    for axis, name, title in zip(axes, ("ttft_ms", "itl_ms", "e2e_ms"),
                                 ("Time to first token", "Between tokens", "Whole answer"), strict=False):  # fmt: skip
        for percentile in ("p50", "p90", "p99"):
            axis.plot(rates, [row[name].get(percentile) for row in rows], marker="o", label=percentile)
        axis.set(title=title, xlabel="requests/s offered", ylabel="ms", yscale="log")
        axis.legend()
    axes[3].plot(rates, [row["goodput_per_s"] for row in rows], marker="o", label="goodput")
    axes[3].plot(rates, [row["requests_per_s"] for row in rows], marker="o", label="finished")
    axes[3].plot(rates, rates, linestyle=":", color="grey", label="offered")
    axes[3].set(title="Goodput", xlabel="requests/s offered", ylabel="requests/s")
    axes[3].legend()
    figure.suptitle(
        f"{rows[0]['trace']}, lengths x {rows[0]['length_scale']:g}, {rows[0]['requests']} requests a rate; goodput: "
        f"TTFT at most {rows[0]['ttft_limit_ms']:g} ms, mean ITL at most {rows[0]['itl_limit_ms']:g} ms"
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--rate", type=float, nargs="+", default=[4.0], help="requests a second")
    parser.add_argument("--requests", type=int, default=100, help="of the trace's beginning, for each rate")
    parser.add_argument("--length-scale", type=float, default=1.0)
    parser.add_argument("--max-context", type=int, default=1 << 20, help="cut prompt + answer to this many tokens")
    parser.add_argument("--first-id", type=int, default=100, help="prompts are made of ids from here ...")
    parser.add_argument("--last-id", type=int, default=700, help="... to before here")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ttft-limit", type=float, default=500.0, help="ms")
    parser.add_argument("--itl-limit", type=float, default=50.0, help="ms")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds without a byte")
    parser.add_argument("--api-key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append one line for each rate")
    parser.add_argument("--chart", type=Path, help="PNG to draw")
    args = parser.parse_args()
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    card = httpx.get(f"{args.url}/v1/models", headers=headers).raise_for_status().json()["data"][0]
    arrivals = read_trace(args.trace)
    rows = []
    print(f"{'rate':>6} {'TTFT p50':>9} {'p90':>8} {'p99':>8} {'ITL p50':>8} {'p99':>8} {'E2E p50':>9} {'p99':>9} "
          f"{'tok/s':>8} {'goodput/s':>9} {'share':>6}  statuses")  # fmt: skip
    for rate in args.rate:
        row = asyncio.run(replay(args, card["id"], card["max_model_len"], rate, arrivals))
        rows.append(row)
        t, i, e = row["ttft_ms"], row["itl_ms"], row["e2e_ms"]
        print(f"{rate:6g} {t.get('p50', 0):9.1f} {t.get('p90', 0):8.1f} {t.get('p99', 0):8.1f} {i.get('p50', 0):8.2f} "
              f"{i.get('p99', 0):8.2f} {e.get('p50', 0):9.1f} {e.get('p99', 0):9.1f} {row['tokens_per_s']:8.1f} "
              f"{row['goodput_per_s']:9.3f} {row['goodput_share']:6.2f}  {row['statuses']}")  # fmt: skip
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if args.chart:
        chart(rows, args.chart)


if __name__ == "__main__":
    main()
