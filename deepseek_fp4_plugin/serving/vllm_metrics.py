"""Our numbers under vLLM's names, for dashboards and routers made for it: those whose meaning is the same."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.samples import Sample

# Ours without its prefix: vLLM's. Counters without their `_total`.
_SAME = {
    "num_requests_running": ("num_requests_running",),
    "num_requests_waiting": ("num_requests_waiting",),
    "kv_cache_usage_ratio": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),  # a share of 1, whatever its name says
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "time_per_output_token_seconds": ("request_time_per_output_token_seconds",),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_generation_tokens": ("request_generation_tokens",),
    "prompt_tokens": ("prompt_tokens", "prefix_cache_queries"),
    "prefix_cache_hit_tokens": ("prefix_cache_hits",),
    "generation_tokens": ("generation_tokens",),
    "preemptions": ("num_preemptions",),
}
_REASONS = {"stop": "stop", "length": "length", "error": "error"}  # every other one is an abort


def vllm_families(families: Iterable[Metric], prefix: str) -> Iterator[Metric]:
    """vLLM's families of ours, whose names begin with `prefix`."""
    for family in families:
        own = family.name.removeprefix(prefix)
        for name in _SAME.get(own, ()):
            yield _renamed(family, f"vllm:{name}")
        if own == "request_finished":
            reason = _sums(family, lambda labels: (_REASONS.get(labels["reason"], "abort"),))
            yield _counter("request_success", family.documentation, ("finished_reason",), reason)
        elif own == "drafted_tokens":
            positions = _sums(family, lambda labels: (labels["position"],))
            yield _counter("spec_decode_num_drafts", "Steps that verified drafts", (), {(): positions.get(("0",), 0.0)})
            yield _counter("spec_decode_num_draft_tokens", family.documentation, (), _sums(family, lambda _: ()))
        elif own == "accepted_tokens":
            text = "Draft tokens accepted"
            yield _counter("spec_decode_num_accepted_tokens", text, (), _sums(family, lambda _: ()))
            positions = _sums(family, lambda labels: (labels["position"],))
            yield _counter("spec_decode_num_accepted_tokens_per_pos", text, ("position",), positions)


def _renamed(family: Metric, name: str) -> Metric:
    renamed = Metric(name, family.documentation, family.type, family.unit)
    renamed.samples = [
        sample._replace(name=name + sample.name.removeprefix(family.name))
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return renamed


def _sums(family: Metric, key: Callable[[dict[str, str]], tuple[str, ...]]) -> dict[tuple[str, ...], float]:
    """A counter's samples, summed over all labels that `key` does not keep."""
    sums: dict[tuple[str, ...], float] = {}
    for sample in family.samples:
        if sample.name.endswith("_total"):
            sums[key(sample.labels)] = sums.get(key(sample.labels), 0.0) + sample.value
    return sums


def _counter(name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], float]) -> Metric:
    family = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
    family.samples = [
        Sample(f"vllm:{name}_total", dict(zip(labels, key, strict=True)), value) for key, value in values.items()
    ]
    return family
