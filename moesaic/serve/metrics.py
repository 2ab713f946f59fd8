"""Counts and times what passes: one ``Watch`` for each request, one ``Metrics`` for the server.

The names are ours (``moesaic_``), and those that dashboards made for vLLM (``vllm:``) and for TGI (``tgi_``) expect.
Knows events and clocks. Does not know HTTP, and sees no text.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from moesaic.backend import Event, Finished, GenerationRequest, ModelStats, PromptDone, ResponseStream, join
from moesaic.errors import Cancelled, MoesaicError, TimedOut, Unavailable
from moesaic.serve.deadline import Deadline, DeadlineExceeded
from moesaic.serve.settings import Settings

if TYPE_CHECKING:
    from moesaic.serve.tracing import Span

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
TGI_SECONDS = tuple(0.0001 * 1.5**n for n in range(1, 36))

FAILURES = {429: "overloaded", 503: "overloaded", 500: "generation", 504: "incomplete", 499: "dropped"}
"""TGI's words for what went wrong, by status; all else is ``validation``."""


class LatencyHistogram:
    """A histogram of the seconds between tokens, which takes many at once: there is one for every token."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """All of them together."""
        self._counts = [0] * (len(BETWEEN) + 1)

    def add(self, seconds: float, count: int) -> None:
        """Enter so many of the same length."""
        self._counts[bisect_left(BETWEEN, seconds)] += count
        self.seconds += seconds * count

    def buckets(self) -> list[tuple[str, float]]:
        """Return upper bounds, and how many gaps are not longer."""
        return list(zip(map(floatToGoString, (*BETWEEN, math.inf)), accumulate(self._counts), strict=True))


class Metrics:
    """The server's figures, as Prometheus reads them."""

    def __init__(
        self, load: Callable[[], Mapping[str, ModelStats]], more: Callable[[], Iterable[Metric]] = tuple
    ) -> None:
        """Begin at nothing.

        Args:
            load: how busy the models are.
            more: what else there is to show, asked when somebody looks.
        """
        self.registry = CollectorRegistry()
        self._load, self._more = load, more
        self._labelled: dict[tuple[int, str], list[Histogram]] = {}
        self._tgi: dict[tuple[str, str], float] = {}
        model = ("model_name",)
        self.requests = self._counter("moesaic_http_requests", "Requests.", ("method", "path", "status"))
        self.begun = self._counter("moesaic_request_begun", "Requests to models.", model)
        self.ended = self._counter("moesaic_request_ended", "How they ended.", ("model_name", "reason"))
        self.success = self._counter("vllm:request_success", "As vLLM has it.", ("model_name", "finished_reason"))
        self.first = self._both("time_to_first_token_seconds", "Until the first token.", FIRST, model)
        self.between: dict[str, LatencyHistogram] = {}
        self.per_token = self._both("request_time_per_output_token_seconds", "Mean per token.", BETWEEN, model)
        self.per_token += self._histograms("vllm:time_per_output_token_seconds", "Its older name.", BETWEEN, model)
        self.per_token += self._histograms("tgi_request_mean_time_per_token_duration", "TGI's.", TGI_SECONDS, ())
        self.whole = self._both("e2e_request_latency_seconds", "Whole requests.", WHOLE, model)
        self.whole += self._histograms("tgi_request_duration", "TGI's.", TGI_SECONDS, ())
        self.queue = self._both("request_queue_time_seconds", "Until the prompt was read.", WHOLE, model)
        self.queue += self._histograms("tgi_request_queue_duration", "TGI's.", TGI_SECONDS, ())
        self.inference = self._both("request_inference_time_seconds", "From then on.", WHOLE, model)
        self.inference += self._histograms("tgi_request_inference_duration", "TGI's.", TGI_SECONDS, ())
        self.decoding = self._both("request_decode_time_seconds", "From first to last token.", WHOLE, model)
        self.prompt = self._both("request_prompt_tokens", "Tokens of prompts.", TOKENS, model)
        self.prompt += self._histograms("tgi_request_input_length", "TGI's.", TOKENS, ())
        self.generated = self._both("request_generation_tokens", "Tokens of answers.", TOKENS, model)
        self.generated += self._histograms("tgi_request_generated_tokens", "TGI's.", TOKENS, ())
        self.most = self._both("request_params_max_tokens", "The most tokens asked for.", TOKENS, model)
        self.most += self._histograms("vllm:request_max_num_generation_tokens", "As vLLM has it.", TOKENS, model)
        self.most += self._histograms("tgi_request_max_new_tokens", "TGI's.", TOKENS, ())
        self.answers = self._both("request_params_n", "Answers asked for.", (1, 2, 5, 10, 20), model)
        self.validation = self._histograms("tgi_request_validation_duration", "TGI's.", TGI_SECONDS, ())
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
        for prefix, about in (("moesaic_", "Between tokens."), ("vllm:", "As vLLM has it.")):
            between = HistogramMetricFamily(prefix + "inter_token_latency_seconds", about, labels=("model_name",))
            for model, gaps in self.between.items():
                between.add_metric((model,), gaps.buckets(), gaps.seconds)
            yield between
        yield from self._more()

    def _totals(self, prefix: str, loads: Mapping[str, ModelStats]) -> Iterable[Metric]:
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


def _used(load: ModelStats) -> float:
    return 1 - load.free_blocks / load.blocks if load.blocks else 0.0


@dataclass(slots=True)
class AnswerTiming:
    """How far one answer has come: when its first and its newest token came, and how many there are."""

    first: float | None = None
    last: float = 0.0
    tokens: int = 0


class RequestMetrics:
    """One request on its way through the door. It ends once: well, with an error, or because nobody waits any more."""

    def __init__(
        self,
        metrics: Metrics,
        settings: Settings,
        request: GenerationRequest,
        span: Span | None,
        done: Callable[[], None],
    ) -> None:
        self._metrics, self._settings, self._model, self._span = metrics, settings, request.model, span
        self._clock = asyncio.get_running_loop().time
        self._begin = self._clock()
        self._read: float | None = None  # when the prompt was
        self._answers: dict[int, AnswerTiming] = {}
        self._open = int(request.sampling.get("n", 1))
        self._prompt_tokens = self._cached = 0
        self._done = done
        self.ended = False
        metrics.begun.labels(self._model).inc()
        metrics.count_tgi("tgi_request_count")
        metrics.observe(metrics.answers, self._model, self._open)
        if "max_tokens" in request.sampling:
            metrics.observe(metrics.most, self._model, request.sampling["max_tokens"])

    @property
    def tokens(self) -> int:
        """What the request has cost until now, prompt and answers; also one that nobody waited for."""
        return self._prompt_tokens + sum(each.tokens for each in self._answers.values())

    async def admitted(self, asking: Awaitable[ResponseStream]) -> ResponseStream:
        """Wait until the door has taken the request in.

        Raises:
            Unavailable: that took longer than a request may wait.
        """
        try:
            async with asyncio.timeout_at(self._until()) as bound:
                answers = await asking
        except TimeoutError:
            if not bound.expired():
                raise
            raise self._late() from None
        self._metrics.observe(self._metrics.validation, self._model, self._clock() - self._begin)
        return answers

    async def events(self, answers: ResponseStream) -> AsyncIterator[Event]:
        """Yield the events, within the time that is allowed. The clock stands still for no one but a slow reader.

        Pieces of an answer that came together are one: each one that is sent costs the engine's cores a moment.

        Raises:
            Unavailable: the request waited too long for its turn. TimedOut: its answer took too long.
        """
        async with contextlib.aclosing(self.batches(answers, joined=True)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(self, answers: ResponseStream, *, joined: bool = False) -> AsyncGenerator[list[Event]]:
        """Do the same, with all events together that can be had at once, and pieces as they were unless ``joined``."""
        source, patience = aiter(answers), Deadline()
        try:
            while True:
                event = await patience.wait(anext(source), self._until())
                batch = [event, *answers.ready()]
                if joined and len(batch) > 1:
                    batch = join(batch)
                for each in batch:
                    self._see(each)
                yield batch
        except StopAsyncIteration:
            return
        except DeadlineExceeded:
            raise self._late() from None
        finally:
            patience.close()

    def _until(self) -> float | None:
        """Return when patience is at its end."""
        waits = self._settings.queue_seconds if self._read is None else 0.0
        bounds = [self._begin + each for each in (waits, self._settings.request_seconds) if each]
        return min(bounds, default=None)

    def _late(self) -> MoesaicError:
        queue, whole = self._settings.queue_seconds, self._settings.request_seconds
        if self._read is None and queue and (not whole or queue <= whole):
            return Unavailable(f"the request waited {queue:g} s for its turn")
        return TimedOut(f"the answer took longer than {whole:g} s")

    def _see(self, event: Event) -> None:
        now, metrics = self._clock(), self._metrics
        if isinstance(event, PromptDone):
            self._prompt_tokens = event.prompt_tokens or self._prompt_tokens
            if self._read is None:
                self._read = now
                metrics.observe(metrics.queue, self._model, now - self._begin)
            return
        answer = self._answers.setdefault(event.index, AnswerTiming())
        if isinstance(event, Finished):
            self._end(answer, event, now)
        elif event.tokens:
            self._see_tokens(answer, len(event.tokens), now)

    def _see_tokens(self, answer: AnswerTiming, count: int, now: float) -> None:
        """Enter tokens that came together: each is as far from the one before as they are on average."""
        metrics, gap = self._metrics, (now - answer.last) / count
        answer.tokens += count
        if answer.first is None:
            answer.first, gap, count = now, 0.0, count - 1
            metrics.observe(metrics.first, self._model, now - self._begin)
        metrics.between.setdefault(self._model, LatencyHistogram()).add(gap, count)
        answer.last = now

    def _end(self, answer: AnswerTiming, event: Finished, now: float) -> None:
        """Enter the end of one answer; the last one's is that of the request."""
        metrics, model = self._metrics, self._model
        answer.tokens = event.generated_tokens
        self._prompt_tokens, self._cached = event.prompt_tokens, event.cached_tokens
        metrics.success.labels(model, "abort" if event.reason == "cancelled" else event.reason).inc()
        metrics.observe(metrics.generated, model, event.generated_tokens)
        if answer.first is not None:
            metrics.observe(metrics.decoding, model, answer.last - answer.first)
            if event.generated_tokens > 1:
                between = (answer.last - answer.first) / (event.generated_tokens - 1)
                metrics.observe(metrics.per_token, model, between)
        self._open -= 1
        if not self._open:
            self._finish(event.reason)
            metrics.count_tgi("tgi_request_success")
            metrics.observe(metrics.whole, model, now - self._begin)
            metrics.observe(metrics.inference, model, now - (self._read or now))
            metrics.observe(metrics.prompt, model, event.prompt_tokens)
            self._done()

    def close(self, error: BaseException | None) -> None:
        """Say that nothing more comes, because of ``error`` if that was not the end; None: nobody waits any more."""
        if self.ended:
            return
        error = error or Cancelled("the client left")
        self._metrics.success.labels(self._model, "abort").inc(self._open)
        status = error.status if isinstance(error, MoesaicError) else 500
        self._metrics.count_tgi("tgi_request_failure", FAILURES.get(status, "validation"))
        self._finish("cancelled" if isinstance(error, Cancelled) else type(error).__name__)

    def _finish(self, reason: str) -> None:
        self.ended = True
        self._metrics.ended.labels(self._model, reason).inc()
        if self._span:
            firsts = [each.first for each in self._answers.values() if each.first is not None]
            generated = sum(each.tokens for each in self._answers.values())
            first = min(firsts) - self._begin if firsts else None
            self._span.end(reason, self._prompt_tokens, self._cached, generated, first)
