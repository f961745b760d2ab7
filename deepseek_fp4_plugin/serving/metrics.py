"""Prometheus metrics of one server: its HTTP side counted here, the engine's counters read when scraped.

Names follow vLLM's where the meaning is the same, under the prefix `deepseek_fp4_`.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deepseek_fp4_plugin.llm import EngineStats
from deepseek_fp4_plugin.serving.vllm_metrics import vllm_families

PREFIX = "deepseek_fp4_"
_TTFT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_PER_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_E2E = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)
_TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072)


class Metrics:
    """A registry of its own, so that two servers in one process do not share counts.

    model: the label `model_name` of every sample.  vllm_names: everything that vLLM has too also under its name.
    """

    def __init__(
        self, engine_stats: Callable[[], EngineStats], model: str | None = None, vllm_names: bool = False
    ) -> None:
        self.registry, self.model, self.vllm_names = CollectorRegistry(), model, vllm_names
        self.responses = Counter(
            PREFIX + "http_responses", "HTTP responses", ["method", "route", "status"], registry=self.registry
        )
        self.finished = Counter(
            PREFIX + "request_finished", "Choices finished, by reason", ["reason"], registry=self.registry
        )
        self.rejected = Counter(
            PREFIX + "request_rejected", "Requests answered 429: the queue was full", registry=self.registry
        )
        self.disconnected = Counter(
            PREFIX + "request_disconnected", "Clients gone before their answer", registry=self.registry
        )
        self.active = Gauge(PREFIX + "requests_active", "Generation requests being answered", registry=self.registry)
        self.first_token = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=_TTFT,
            registry=self.registry,
        )
        self.per_token = Histogram(
            PREFIX + "time_per_output_token_seconds",
            "Mean time between a request's tokens after its first",
            buckets=_PER_TOKEN,
            registry=self.registry,
        )
        self.whole = Histogram(
            PREFIX + "e2e_request_latency_seconds",
            "From arrival to the last token",
            buckets=_E2E,
            registry=self.registry,
        )
        self.prompt_length = Histogram(
            PREFIX + "request_prompt_tokens", "Prompt tokens", buckets=_TOKENS, registry=self.registry
        )
        self.output_length = Histogram(
            PREFIX + "request_generation_tokens", "Generated tokens", buckets=_TOKENS, registry=self.registry
        )
        self.registry.register(_EngineCollector(engine_stats))  # type: ignore[arg-type]

    def exposition(self) -> bytes:
        """The text format. Any thread."""
        return generate_latest(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        """Every family, as a registry gives them."""
        families = list(self.registry.collect())
        label = {} if self.model is None else {"model_name": self.model}
        for family in families:
            yield _labelled(family, **label)
        if self.vllm_names:
            for family in vllm_families(families, PREFIX):
                yield _labelled(family, **label, engine="0")


def _labelled(family: Metric, **labels: str) -> Metric:
    labelled = Metric(family.name, family.documentation, family.type, family.unit)
    labelled.samples = [sample._replace(labels={**sample.labels, **labels}) for sample in family.samples]
    return labelled


class _EngineCollector:
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        s = self._stats()
        for name, text, value in (
            ("num_requests_running", "Requests in the batch", s.running),
            ("num_requests_waiting", "Requests waiting for the batch", s.waiting),
            ("kv_cache_blocks", "Blocks of the latent cache", s.cache_blocks),
            ("kv_cache_blocks_used", "Of these, in use", s.cache_blocks_used),
            ("kv_cache_usage_ratio", "Used part of the latent cache", s.cache_blocks_used / max(1, s.cache_blocks)),
            ("tokens_per_step", "Emitted tokens a decoding step; 1 without speculation", s.tokens_per_step),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, value in (
            ("engine_steps", "Engine steps", s.steps),
            ("prompt_tokens", "Prompt tokens of admitted requests", s.prompt_tokens),
            ("prefix_cache_hit_tokens", "Of these, found in the prefix cache", s.cached_prompt_tokens),
            ("generation_tokens", "Generated tokens", s.generated_tokens),
            ("preemptions", "Requests sent back to wait for want of cache blocks", s.preemptions),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        seconds = CounterMetricFamily(PREFIX + "step_seconds", "Time in each part of the steps", labels=["part"])
        for part in ("schedule", "forward", "sample", "draft", "update"):
            seconds.add_metric([part], getattr(s, f"{part}_seconds"))
        yield seconds
        drafted = CounterMetricFamily(PREFIX + "drafted_tokens", "Draft tokens verified", labels=["phase", "position"])
        accepted = CounterMetricFamily(PREFIX + "accepted_tokens", "Of these, accepted", labels=["phase", "position"])
        for phase, counts in (("thinking", s.thinking), ("answer", s.answer)):
            for position, (of, got) in enumerate(zip(counts.drafted, counts.accepted, strict=True)):
                drafted.add_metric([phase, str(position)], of)
                accepted.add_metric([phase, str(position)], got)
        yield drafted
        yield accepted
        if s.expert_load:
            load = CounterMetricFamily(
                PREFIX + "expert_tokens", "Tokens that chose a routed expert", labels=["layer", "expert"]
            )
            for layer, tokens in s.expert_load.items():
                for expert, count in enumerate(tokens):
                    load.add_metric([str(layer), str(expert)], count)
            yield load
