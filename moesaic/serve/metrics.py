"""Prometheus metrics: ``Metrics`` for the server, and ``RequestMetrics`` for each generation request.

Metrics have names of our own (``moesaic_``); many also have the names that dashboards for vLLM (``vllm:``) and TGI
(``tgi_``) expect. This module does not depend on HTTP and never sees the text of prompts or answers.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from moesaic.backend import Event, Finished, GenerationRequest, ModelStats, PromptDone
from moesaic.errors import Cancelled, MoesaicError

if TYPE_CHECKING:
    from moesaic.serve.tracing import Span

FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
TOKEN_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
REQUEST_BUCKETS = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
TOKEN_COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
TGI_BUCKETS = tuple(0.0001 * 1.5**n for n in range(1, 36))

TGI_FAILURE_LABELS = {429: "overloaded", 503: "overloaded", 500: "generation", 504: "incomplete", 499: "dropped"}
"""Label ``err`` of a failed request in TGI's metrics, by HTTP status; for other statuses it is ``validation``."""


class LatencyHistogram:
    """Histogram of the seconds between tokens. Equal values of many tokens are added in one call, to save time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Sum of all values, in seconds."""
        self._counts = [0] * (len(TOKEN_GAP_BUCKETS) + 1)

    def add(self, seconds: float, count: int) -> None:
        """Add the value ``seconds``, ``count`` times."""
        self._counts[bisect_left(TOKEN_GAP_BUCKETS, seconds)] += count
        self.seconds += seconds * count

    def buckets(self) -> list[tuple[str, float]]:
        """Return, for each bucket, its upper bound as text and the number of values up to this bound."""
        return list(zip(map(floatToGoString, (*TOKEN_GAP_BUCKETS, math.inf)), accumulate(self._counts), strict=True))


class Metrics:
    """The metrics of a server, as a collector of the Prometheus client library."""

    def __init__(
        self, stats: Callable[[], Mapping[str, ModelStats]], more: Callable[[], Iterable[Metric]] = tuple
    ) -> None:
        """Start with all metrics at zero.

        Args:
            stats: returns the statistics of each model by its name; called each time the metrics are read.
            more: returns further metrics; called each time the metrics are read.
        """
        self.registry = CollectorRegistry()
        self._stats, self._more = stats, more
        self._labelled: dict[tuple[int, str], list[Histogram]] = {}
        self._tgi: dict[tuple[str, str], float] = {}
        model = ("model_name",)
        self.requests = self._counter("moesaic_http_requests", "HTTP requests.", ("method", "path", "status"))
        self.started = self._counter("moesaic_request_begun", "Generation requests that began.", model)
        self.ended = self._counter(
            "moesaic_request_ended", "Generation requests that ended, by reason.", ("model_name", "reason")
        )
        self.success = self._counter(
            "vllm:request_success", "Same metric under vLLM's name.", ("model_name", "finished_reason")
        )
        self.first_token = self._both(
            "time_to_first_token_seconds", "Seconds until the first token.", FIRST_TOKEN_BUCKETS, model
        )
        self.token_gaps: dict[str, LatencyHistogram] = {}
        self.per_token = self._both(
            "request_time_per_output_token_seconds", "Mean seconds per token of a request.", TOKEN_GAP_BUCKETS, model
        )
        self.per_token += self._histograms(
            "vllm:time_per_output_token_seconds", "Same metric under vLLM's older name.", TOKEN_GAP_BUCKETS, model
        )
        self.per_token += self._histograms(
            "tgi_request_mean_time_per_token_duration", "Same metric under TGI's name.", TGI_BUCKETS, ()
        )
        self.latency = self._both("e2e_request_latency_seconds", "Seconds of a whole request.", REQUEST_BUCKETS, model)
        self.latency += self._histograms("tgi_request_duration", "Same metric under TGI's name.", TGI_BUCKETS, ())
        self.queue_time = self._both(
            "request_queue_time_seconds", "Seconds until the prompt was read.", REQUEST_BUCKETS, model
        )
        self.queue_time += self._histograms(
            "tgi_request_queue_duration", "Same metric under TGI's name.", TGI_BUCKETS, ()
        )
        self.inference_time = self._both(
            "request_inference_time_seconds", "Seconds from the prompt to the end.", REQUEST_BUCKETS, model
        )
        self.inference_time += self._histograms(
            "tgi_request_inference_duration", "Same metric under TGI's name.", TGI_BUCKETS, ()
        )
        self.decode = self._both(
            "request_decode_time_seconds", "Seconds from the first to the last token.", REQUEST_BUCKETS, model
        )
        self.prompt_tokens = self._both("request_prompt_tokens", "Tokens per prompt.", TOKEN_COUNT_BUCKETS, model)
        self.prompt_tokens += self._histograms(
            "tgi_request_input_length", "Same metric under TGI's name.", TOKEN_COUNT_BUCKETS, ()
        )
        self.generated_tokens = self._both(
            "request_generation_tokens", "Tokens per answer.", TOKEN_COUNT_BUCKETS, model
        )
        self.generated_tokens += self._histograms(
            "tgi_request_generated_tokens", "Same metric under TGI's name.", TOKEN_COUNT_BUCKETS, ()
        )
        self.max_tokens = self._both("request_params_max_tokens", "Value of max_tokens.", TOKEN_COUNT_BUCKETS, model)
        self.max_tokens += self._histograms(
            "vllm:request_max_num_generation_tokens", "Same metric under vLLM's name.", TOKEN_COUNT_BUCKETS, model
        )
        self.max_tokens += self._histograms(
            "tgi_request_max_new_tokens", "Same metric under TGI's name.", TOKEN_COUNT_BUCKETS, ()
        )
        self.answers = self._both("request_params_n", "Value of n.", (1, 2, 5, 10, 20), model)
        self.validation = self._histograms(
            "tgi_request_validation_duration", "Same metric under TGI's name.", TGI_BUCKETS, ()
        )
        self.registry.register(self)

    def _counter(self, name: str, about: str, labels: Iterable[str]) -> Counter:
        return Counter(name, about, labels, registry=self.registry)

    def _histograms(self, name: str, about: str, buckets: Iterable[float], labels: Iterable[str]) -> list[Histogram]:
        return [Histogram(name, about, labels, buckets=tuple(buckets), registry=self.registry)]

    def _both(self, name: str, about: str, buckets: Iterable[float], labels: Iterable[str]) -> list[Histogram]:
        ours = self._histograms(f"moesaic_{name}", about, buckets, labels)
        return ours + self._histograms(f"vllm:{name}", "Same metric under vLLM's name.", buckets, labels)

    def observe(self, histograms: list[Histogram], model: str, value: float) -> None:
        """Add a value to ``histograms``, the histograms of one metric under its several names, for a model."""
        for histogram in self._children(id(histograms), model, histograms):
            histogram.observe(value)

    def _children(self, key: int, model: str, histograms: list[Histogram]) -> list[Histogram]:
        """Return the histograms with the model as their label.

        They are cached under ``key`` and the model, because they are needed for every token.
        """
        found = self._labelled.get((key, model))
        if found is None:
            found = [each.labels(model) if each._labelnames else each for each in histograms]
            self._labelled[key, model] = found
        return found

    def count_tgi(self, name: str, label: str = "") -> None:
        """Add 1 to the counter with TGI's name ``name``. ``label`` is its label ``err``; "" means none.

        These counters are kept here, because the Prometheus library would append ``_total`` to their names.
        """
        self._tgi[name, label] = self._tgi.get((name, label), 0) + 1

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics that are computed each time the metrics are read, such as current values of the engines."""
        gauges = {
            "num_requests_running": lambda entry: entry.running,
            "num_requests_waiting": lambda entry: entry.waiting,
            "num_requests_swapped": lambda _: 0,
            "kv_cache_usage_perc": _cache_usage,
            "gpu_cache_usage_perc": _cache_usage,
        }
        stats = self._stats()
        for prefix in ("moesaic_", "vllm:"):
            for name, read in gauges.items():
                family = GaugeMetricFamily(prefix + name, "Current value.", labels=("model_name",))
                for model, entry in stats.items():
                    family.add_metric((model,), read(entry))
                yield family
            yield from self._totals(prefix, stats)
        for name, value in (
            ("tgi_queue_size", sum(entry.waiting for entry in stats.values())),
            ("tgi_batch_current_size", sum(entry.running for entry in stats.values())),
        ):
            yield GaugeMetricFamily(name, "Same metric under TGI's name.", value=value)
        for name in sorted({name for name, _ in self._tgi} | {"tgi_request_count", "tgi_request_success"}):
            untyped = Metric(name, "Same metric under TGI's name.", "unknown")
            mine = {label: value for (each, label), value in self._tgi.items() if each == name} or {"": 0.0}
            for label, count in mine.items():
                untyped.add_sample(name, {"err": label} if label else {}, count)
            yield untyped
        for prefix, about in (("moesaic_", "Seconds between tokens."), ("vllm:", "Same metric under vLLM's name.")):
            between = HistogramMetricFamily(prefix + "inter_token_latency_seconds", about, labels=("model_name",))
            for model, gaps in self.token_gaps.items():
                between.add_metric((model,), gaps.buckets(), gaps.seconds)
            yield between
        yield from self._more()

    def _totals(self, prefix: str, stats: Mapping[str, ModelStats]) -> Iterable[Metric]:
        for name, field in (
            ("prompt_tokens", "prompt_tokens"),
            ("generation_tokens", "generated_tokens"),
            ("num_preemptions", "preemptions"),
            ("prefix_cache_queries", "prompt_tokens"),
            ("prefix_cache_hits", "cached_tokens"),
            ("numerical_errors", "numerical_errors"),
            ("engine_steps", "steps"),
            ("spec_decode_num_draft_tokens", "draft_tokens"),
            ("spec_decode_num_accepted_tokens", "accepted_tokens"),
        ):
            family = Metric(prefix + name, "Total since the start.", "counter")
            for model, entry in stats.items():
                family.add_sample(f"{prefix}{name}_total", {"model_name": model}, getattr(entry, field))
            yield family

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return bytes(generate_latest(self.registry))


def _cache_usage(stats: ModelStats) -> float:
    return 1 - stats.free_blocks / stats.blocks if stats.blocks else 0.0


@dataclass(slots=True)
class AnswerTiming:
    """Times of one answer's first and latest token, on the event loop's clock, and its number of tokens."""

    first: float | None = None
    last: float = 0.0
    tokens: int = 0


class RequestMetrics:
    """Records one generation request in counters, latency histograms and its trace span.

    The end of the request is recorded exactly once.
    """

    def __init__(
        self,
        metrics: Metrics,
        request: GenerationRequest,
        span: Span | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Record that a generation request begins now.

        Args:
            metrics: the server's metrics.
            request: the generation request.
            span: the trace span of the request, which is ended with it; None: no traces.
            on_end: called when the last answer has ended without an error.
        """
        self._metrics, self._model, self._span = metrics, request.model, span
        self._clock = asyncio.get_running_loop().time
        self._started = self._clock()
        self._prompt_read_at: float | None = None
        self._answers: dict[int, AnswerTiming] = {}
        self._open_answers = int(request.sampling.get("n", 1))
        self._prompt_tokens = self._cached_tokens = 0
        self._on_end = on_end
        self.ended = False
        metrics.started.labels(self._model).inc()
        metrics.count_tgi("tgi_request_count")
        metrics.observe(metrics.answers, self._model, self._open_answers)
        max_tokens = request.sampling.get("max_tokens")
        if max_tokens is not None:
            metrics.observe(metrics.max_tokens, self._model, max_tokens)

    @property
    def tokens(self) -> int:
        """Return the number of tokens used so far, of the prompt and of all answers."""
        return self._prompt_tokens + sum(answer.tokens for answer in self._answers.values())

    def admitted(self) -> None:
        """Record that the backend has accepted the request."""
        self._metrics.observe(self._metrics.validation, self._model, self._clock() - self._started)

    def record(self, event: Event) -> None:
        """Record the next event of the response stream."""
        now, metrics = self._clock(), self._metrics
        if isinstance(event, PromptDone):
            self._prompt_tokens = event.prompt_tokens or self._prompt_tokens
            if self._prompt_read_at is None:
                self._prompt_read_at = now
                metrics.observe(metrics.queue_time, self._model, now - self._started)
            return
        answer = self._answers.setdefault(event.index, AnswerTiming())
        if isinstance(event, Finished):
            self._end_answer(answer, event, now)
        elif event.tokens:
            self._record_tokens(answer, len(event.tokens), now)

    def _record_tokens(self, answer: AnswerTiming, count: int, now: float) -> None:
        """Record ``count`` tokens of an answer that came together at the time ``now``.

        Each gets an equal share of the time since the token before them.
        """
        metrics, gap = self._metrics, (now - answer.last) / count
        answer.tokens += count
        if answer.first is None:
            answer.first, gap, count = now, 0.0, count - 1
            metrics.observe(metrics.first_token, self._model, now - self._started)
        metrics.token_gaps.setdefault(self._model, LatencyHistogram()).add(gap, count)
        answer.last = now

    def _end_answer(self, answer: AnswerTiming, event: Finished, now: float) -> None:
        """Record the end of one answer. When the last answer of the request ends, record the end of the request."""
        metrics, model = self._metrics, self._model
        answer.tokens = event.generated_tokens
        self._prompt_tokens, self._cached_tokens = event.prompt_tokens, event.cached_tokens
        metrics.success.labels(model, "abort" if event.reason == "cancelled" else event.reason).inc()
        metrics.observe(metrics.generated_tokens, model, event.generated_tokens)
        if answer.first is not None:
            metrics.observe(metrics.decode, model, answer.last - answer.first)
            if event.generated_tokens > 1:
                mean = (answer.last - answer.first) / (event.generated_tokens - 1)
                metrics.observe(metrics.per_token, model, mean)
        self._open_answers -= 1
        if not self._open_answers:
            self._finish(event.reason)
            metrics.count_tgi("tgi_request_success")
            metrics.observe(metrics.latency, model, now - self._started)
            metrics.observe(metrics.inference_time, model, now - (self._prompt_read_at or now))
            metrics.observe(metrics.prompt_tokens, model, event.prompt_tokens)
            self._on_end()

    def close(self, error: BaseException | None) -> None:
        """Record the end of a request that has not ended by itself.

        ``error`` is the error that ended the request; None: the client disconnected.
        """
        if self.ended:
            return
        error = error or Cancelled("the client disconnected")
        self._metrics.success.labels(self._model, "abort").inc(self._open_answers)
        status = error.status if isinstance(error, MoesaicError) else 500
        self._metrics.count_tgi("tgi_request_failure", TGI_FAILURE_LABELS.get(status, "validation"))
        self._finish("cancelled" if isinstance(error, Cancelled) else type(error).__name__)

    def _finish(self, reason: str) -> None:
        self.ended = True
        self._metrics.ended.labels(self._model, reason).inc()
        if self._span:
            first_tokens = [answer.first for answer in self._answers.values() if answer.first is not None]
            generated = sum(answer.tokens for answer in self._answers.values())
            first = min(first_tokens) - self._started if first_tokens else None
            self._span.end(reason, self._prompt_tokens, self._cached_tokens, generated, first)
