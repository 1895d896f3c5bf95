"""Numbers of a server in the form of Prometheus, in a registry of their own.

``began`` and ``ended`` are told of each turn, ``http`` of each request. What only has a
value at a moment (queues, pools, states of models) is read when somebody asks: ``sampled``.

Labels have few values: ids of the server's models, routes, kinds. No label comes from a request.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import (
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from ..errors import DeviceError, ZincError
from .backend import ModelCard
from .foreign_metrics import LlamaNames, VllmNames

if TYPE_CHECKING:
    from .turn import Turn

PREFIX = "zincmetal"
STATES = ("loaded", "loading", "unloaded", "sleeping", "failed")

# Bounds of histograms. Seconds to a first token reach from a cached prompt to one of 100,000 tokens on a laptop.
FIRST = (0.05, 0.1, 0.2, 0.4, 0.7, 1, 2, 4, 7, 10, 20, 40, 70, 100, 200, 300)
WHOLE = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800)
GAP = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5)
QUEUE = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
PER_SECOND = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 250, 500, 1000, 2000, 5000, 10000)
BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

#: Kinds of cache misses, by how the engine's reports of them begin (``api/cache_text.py``).
MISSES = (
    ("there is no", "off"),
    ("nothing is cached", "empty"),
    ("what followed", "evicted"),
    ("what was cached", "damaged"),
    ("no checkpoint", "checkpoint"),
    ("token", "differs"),
)


class Metrics:
    """Registry, and what is counted in it. ``llama_names``, ``vllm_names``: also what their dashboards read."""

    def __init__(self, llama_names: bool = False, vllm_names: bool = False) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)  # resident bytes, open files; on Linux
        self._turns: set[int] = set()  # that run, by the identity of their objects
        self.longest = 0  # tokens of a prompt with its answer
        self._requests()
        self._tokens_and_times()
        self._moments()
        if llama_names:
            self.registry.register(LlamaNames(self))
        if vllm_names:
            self.registry.register(VllmNames(self))

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(name, words, labels, namespace=PREFIX, registry=self.registry)

    def _gauge(self, name: str, words: str, *labels: str) -> Gauge:
        return Gauge(name, words, labels, namespace=PREFIX, registry=self.registry)

    def _times(self, name: str, words: str, bounds: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, words, labels, namespace=PREFIX, registry=self.registry, buckets=tuple(bounds))

    def _requests(self) -> None:
        counter = self._counter
        self.requests = counter("requests", "HTTP requests that were answered", "endpoint", "status")
        self.in_flight = self._gauge("requests_in_flight", "HTTP requests that are being answered")
        self.disconnects = counter("client_disconnects", "Clients that left before the end of a reply")
        self.turns = counter("turns", "Generations, by how they ended", "model", "outcome")
        self.cancelled = counter("cancelled", "Generations that were cancelled", "model", "phase")
        self.device_errors = counter("device_errors", "Errors of the device", "model", "type")
        self.tool_calls = counter("tool_calls", "Tool calls, by how they were written", "model", "family", "outcome")
        self.read = counter("texts", "Texts that became vectors, and documents that were scored", "model", "kind")
        self.loads = counter("model_loads", "Loads of models", "model", "outcome")

    def _tokens_and_times(self) -> None:
        counter, times = self._counter, self._times
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "model")
        self.cached_tokens = counter("prompt_tokens_cached", "Tokens of prompts that were not computed again", "model")
        self.generated = counter("generated_tokens", "Tokens of answers", "model")
        self.reasoning = counter("reasoning_tokens", "Tokens of answers that are reasoning", "model")
        self.hits = counter("cache_hits", "Prompts whose beginning was cached", "model", "tier")
        self.misses = counter("cache_misses", "Prompts that took less than they could", "model", "reason")
        self.queue_seconds = times("queue_seconds", "Waiting for a place in a batch", QUEUE, "model")
        self.ttft = times("ttft_seconds", "From the finished prompt to the first token", FIRST, "model")
        self.itl = TokenHistogram("itl_seconds", "Between two tokens of an answer", GAP)
        self.e2e = times("e2e_seconds", "From the finished prompt to the end of the answer", WHOLE, "model")
        self.prefill = times("prefill_tokens_per_second", "Computed tokens of prompts", PER_SECOND, "model")
        self.decode = times("decode_tokens_per_second", "Tokens of one answer", PER_SECOND, "model")
        self.batch = TokenHistogram("batch_size", "Turns that run, whenever a token comes", BATCH)
        self.registry.register(self.itl)
        self.registry.register(self.batch)
        self.prefill_seconds = counter("prefill_seconds", "Reading prompts", "model")
        self.decode_seconds = counter("decode_seconds", "Making tokens after the first", "model")

    def _moments(self) -> None:
        gauge = self._gauge
        self.running = gauge("running", "Sequences that the engine has", "model")
        self.waiting = gauge("queue_depth", "Requests that wait for a place", "model")
        self.steps = gauge("steps", "Steps of the engine since the model was loaded", "model")
        self.pools = gauge("cache_entries", "Pages and states, by what holds them", "model", "kind", "state")
        self.memory = gauge("memory_bytes", "Bytes of a model", "model", "kind")
        self.state = gauge("model_state", "1 for the state that a model is in", "model", "state")
        self.compiles = Sums("grammar_compile_seconds", "Compiling grammars, since the model was loaded")
        self.masks = Sums("grammar_mask_seconds", "Computing masks of grammars, since the model was loaded")
        for sums in (self.compiles, self.masks):
            self.registry.register(sums)

    # ---- turns ---------------------------------------------------------------------------------------------------

    def began(self, turn: Turn) -> None:
        """Note a turn that was started, and have it tell of each token."""
        model, turns, last = turn.backend.card.id, self._turns, 0.0
        gaps, batch, one = self.itl.of(model), self.batch.of(model), turn.ask.n == 1
        turns.add(id(turn))

        def token() -> None:
            nonlocal last
            now = time.monotonic()
            if last and one:  # tokens of several answers come in any order
                gaps.add(now - last)
            last = now
            batch.add(len(turns))

        turn.on_token = token

    def ended(self, turn: Turn) -> None:
        """Note a turn that is over, however it ended. An observer of ``Serving``."""
        self._turns.discard(id(turn))
        turn.on_token = None
        model, now = turn.backend.card.id, time.monotonic()
        outcome = outcome_of(turn)
        self.turns.labels(model, outcome).inc()
        if outcome == "cancelled":
            self.cancelled.labels(model, "prompt" if turn.first_at is None else "answer").inc()
        if isinstance(turn.error, DeviceError):
            self.device_errors.labels(model, type(turn.error).__name__).inc()
        if turn.matched:
            self.prompt_tokens.labels(model).inc(turn.matched.prompt)
            self.cached_tokens.labels(model).inc(turn.matched.cached)
        if turn.first_at is not None:
            self.ttft.labels(model).observe(turn.first_at - turn.began_at)
            self.e2e.labels(model).observe(now - turn.began_at)
        for choice, ended in enumerate(turn.ended):
            self._answer(model, turn, ended, first=choice == 0)

    def _answer(self, model: str, turn: Turn, ended: Any, first: bool) -> None:
        """Note one answer of a turn. The first one has read the prompt."""
        result = ended.result
        made = len(result.tokens)
        self.longest = max(self.longest, result.prompt_tokens + made)
        self.generated.labels(model).inc(made)
        self.reasoning.labels(model).inc(ended.reasoning)
        self.decode_seconds.labels(model).inc(result.decode_seconds)
        if made > 1 and result.decode_seconds > 0:
            self.decode.labels(model).observe((made - 1) / result.decode_seconds)
        for outcome, n in ended.calls.items():
            self.tool_calls.labels(model, turn.ready.format.name, outcome).inc(n)
        if not first:
            return
        self.queue_seconds.labels(model).observe(result.queue_seconds)
        self.prefill_seconds.labels(model).inc(result.prefill_seconds)
        computed = result.prompt_tokens - result.cache.reused
        if result.prefill_seconds > 0 and computed > 0:
            self.prefill.labels(model).observe(computed / result.prefill_seconds)
        if result.cache.reused:
            self.hits.labels(model, result.cache.source or "memory").inc()
        if result.cache.why:
            self.misses.labels(model, miss_of(result.cache.why)).inc()

    # ---- requests ------------------------------------------------------------------------------------------------

    def texts(self, model: str, kind: str, n: int, tokens: int) -> None:
        """Note ``n`` texts that became vectors (``kind`` "embedding"), or were scored ("document")."""
        self.read.labels(model, kind).inc(n)
        self.prompt_tokens.labels(model).inc(tokens)

    def http(self, path: str, status: int) -> None:
        """Note a request that was answered. A status of 0: the client left before."""
        self.requests.labels(endpoint_of(path), str(status or 499)).inc()

    # ---- what has a value at a moment ----------------------------------------------------------------------------

    def sampled(self, cards: Iterable[ModelCard], figures: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the states of all models, and the engine's figures of those that are loaded, by their id."""
        engines = (self.running, self.waiting, self.steps, self.pools, self.compiles, self.masks)
        for one in (*engines, self.memory, self.state):
            one.clear()  # a model that is gone has no numbers
        for card in cards:
            for state in STATES:
                self.state.labels(card.id, state).set(state == card.state)
            if card.state == "loaded":
                self.memory.labels(card.id, "file").set(card.nbytes)
                self.memory.labels(card.id, "granted").set(card.facts.get("granted", 0))
        for model, found in figures.items():
            self.running.labels(model).set(len(found.get("running", ())))
            self.waiting.labels(model).set(found.get("waiting", 0))
            self.steps.labels(model).set(found.get("steps", 0))
            for kind in ("pages", "slots"):
                pool = found.get(kind, {})
                self.pools.labels(model, kind, "free").set(pool.get("free", 0))
                self.pools.labels(model, kind, "used").set(pool.get("all", 0) - pool.get("free", 0))
            for kind, nbytes in found.get("bytes", {}).items():
                self.memory.labels(model, str(kind)).set(nbytes)
            for kind, sums in (("compile", self.compiles), ("mask", self.masks)):
                sums.set(model, *found.get("grammars", {}).get(kind, (0, 0.0)))

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page for Prometheus and its content type, in the form that the client takes."""
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind

    def total(self, metric: Counter | Gauge) -> float:
        """Return the sum of a metric over all its labels."""
        found = (s for family in metric.collect() for s in family.samples if not s.name.endswith("_created"))
        return float(sum(sample.value for sample in found))


class Counts:
    """Histogram of one model: observations by the bucket that they fall into, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.buckets, self.sum = [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Note a value. It costs a twentieth of the library's, and every token brings two."""
        self.buckets[bisect_left(self._bounds, value)] += 1
        self.sum += value


class TokenHistogram:
    """Histogram by model of what every token brings. All additions are on one thread."""

    def __init__(self, name: str, words: str, bounds: Sequence[float]) -> None:
        self._name, self._words, self._bounds = f"{PREFIX}_{name}", words, bounds
        self._models: dict[str, Counts] = {}

    def of(self, model: str) -> Counts:
        """Return the counts of a model."""
        return self._models.setdefault(model, Counts(self._bounds))

    def mean(self) -> float:
        """Return the mean of all values, 0 if there are none."""
        n = sum(sum(counts.buckets) for counts in self._models.values())
        return sum(counts.sum for counts in self._models.values()) / n if n else 0.0

    def collect(self) -> Iterable[Metric]:
        """Yield the histogram."""
        family = HistogramMetricFamily(self._name, self._words, labels=["model"])
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for model, counts in list(self._models.items()):
            family.add_metric([model], list(zip(bounds, accumulate(counts.buckets), strict=True)), counts.sum)
        yield family


class Sums:
    """Summary by model, of what a model's process has counted."""

    def __init__(self, name: str, words: str) -> None:
        self._name, self._words = f"{PREFIX}_{name}", words
        self._models: dict[str, tuple[int, float]] = {}
        self.clear = self._models.clear

    def set(self, model: str, n: int, total: float) -> None:
        """Set the number of observations of a model, and their sum."""
        self._models[model] = n, total

    def collect(self) -> Iterable[Metric]:
        """Yield the summary."""
        family = SummaryMetricFamily(self._name, self._words, labels=["model"])
        for model, (n, total) in list(self._models.items()):
            family.add_metric([model], n, total)
        yield family


def outcome_of(turn: Turn) -> str:
    """Return how a turn ended: a finish reason, "cancelled", or a kind of error."""
    error = turn.error
    if isinstance(error, DeviceError):
        return "device_error"
    if isinstance(error, ZincError):
        return "refused"
    if isinstance(error, Exception):
        return "error"
    if error is not None or len(turn.ended) < turn.ask.n:  # its task was cancelled, or its events left early
        return "cancelled"
    return turn.ended[-1].reason


def miss_of(why: str) -> str:
    """Return the kind of a cache miss: the report itself quotes prompts, and has any number of forms."""
    return next((kind for begins, kind in MISSES if why.startswith(begins)), "other")


#: Routes with a label of their own. All others are "other": anybody can ask for any path.
ENDPOINTS = frozenset(
    (
        *("/", "/health", "/livez", "/readyz", "/metrics", "/props", "/slots", "/tokenize", "/detokenize"),
        *("/apply-template", "/models", "/models/load", "/models/unload", "/models/sse", "/v1/models", "/v1/catalogue"),
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/cache/clear"),
        *("/v1/cache/stats", "/v1/messages/count_tokens", "/v1/responses/input_tokens"),
        *(
            "/v1/chat/completions/input_tokens",
            "/v1/embeddings",
            "/v1/rerank",
            "/rerank",
            "/v1/reranking",
            "/reranking",
        ),
    )
)


def endpoint_of(path: str) -> str:
    """Return the label of a path."""
    return path if path in ENDPOINTS else "other"


__all__ = ["Metrics", "endpoint_of", "miss_of", "outcome_of"]
