"""What times of arrival come to: TTFT, TPOT, ITL, E2E, throughput, goodput, and how much of it is the client's fault.

Knows arithmetic. Names and definitions are those of ``vllm bench serve``, so that results can be laid side by
side: TTFT from sending to the first text; E2E to the last text; ITL each time from one text to the next; TPOT
(E2E - TTFT) / (tokens - 1), for answers of more than one token. What failed is counted, and counts nowhere else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from moesaic.bench.serving import Record, Run
from moesaic.errors import InvalidParameter

METRICS = ("ttft", "tpot", "itl", "e2el")
PROMISES = ("ttft", "tpot", "e2el")
"""What can be promised for each request."""
LATE = 0.002
"""Seconds by which an idle timer may be late: the system's own coarseness."""
LATE_SHARE = 0.2
"""Of the median ITL or TTFT, whichever is less: from where on lateness spoils the figures."""
BUSY = 0.9
"""Share of a core from which on a client counts as the bottleneck."""


def tokens(record: Record) -> int:
    """Return the tokens of an answer: as the server counts them, else its pieces."""
    counted = record.answer.tokens
    return len(record.answer.arrivals) if counted is None else counted


def ttft(record: Record) -> float:
    """Return seconds to the first text."""
    return record.answer.arrivals[0] - record.begun


def e2el(record: Record) -> float:
    """Return seconds to the last text."""
    return record.answer.arrivals[-1] - record.begun


def tpot(record: Record) -> float | None:
    """Return seconds for each token after the first; None of a single one."""
    count = tokens(record)
    return (e2el(record) - ttft(record)) / (count - 1) if count > 1 else None


def itl(record: Record) -> list[float]:
    """Return seconds between texts."""
    return [after - before for before, after in pairwise(record.answer.arrivals)]


def promises(text: str | None) -> dict[str, float]:
    """Read "ttft=500,tpot=50": milliseconds that a good request keeps to.

    Raises:
        InvalidParameter: it is something else.
    """
    found: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part:
            continue
        name, _, value = part.replace(":", "=").partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        if name not in PROMISES or not 0 < found[name] < math.inf:
            raise InvalidParameter("goodput", f"{part!r} is none of {', '.join(PROMISES)}, =, and milliseconds")
    return found


def figures(run: Run, promised: dict[str, float]) -> dict[str, Any]:
    """Return everything that one run shows, under vLLM's names where it has one; None: nothing was answered."""
    good = [record for record in run.records if record.failure is None]
    seconds = run.ended - run.began
    made = sum(map(tokens, good))
    read = sum(_prompt_tokens(record) for record in good)
    samples = _samples(good)
    found: dict[str, Any] = {
        "request_rate": _finite(run.load.rate),
        "burstiness": _finite(run.load.burstiness) if run.load.rate is not None else None,
        "max_concurrency": run.load.concurrency,
        "num_prompts": len(run.records),
        "duration": seconds,
        "interrupted": run.interrupted,
        "completed": len(good),
        "failed": len(run.records) - len(good),
        "failures": dict(Counter(record.failure for record in run.records if record.failure)),
        "total_input_tokens": read,
        "total_output_tokens": made,
        "tokens_counted_by": _counted_by([record.answer.tokens for record in good], "chunks"),
        "prompt_tokens_counted_by": _counted_by([record.answer.prompt_tokens for record in good], "words"),
        "mean_prompt_tokens": _mean([_prompt_tokens(record) for record in good]),
        "mean_prompt_tokens_asked": _mean(
            [record.asked_prompt_tokens for record in good if record.asked_prompt_tokens is not None]
        ),
        "mean_answer_tokens": _mean([tokens(record) for record in good]),
        "mean_answer_tokens_asked": _mean([record.asked_tokens for record in good]),
        "tokens_per_chunk": made / chunks if (chunks := sum(len(record.answer.arrivals) for record in good)) else None,
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(keeps(record, promised) for record in good) / seconds if promised else None,
        "goodput": promised or None,
        "output_throughput": made / seconds,
        "total_token_throughput": (made + read) / seconds,
        "max_output_tokens_per_s": max(timeline(run), default=0.0),
        "max_concurrent_requests": peak(run.records),
    }
    per_stream = [1 / each for each in map(tpot, good) if each]
    found |= {
        "mean_stream_throughput": _mean(per_stream),
        "p10_stream_throughput": _percentile(per_stream, 10),
    }
    for name in METRICS:
        found |= _statistics(name, samples[name])
    return found | _client(run, samples)


def keeps(record: Record, promised: dict[str, float]) -> bool:
    """Return whether an answer came as fast as was promised; a single token keeps any TPOT."""
    measures: dict[str, Callable[[Record], float | None]] = {"ttft": ttft, "tpot": tpot, "e2el": e2el}
    return all((measures[name](record) or 0.0) * 1000 <= most for name, most in promised.items())


def peak(records: Sequence[Record]) -> int:
    """Return how many requests were running at once, at most; one that ends as another begins runs no more."""
    steps = sorted([(record.begun, 1) for record in records] + [(record.ended, -1) for record in records])
    running = most = 0
    for _, step in steps:
        running += step
        most = max(most, running)
    return most


def timeline(run: Run) -> list[float]:
    """Return output tokens for each second of a run; a piece of text counts as many as the answer's average one."""
    found = [0.0] * max(1, math.ceil(run.ended - run.began))
    for record in run.records:
        if record.failure is None:
            each = tokens(record) / len(record.answer.arrivals)
            for at in record.answer.arrivals:
                found[min(int(at - run.began), len(found) - 1)] += each
    return found


def single(record: Record, run: Run) -> dict[str, Any]:
    """Return what one request shows, for a line of its own."""
    whole = record.failure is None
    return {
        "index": record.index,
        "begun_s": record.begun - run.began,
        "late_ms": None if record.due is None else (record.begun - record.due) * 1000,
        "failure": record.failure,
        "detail": record.detail or None,
        "retry_after": record.retry_after,
        "prompt_tokens": record.answer.prompt_tokens,
        "prompt_tokens_asked": record.asked_prompt_tokens,
        "tokens": record.answer.tokens if record.answer.tokens is not None else len(record.answer.arrivals),
        "tokens_asked": record.asked_tokens,
        "chunks": len(record.answer.arrivals),
        "ttft_ms": ttft(record) * 1000 if record.answer.arrivals else None,
        "tpot_ms": each * 1000 if whole and (each := tpot(record)) is not None else None,
        "e2el_ms": e2el(record) * 1000 if whole else None,
        "ended_s": record.ended - run.began,
        "itl_ms": [round(gap * 1000, 3) for gap in itl(record)],
    }


def samples_ms(run: Run) -> dict[str, list[float]]:
    """Return every single TTFT, TPOT, ITL and E2E of what was answered, in milliseconds."""
    good = [record for record in run.records if record.failure is None]
    return {name: [value * 1000 for value in values] for name, values in _samples(good).items()}


def _samples(good: Sequence[Record]) -> dict[str, list[float]]:
    return {
        "ttft": [ttft(record) for record in good],
        "tpot": [each for each in map(tpot, good) if each is not None],
        "itl": [gap for record in good for gap in itl(record)],
        "e2el": [e2el(record) for record in good],
    }


def _statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    scaled = np.asarray(values) * 1000
    if not len(scaled):
        return {f"{which}_{name}_ms": None for which in ("mean", "median", "std", "p90", "p99", "max")}
    median, p90, p99, most = np.percentile(scaled, [50, 90, 99, 100]).tolist()
    spread = {
        f"mean_{name}_ms": float(scaled.mean()),
        f"median_{name}_ms": median,
        f"std_{name}_ms": float(scaled.std()),
    }
    return spread | {f"p90_{name}_ms": p90, f"p99_{name}_ms": p99, f"max_{name}_ms": most}


def _client(run: Run, samples: dict[str, list[float]]) -> dict[str, Any]:
    """Return how late and how busy the client itself was, and a warning if that shows in the figures."""
    late = _percentile(run.late, 99) or 0.0
    sent = _percentile([record.begun - record.due for record in run.records if record.due is not None], 99)
    busy = run.cpu / (run.ended - run.began)
    medians = (_percentile(samples[name], 50) for name in ("itl", "ttft"))
    bearable = min((value for value in medians if value), default=math.inf) * LATE_SHARE
    why = None
    if max(late, sent or 0.0) > max(LATE, bearable):
        why = f"its timers were up to {max(late, sent or 0.0) * 1000:.1f} ms late (p99)"
    elif busy > BUSY:
        why = f"it took {busy:.0%} of a core"
    return {
        "client_lag_p99_ms": late * 1000,
        "client_lag_max_ms": max(run.late, default=0.0) * 1000,
        "client_send_late_p99_ms": None if sent is None else sent * 1000,
        "client_cpu": busy,
        "warning": why and f"the client itself was a bottleneck: {why}; take fewer streams, or a machine of its own",
    }


def _prompt_tokens(record: Record) -> int:
    counted = record.answer.prompt_tokens
    return (record.asked_prompt_tokens or 0) if counted is None else counted


def _counted_by(counts: Sequence[int | None], otherwise: str) -> str:
    missing = sum(count is None for count in counts)
    return "usage" if not missing else otherwise if missing == len(counts) else f"usage, else {otherwise}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(np.asarray(values), percent)) if len(values) else None


def _finite(value: float | None) -> float | str | None:
    return "inf" if value == math.inf else value  # as vLLM writes it: JSON has no infinity
