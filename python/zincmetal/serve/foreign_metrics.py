"""Metrics under the names that dashboards for other servers read."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from .metrics import Metrics

#: How vLLM calls the end of a request, by our outcome. All others are errors.
FINISHED = {"stop": "stop", "tool_calls": "stop", "length": "length", "cancelled": "abort"}


class LlamaNames:
    """Collector with the names of llama.cpp's server. They have no labels: the numbers are of all models."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        m = self._metrics
        cached = m.total(m.cached_tokens)
        read, made = m.total(m.prompt_tokens) - cached, m.total(m.generated)
        read_seconds, made_seconds = m.total(m.prefill_seconds), m.total(m.decode_seconds)
        for name, words, value in (
            ("prompt_tokens", "Tokens of prompts that were computed", read),
            ("prompt_tokens_cached", "Tokens of prompts that were not computed again", cached),
            ("prompt_seconds", "Reading prompts", read_seconds),
            ("tokens_predicted", "Tokens of answers", made),
            ("tokens_predicted_seconds", "Making tokens", made_seconds),
            ("n_decode", "Steps of the engines of the loaded models", m.total(m.steps)),
        ):
            yield CounterMetricFamily(f"llamacpp:{name}", words, value)
        for name, words, value in (
            ("prompt_tokens_seconds", "Tokens a second of prompts", read / read_seconds if read_seconds else 0.0),
            ("predicted_tokens_seconds", "Tokens a second of answers", made / made_seconds if made_seconds else 0.0),
            ("requests_processing", "Sequences that the engine has", m.total(m.running)),
            ("requests_deferred", "Requests that wait for a place", m.total(m.waiting)),
            ("n_tokens_max", "Most tokens of a prompt with its answer", float(m.longest)),
            ("n_busy_slots_per_decode", "Generations that run when a token comes, on average", m.batch.mean()),
        ):
            yield GaugeMetricFamily(f"llamacpp:{name}", words, value)


class VllmNames:
    """Collector with the names of vLLM, by model."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        m = self._metrics
        for own, name in (
            (m.running, "num_requests_running"),
            (m.waiting, "num_requests_waiting"),
            (m.prompt_tokens, "prompt_tokens"),
            (m.generated, "generation_tokens"),
            (m.prompt_tokens, "prefix_cache_queries"),  # vLLM counts tokens here, too
            (m.cached_tokens, "prefix_cache_hits"),
            (m.ttft, "time_to_first_token_seconds"),
            (m.itl, "inter_token_latency_seconds"),
            (m.e2e, "e2e_request_latency_seconds"),
            (m.queue_seconds, "request_queue_time_seconds"),
        ):
            yield from _renamed(own, f"vllm:{name}")
        yield self._used_pages()
        yield self._finished()

    def _used_pages(self) -> Metric:
        family = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Pages in use: 1 is all", labels=["model_name"])
        pages = Counts[tuple[str, str]]()
        for sample in _samples(self._metrics.pools):
            if sample.labels["kind"] == "pages":
                pages[sample.labels["model"], sample.labels["state"]] += sample.value
        for model in sorted({model for model, _ in pages}):
            used, free = pages[model, "used"], pages[model, "free"]
            family.add_metric([model], used / (used + free) if used + free else 0.0)
        return family

    def _finished(self) -> Metric:
        family = CounterMetricFamily(
            "vllm:request_success", "Requests that ended", labels=["model_name", "finished_reason"]
        )
        ended = Counts[tuple[str, str]]()
        for sample in _samples(self._metrics.turns):
            ended[sample.labels["model"], FINISHED.get(sample.labels["outcome"], "error")] += sample.value
        for labels, n in sorted(ended.items()):
            family.add_metric(labels, n)
        return family


def _samples(own: Any) -> list[Any]:
    """Return the samples of a metric, without the times of their creation."""
    return [s for family in own.collect() for s in family.samples if not s.name.endswith("_created")]


def _renamed(own: Any, name: str) -> Iterable[Metric]:
    """Yield a metric by another name, whose label of the model is ``model_name``."""
    for family in own.collect():
        other = Metric(name, family.documentation, family.type)
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                labels = {"model_name" if key == "model" else key: value for key, value in sample.labels.items()}
                other.add_sample(name + sample.name.removeprefix(family.name), labels, sample.value)
        yield other
