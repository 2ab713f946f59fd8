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
    """Products of bytes by the best instruction set there is: with AMX, by tile registers."""
    bf16_gop_s: float
    """The same of bfloat16."""
    vnni_gop_s: float
    """Products of bytes in vector registers, the limit of an engine without tiles; 0 where there is no AVX-512."""

    def gop_s(self, format: str) -> float:
        """Return the most operations in a second with weights of this format."""
        return self.bf16_gop_s if format == "bfloat16" else self.int8_gop_s


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
    isa = native.instruction_set()
    peaks = {"int8": _peak(native.multiply, runs), "bfloat16": _peak(native.multiply_bf16, runs), "VNNI": 0.0}
    if native.use_instruction_set("avx512"):
        peaks["VNNI"] = _peak(native.multiply, runs)
        native.use_instruction_set(isa)
    for name, peak in peaks.items():
        report(f"multiply, {name}: {peak:.0f} GOP/s")
    return Limits(best, streams, ahead, *peaks.values())


def _peak(multiply: Callable[[int], int], runs: int, seconds: float = 0.1) -> float:
    """Return the operations in a nanosecond, in as many rounds as take about ``seconds``."""
    rounds = 1000
    rounds = max(1, int(rounds * seconds / timed(lambda: multiply(rounds))))
    operations = multiply(rounds)
    return operations / 1e9 / min(timed(lambda: multiply(rounds)) for _ in range(runs))


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
