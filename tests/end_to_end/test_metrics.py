"""/metrics as Prometheus reads it: the dashboard's queries find their samples, and vLLM's names hold our numbers."""

import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "dashboard.json"
# A selector of a query: name{matchers}, perhaps with a range behind it.
SELECTOR = re.compile(r"\b([a-z_:][a-z0-9_:]*)\{([^}]*)\}(\[\$__rate_interval\])?")
CHANGING = ("_total", "_bucket", "_sum", "_count")


@pytest.fixture(scope="module")
def samples(parsing_server) -> dict[str, list[tuple[dict[str, str], float]]]:
    """name -> (labels, value) of each sample, of a server that has answered, streamed, refused and been probed."""
    for fields in ({}, {"stream": True}, {"max_tokens": 0}):
        parsing_server.chat(**fields)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    text = httpx.get(f"{parsing_server.url}/metrics").text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def parts(query: str) -> list[str]:
    """The sides of a division, each with labels of its own."""
    return query.split(" / ")


def wrong_with(query: str, samples: dict) -> list[str]:
    """What a query asks for that a server's samples do not have."""
    selectors, wrong = SELECTOR.findall(query), []
    if not selectors or query.count("{") != len(selectors) or query.count("(") != query.count(")"):
        return [f"{query} is not read here"]
    kept = {label for labels in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r",\s*", labels)}
    for name, matchers, changing in selectors:
        labels = {label for sample, _ in samples.get(name, ()) for label in sample}
        if name not in samples:
            wrong.append(f"no sample is named {name}")
        elif missing := ({matcher.split("=")[0] for matcher in matchers.split(",")} | kept) - labels:
            wrong.append(f"{name} has no label {missing}")
        if name.endswith(CHANGING) != bool(changing):
            wrong.append(f"{name} is a counter or it is not")
    return wrong


def test_every_query_of_the_dashboard_finds_its_samples(samples):
    found = {name: [*values] for name, values in samples.items()}
    # Without speculation nothing is drafted; the labels are those of test_drafts_are_counted_by_position.
    for name in ("drafted_tokens_total", "accepted_tokens_total"):
        found.setdefault(f"deepseek_fp4_{name}", [({"phase": "answer", "position": "0", "model_name": "m"}, 1.0)])
    asked = queries()
    assert len(asked) > 20
    assert {part: wrong for query in asked for part in parts(query) if (wrong := wrong_with(part, found))} == {}
    variable = json.loads(DASHBOARD.read_text())["templating"]["list"][1]["query"]["query"]
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable).groups()
    assert samples[name][0][0][label] == "r1_nano"


@pytest.mark.parametrize("query", [
    'sum(deepseek_fp4_no_such{model_name=~"x"})',
    'sum(rate(deepseek_fp4_num_requests_running{model_name=~"x"}[$__rate_interval]))',
    'sum by (part) (deepseek_fp4_num_requests_running{model_name=~"x"})',
    'sum(deepseek_fp4_engine_steps_total{model_name=~"x"})',
    'sum(deepseek_fp4_num_requests_running{no_such="x"})', "up",
])  # fmt: skip
def test_a_wrong_query_is_seen(samples, query):
    assert wrong_with(query, samples)


def test_every_sample_names_the_model(samples):
    own = [labels for name, values in samples.items() for labels, _ in values]
    assert own and {labels.get("model_name") for labels in own} == {"r1_nano"}


def test_vllms_names_hold_our_numbers(samples):
    def value(name: str) -> float:
        return sum(value for _, value in samples[name])

    for theirs, ours in (
        ("num_requests_running", "num_requests_running"), ("num_requests_waiting", "num_requests_waiting"),
        ("kv_cache_usage_perc", "kv_cache_usage_ratio"), ("gpu_cache_usage_perc", "kv_cache_usage_ratio"),
        ("prompt_tokens_total", "prompt_tokens_total"), ("generation_tokens_total", "generation_tokens_total"),
        ("prefix_cache_queries_total", "prompt_tokens_total"),
        ("prefix_cache_hits_total", "prefix_cache_hit_tokens_total"),
        ("num_preemptions_total", "preemptions_total"), ("request_success_total", "request_finished_total"),
        *((f"{name}{end}", f"{name}{end}") for end in ("_count", "_sum", "_bucket") for name in
          ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens",
           "request_generation_tokens")),
        ("request_time_per_output_token_seconds_sum", "time_per_output_token_seconds_sum"),
    ):  # fmt: skip
        assert value(f"vllm:{theirs}") == value(f"deepseek_fp4_{ours}"), theirs
    assert value("vllm:generation_tokens_total") > 0
    assert value("vllm:time_to_first_token_seconds_count") > 0
    assert all(labels["engine"] == "0" for labels, _ in samples["vllm:num_requests_running"])
    assert {labels["finished_reason"] for labels, _ in samples["vllm:request_success_total"]} <= {
        "stop", "length", "abort", "error"}  # fmt: skip
