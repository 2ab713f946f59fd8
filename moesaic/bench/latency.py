"""Latency and throughput figures of a run: TTFT, TPOT, ITL, E2E, throughput, goodput, and the client's own delay.

Names and definitions are those of ``vllm bench serve``, so that results can be compared: TTFT is the time from sending
to the first text; E2E to the last text; ITL the time from one text to the next; TPOT is (E2E - TTFT) / (tokens - 1),
for answers of more than one token. Failed requests are counted, and are left out of all other figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from moesaic.bench.serving import RequestRecord, Run
from moesaic.errors import InvalidParameter

METRICS = ("ttft", "tpot", "itl", "e2el")
SLO_METRICS = ("ttft", "tpot", "e2el")
"""Metrics that a limit of ``parse_goodput`` can be on."""
TIMER_RESOLUTION_SECONDS = 0.002
"""Delay that a timer has even on an idle system; it causes no warning."""
MAX_DELAY_SHARE = 0.2
"""Largest acceptable delay of the client, relative to the smaller of the median ITL and the median TTFT."""
MAX_CPU_SHARE = 0.9
"""Largest acceptable use of a core by the client."""


def tokens(record: RequestRecord) -> int:
    """Return the number of tokens of an answer, or of its chunks of text if the server does not count tokens."""
    counted = record.answer.tokens
    return len(record.answer.arrivals) if counted is None else counted


def ttft(record: RequestRecord) -> float:
    """Return the seconds from sending a request to the first text of its answer."""
    return record.answer.arrivals[0] - record.start


def e2el(record: RequestRecord) -> float:
    """Return the seconds from sending a request to the last text of its answer."""
    return record.answer.arrivals[-1] - record.start


def tpot(record: RequestRecord) -> float | None:
    """Return the seconds per token after the first; None if there is only one token."""
    count = tokens(record)
    return (e2el(record) - ttft(record)) / (count - 1) if count > 1 else None


def itl(record: RequestRecord) -> list[float]:
    """Return the seconds from each text of an answer to the next."""
    return [after - before for before, after in pairwise(record.answer.arrivals)]


def parse_goodput(text: str | None) -> dict[str, float]:
    """Parse limits of a good request, such as "ttft=500,tpot=50", in milliseconds.

    Raises:
        InvalidParameter: a part is not a metric, "=" and a positive number.
    """
    slos: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part:
            continue
        name, _, value = part.replace(":", "=").partition("=")
        try:
            slos[name] = float(value)
        except ValueError:
            slos[name] = 0.0
        if name not in SLO_METRICS or not 0 < slos[name] < math.inf:
            raise InvalidParameter("goodput", f"is {part!r}, expected METRIC=MS with one of {', '.join(SLO_METRICS)}")
    return slos


def summarize(run: Run, slos: dict[str, float]) -> dict[str, Any]:
    """Return all figures of a run, under vLLM's names where it has one.

    A figure is None if no answered request has a value for it. ``slos`` are the limits of ``parse_goodput``.
    """
    good = [record for record in run.records if record.failure is None]
    seconds = run.end - run.start
    output = sum(map(tokens, good))
    prompts = sum(_prompt_tokens(record) for record in good)
    samples = _samples(good)
    result: dict[str, Any] = {
        "request_rate": _finite(run.load.rate),
        "burstiness": _finite(run.load.burstiness) if run.load.rate is not None else None,
        "max_concurrency": run.load.concurrency,
        "num_prompts": len(run.records),
        "duration": seconds,
        "interrupted": run.interrupted,
        "completed": len(good),
        "failed": len(run.records) - len(good),
        "failures": dict(Counter(record.failure for record in run.records if record.failure)),
        "total_input_tokens": prompts,
        "total_output_tokens": output,
        "tokens_counted_by": _counted_by([record.answer.tokens for record in good], "chunks"),
        "prompt_tokens_counted_by": _counted_by([record.answer.prompt_tokens for record in good], "words"),
        "mean_prompt_tokens": _mean([_prompt_tokens(record) for record in good]),
        "mean_prompt_tokens_asked": _mean(
            [record.prompt_tokens for record in good if record.prompt_tokens is not None]
        ),
        "mean_answer_tokens": _mean([tokens(record) for record in good]),
        "mean_answer_tokens_asked": _mean([record.max_tokens for record in good]),
        "tokens_per_chunk": output / chunks
        if (chunks := sum(len(record.answer.arrivals) for record in good))
        else None,
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(meets_slos(record, slos) for record in good) / seconds if slos else None,
        "goodput": slos or None,
        "output_throughput": output / seconds,
        "total_token_throughput": (output + prompts) / seconds,
        "max_output_tokens_per_s": max(tokens_per_second(run), default=0.0),
        "max_concurrent_requests": peak_concurrency(run.records),
    }
    per_stream = [1 / value for value in map(tpot, good) if value]
    result |= {
        "mean_stream_throughput": _mean(per_stream),
        "p10_stream_throughput": _percentile(per_stream, 10),
    }
    for name in METRICS:
        result |= _statistics(name, samples[name])
    return result | _client(run, samples)


def meets_slos(record: RequestRecord, slos: dict[str, float]) -> bool:
    """Return whether an answer keeps all limits of ``parse_goodput``; a single token keeps every limit on TPOT."""
    measures: dict[str, Callable[[RequestRecord], float | None]] = {"ttft": ttft, "tpot": tpot, "e2el": e2el}
    return all((measures[name](record) or 0.0) * 1000 <= limit for name, limit in slos.items())


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """Return the maximum number of concurrent requests; a request that ends when another starts is not counted."""
    steps = sorted([(record.start, 1) for record in records] + [(record.end, -1) for record in records])
    running = peak = 0
    for _, step in steps:
        running += step
        peak = max(peak, running)
    return peak


def tokens_per_second(run: Run) -> list[float]:
    """Return the number of output tokens in each second of a run; the chunks of an answer share its tokens evenly."""
    totals = [0.0] * max(1, math.ceil(run.end - run.start))
    for record in run.records:
        if record.failure is None:
            per_piece = tokens(record) / len(record.answer.arrivals)
            for time in record.answer.arrivals:
                totals[min(int(time - run.start), len(totals) - 1)] += per_piece
    return totals


def request_row(record: RequestRecord, run: Run) -> dict[str, Any]:
    """Return the figures of a single request, for a line of a JSONL file."""
    complete = record.failure is None
    return {
        "index": record.index,
        "begun_s": record.start - run.start,
        "late_ms": None if record.due is None else (record.start - record.due) * 1000,
        "failure": record.failure,
        "detail": record.detail or None,
        "retry_after": record.retry_after,
        "prompt_tokens": record.answer.prompt_tokens,
        "prompt_tokens_asked": record.prompt_tokens,
        "tokens": record.answer.tokens if record.answer.tokens is not None else len(record.answer.arrivals),
        "tokens_asked": record.max_tokens,
        "chunks": len(record.answer.arrivals),
        "ttft_ms": ttft(record) * 1000 if record.answer.arrivals else None,
        "tpot_ms": value * 1000 if complete and (value := tpot(record)) is not None else None,
        "e2el_ms": e2el(record) * 1000 if complete else None,
        "ended_s": record.end - run.start,
        "itl_ms": [round(gap * 1000, 3) for gap in itl(record)],
    }


def samples_ms(run: Run) -> dict[str, list[float]]:
    """Return all values of TTFT, TPOT, ITL and E2E of the answered requests, in milliseconds."""
    good = [record for record in run.records if record.failure is None]
    return {name: [value * 1000 for value in values] for name, values in _samples(good).items()}


def _samples(good: Sequence[RequestRecord]) -> dict[str, list[float]]:
    return {
        "ttft": [ttft(record) for record in good],
        "tpot": [value for value in map(tpot, good) if value is not None],
        "itl": [gap for record in good for gap in itl(record)],
        "e2el": [e2el(record) for record in good],
    }


def _statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    scaled = np.asarray(values) * 1000
    if not len(scaled):
        return {f"{statistic}_{name}_ms": None for statistic in ("mean", "median", "std", "p90", "p99", "max")}
    median, p90, p99, maximum = np.percentile(scaled, [50, 90, 99, 100]).tolist()
    averages = {
        f"mean_{name}_ms": float(scaled.mean()),
        f"median_{name}_ms": median,
        f"std_{name}_ms": float(scaled.std()),
    }
    return averages | {f"p90_{name}_ms": p90, f"p99_{name}_ms": p99, f"max_{name}_ms": maximum}


def _client(run: Run, samples: dict[str, list[float]]) -> dict[str, Any]:
    """Return the delay and CPU use of the load generator itself, and a warning if they affect the figures."""
    delay = _percentile(run.timer_delays, 99) or 0.0
    send_delay = _percentile([record.start - record.due for record in run.records if record.due is not None], 99)
    cpu_share = run.cpu_seconds / (run.end - run.start)
    medians = (_percentile(samples[name], 50) for name in ("itl", "ttft"))
    acceptable = min((value for value in medians if value), default=math.inf) * MAX_DELAY_SHARE
    reason, longest = None, max(delay, send_delay or 0.0)
    if longest > max(TIMER_RESOLUTION_SECONDS, acceptable):
        reason = f"its timers were up to {longest * 1000:.1f} ms late (p99)"
    elif cpu_share > MAX_CPU_SHARE:
        reason = f"it used {cpu_share:.0%} of a core"
    advice = "use fewer streams, or run the client on another machine"
    return {
        "client_lag_p99_ms": delay * 1000,
        "client_lag_max_ms": max(run.timer_delays, default=0.0) * 1000,
        "client_send_late_p99_ms": None if send_delay is None else send_delay * 1000,
        "client_cpu": cpu_share,
        "warning": reason and f"the client itself was a bottleneck: {reason}; {advice}",
    }


def _prompt_tokens(record: RequestRecord) -> int:
    counted = record.answer.prompt_tokens
    return (record.prompt_tokens or 0) if counted is None else counted


def _counted_by(counts: Sequence[int | None], fallback: str) -> str:
    missing = sum(count is None for count in counts)
    return "usage" if not missing else fallback if missing == len(counts) else f"usage, else {fallback}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(np.asarray(values), percent)) if len(values) else None


def _finite(value: float | None) -> float | str | None:
    return "inf" if value == math.inf else value  # JSON has no infinity; vLLM writes the same string
