"""What this machine can do at most: the figures that every speed is compared with.

Knows how to measure how fast memory is read and how fast bytes are multiplied, with the threads
that the kernels use. Needs the compiled kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moesaic.ops import native

PATTERNS = tuple((streams, ahead) for streams in (1, 2, 4) for ahead in (0, 1024, 2048, 4096, 8192))
"""(streams side by side, bytes asked for ahead) that are tried; the best counts."""


@dataclass(frozen=True)
class Limits:
    """GB are 10^9 bytes; an operation is a multiplication or an addition."""

    read_gb_s: float
    streams: int
    ahead: int
    int8_gop_s: float


def measure(gigabytes: float = 1.0, runs: int = 3, report: Callable[[str], object] = str) -> Limits:
    """Return the limits of this machine, the best of ``runs`` each; reads a buffer larger than any cache."""
    memory = torch.empty(int(gigabytes * 1e9) // (4 << 20) * (4 << 20), dtype=torch.uint8)
    native.huge_pages(memory)  # before it is touched
    memory.fill_(1)
    speeds = {}
    for streams, ahead in PATTERNS:
        seconds = min(timed(lambda: native.read_memory(memory, streams, ahead)) for _ in range(runs))  # noqa: B023
        speeds[streams, ahead] = len(memory) / seconds / 1e9
        report(f"read, {streams} streams, {ahead} bytes ahead: {speeds[streams, ahead]:.1f} GB/s")
    (streams, ahead), best = max(speeds.items(), key=lambda item: item[1])
    rounds = 20_000
    operations = native.multiply(rounds)
    fastest = operations / 1e9 / min(timed(lambda: native.multiply(rounds)) for _ in range(runs))
    report(f"multiply bytes: {fastest:.0f} GOP/s")
    return Limits(best, streams, ahead, fastest)


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def median_of(call: Callable[[], object], seconds: float = 1.0, least: int = 5) -> float:
    """Return the median time of a call, repeated for about ``seconds`` after one to warm up."""
    call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < least:
        times.append(timed(call))
    return statistics.median(times)
