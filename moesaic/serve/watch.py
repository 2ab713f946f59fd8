"""Counts and times what passes: one ``Watch`` for each request, one ``Metrics`` for the server.

The names are ours (``moesaic_``), and those that dashboards made for vLLM (``vllm:``) and for TGI (``tgi_``) expect.
Knows events and clocks. Does not know HTTP, and sees no text.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from moesaic.door import Answers, Ask, Begun, Ended, Event, Load, Piece
from moesaic.errors import MoesaicError, Overloaded, TimedOut, Unavailable
from moesaic.serve.settings import Settings

if TYPE_CHECKING:
    from moesaic.serve.tracing import Tracer

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
TGI_SECONDS = tuple(0.0001 * 1.5**n for n in range(1, 36))

FAILURES = {429: "overloaded", 503: "overloaded", 500: "generation", 504: "incomplete"}
"""TGI's words for what went wrong, by status; all else is ``validation``."""


class Metrics:
    """The server's figures, as Prometheus reads them."""

    def __init__(self, load: Callable[[], Mapping[str, Load]]) -> None:
        self.registry = CollectorRegistry()
        self._load = load
        self._labelled: dict[tuple[int, str], list[Histogram]] = {}
        self._tgi: dict[tuple[str, str], float] = {}
        model = ("model_name",)
        self.requests = self._counter("moesaic_http_requests", "Requests.", ("method", "path", "status"))
        self.ended = self._counter("moesaic_request_ended", "Requests that ended.", ("model_name", "reason"))
        self.success = self._counter("vllm:request_success", "As vLLM has it.", ("model_name", "finished_reason"))
        self.first = self._both("time_to_first_token_seconds", "Until the first token.", FIRST, model)
        self.between = self._both("inter_token_latency_seconds", "Between tokens.", BETWEEN, model)
        self.per_token = self._both("request_time_per_output_token_seconds", "Mean per token.", BETWEEN, model)
        self.per_token += self._histograms("vllm:time_per_output_token_seconds", "Its older name.", BETWEEN, model)
        self.per_token += self._histograms("tgi_request_mean_time_per_token_duration", "TGI's.", TGI_SECONDS, ())
        self.whole = self._both("e2e_request_latency_seconds", "Whole requests.", WHOLE, model)
        self.whole += self._histograms("tgi_request_duration", "TGI's.", TGI_SECONDS, ())
        self.queue = self._both("request_queue_time_seconds", "Waiting for a turn.", WHOLE, model)
        self.queue += self._histograms("tgi_request_queue_duration", "TGI's.", TGI_SECONDS, ())
        self.inference = self._histograms("tgi_request_inference_duration", "TGI's.", TGI_SECONDS, ())
        self.prompt = self._both("request_prompt_tokens", "Tokens of prompts.", TOKENS, model)
        self.prompt += self._histograms("tgi_request_input_length", "TGI's.", TOKENS, ())
        self.generated = self._both("request_generation_tokens", "Tokens of answers.", TOKENS, model)
        self.generated += self._histograms("tgi_request_generated_tokens", "TGI's.", TOKENS, ())
        self.registry.register(self)

    def _counter(self, name: str, about: str, labels: Iterable[str]) -> Counter:
        return Counter(name, about, labels, registry=self.registry)

    def _histograms(self, name: str, about: str, buckets: Iterable[float], labels: Iterable[str]) -> list[Histogram]:
        return [Histogram(name, about, labels, buckets=tuple(buckets), registry=self.registry)]

    def _both(self, name: str, about: str, buckets: Iterable[float], labels: Iterable[str]) -> list[Histogram]:
        ours = self._histograms(f"moesaic_{name}", about, buckets, labels)
        return ours + self._histograms(f"vllm:{name}", "As vLLM has it.", buckets, labels)

    def observe(self, histograms: list[Histogram], model: str, value: float) -> None:
        """Enter a value under all the names that it has."""
        for each in self._children(id(histograms), model, histograms):
            each.observe(value)

    def _children(self, key: int, model: str, histograms: list[Histogram]) -> list[Histogram]:
        """Return the histograms of a model; looked up once, as this happens for every token."""
        found = self._labelled.get((key, model))
        if found is None:
            found = [each.labels(model) if each._labelnames else each for each in histograms]
            self._labelled[key, model] = found
        return found

    def count_tgi(self, name: str, label: str = "") -> None:
        """Count under a name of TGI's, whose counters lack the suffix that Prometheus' library puts behind all."""
        self._tgi[name, label] = self._tgi.get((name, label), 0) + 1

    def collect(self) -> Iterable[Metric]:
        """Yield what the models say of themselves, asked when somebody looks."""
        gauges = {
            "num_requests_running": lambda load: load.running,
            "num_requests_waiting": lambda load: load.waiting,
            "num_requests_swapped": lambda _: 0,
            "kv_cache_usage_perc": _used,
            "gpu_cache_usage_perc": _used,
        }
        loads = self._load()
        for prefix in ("moesaic_", "vllm:"):
            for name, read in gauges.items():
                family = GaugeMetricFamily(prefix + name, "Now.", labels=("model_name",))
                for model, load in loads.items():
                    family.add_metric((model,), read(load))
                yield family
            yield from self._totals(prefix, loads)
        for name, value in (
            ("tgi_queue_size", sum(load.waiting for load in loads.values())),
            ("tgi_batch_current_size", sum(load.running for load in loads.values())),
        ):
            yield GaugeMetricFamily(name, "TGI's.", value=value)
        for name in sorted({name for name, _ in self._tgi} | {"tgi_request_count", "tgi_request_success"}):
            untyped = Metric(name, "TGI's.", "unknown")
            mine = {label: value for (each, label), value in self._tgi.items() if each == name} or {"": 0.0}
            for label, count in mine.items():
                untyped.add_sample(name, {"err": label} if label else {}, count)
            yield untyped

    def _totals(self, prefix: str, loads: Mapping[str, Load]) -> Iterable[Metric]:
        for name, field in (
            ("prompt_tokens", "prompt_tokens"),
            ("generation_tokens", "generated_tokens"),
            ("num_preemptions", "preemptions"),
            ("prefix_cache_queries", "prompt_tokens"),
            ("prefix_cache_hits", "cached_tokens"),
            ("numerical_errors", "numerical_errors"),
            ("engine_steps", "steps"),
        ):
            family = Metric(prefix + name, "Since the start.", "counter")
            for model, load in loads.items():
                family.add_sample(f"{prefix}{name}_total", {"model_name": model}, getattr(load, field))
            yield family

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return bytes(generate_latest(self.registry))


def _used(load: Load) -> float:
    return 1 - load.free_blocks / load.blocks if load.blocks else 0.0


class Watch:
    """One request on its way through the door."""

    def __init__(self, metrics: Metrics, settings: Settings, ask: Ask, tracer: Tracer | None) -> None:
        self._metrics, self._settings, self._ask = metrics, settings, ask
        self._begin = time.monotonic()
        self._begun: float | None = None
        self._first: float | None = None
        self._last = self._begin
        self._prompt_tokens = self._generated = 0
        self._reason = "cancelled"
        self._span = tracer.begin(ask) if tracer else None
        metrics.count_tgi("tgi_request_count")

    async def admitted(self, asking: Awaitable[Answers]) -> Answers:
        """Wait until the door has taken the request in."""
        try:
            return await asking
        except MoesaicError as error:
            self._failed(error)
            self.close()
            raise

    async def events(self, answers: Answers) -> AsyncIterator[Event]:
        """Yield the events, within the time that is allowed."""
        async with contextlib.aclosing(self.batches(answers, all_at_once=False)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(self, answers: Answers, *, all_at_once: bool = True) -> AsyncGenerator[list[Event]]:
        """Do the same, with all events together that can be had at once."""
        try:
            async with self._deadline():
                async for event in answers:
                    batch = [event, *answers.ready()] if all_at_once else [event]
                    for each in batch:
                        self._see(each)
                    yield batch
        except MoesaicError as error:
            self._failed(error)
            raise

    @property
    def tokens(self) -> int:
        """What the request has cost, prompt and answers."""
        return self._prompt_tokens + self._generated

    @contextlib.asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        """Let the request end with an error when it waits, or runs, for too long."""
        loop, settings = asyncio.get_running_loop(), self._settings
        task = asyncio.current_task()
        late: list[MoesaicError] = []

        def give_up(error: MoesaicError, only_waiting: bool) -> None:
            if task and not (only_waiting and self._begun is not None):
                late.append(error)
                task.cancel()

        timers = []
        if settings.queue_seconds:
            error: MoesaicError = Unavailable(f"the request waited {settings.queue_seconds:g} s for its turn")
            timers.append(loop.call_later(settings.queue_seconds, give_up, error, True))
        if settings.request_seconds:
            error = TimedOut(f"the answer took longer than {settings.request_seconds:g} s")
            timers.append(loop.call_later(settings.request_seconds, give_up, error, False))
        try:
            yield
        except asyncio.CancelledError:
            if late and task:
                task.uncancel()
                raise late[0] from None
            raise
        finally:
            for timer in timers:
                timer.cancel()

    def _see(self, event: Event) -> None:
        now = time.monotonic()
        metrics, model = self._metrics, self._ask.model
        if isinstance(event, Piece) and event.tokens:
            if self._first is None:
                self._first = now
                metrics.observe(metrics.first, model, now - self._begin)
            else:
                metrics.observe(metrics.between, model, (now - self._last) / len(event.tokens))
            self._last = now
        elif isinstance(event, Begun) and self._begun is None:
            self._begun = now
            metrics.observe(metrics.queue, model, now - self._begin)
        elif isinstance(event, Ended):
            self._prompt_tokens = event.prompt_tokens
            self._generated += event.generated_tokens
            self._reason = event.reason
            self._end(event, now)

    def _end(self, event: Ended, now: float) -> None:
        metrics, model = self._metrics, self._ask.model
        metrics.ended.labels(model, event.reason).inc()
        metrics.success.labels(model, "abort" if event.reason == "cancelled" else event.reason).inc()
        metrics.count_tgi("tgi_request_success")
        metrics.observe(metrics.whole, model, now - self._begin)
        metrics.observe(metrics.inference, model, now - (self._begun or now))
        metrics.observe(metrics.prompt, model, event.prompt_tokens)
        metrics.observe(metrics.generated, model, event.generated_tokens)
        if self._first is not None and event.generated_tokens > 1:
            metrics.observe(metrics.per_token, model, (now - self._first) / (event.generated_tokens - 1))

    def _failed(self, error: MoesaicError) -> None:
        self._reason = type(error).__name__
        self._metrics.ended.labels(self._ask.model, self._reason).inc()
        kind = "overloaded" if isinstance(error, Overloaded) else FAILURES.get(error.status, "validation")
        self._metrics.count_tgi("tgi_request_failure", kind)

    def close(self) -> None:
        """Say that nothing more comes."""
        if self._span:
            first = self._first - self._begin if self._first is not None else None
            self._span.end(self._reason, self._prompt_tokens, self._generated, first)
            self._span = None
