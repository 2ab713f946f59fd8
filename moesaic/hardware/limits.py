"""Limits of this machine, with which all speeds are compared: memory bandwidth and the speed of multiplication.

The measurements use the threads of the kernels, and need the compiled kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moesaic.ops import native

READ_PATTERNS = tuple((streams, ahead) for streams in (1, 2, 4) for ahead in (0, 1024, 2048, 4096, 8192))
"""Read patterns to try: (parallel streams, bytes of prefetch distance). The fastest one counts."""


@dataclass(frozen=True)
class Limits:
    """Measured limits of a machine. GB are 10^9 bytes; an operation is a multiplication or an addition."""

    read_gb_s: float
    """Memory bandwidth with the fastest read pattern."""
    streams: int
    """Parallel streams of the fastest read pattern."""
    ahead: int
    """Prefetch distance of the fastest read pattern, in bytes."""
    int8_gop_s: float
    """10^9 operations per second on bytes with the machine's best instruction set: with AMX, in tile registers."""
    bf16_gop_s: float
    """10^9 operations per second on bfloat16 numbers with the machine's best instruction set."""
    vnni_gop_s: float
    """10^9 operations per second on bytes in vector registers: the limit of an engine without AMX. 0 without
    AVX-512."""

    def gop_s(self, weight_format: str) -> float:
        """Return the measured maximum speed with weights of a format, in 10^9 operations per second."""
        return self.bf16_gop_s if weight_format == "bfloat16" else self.int8_gop_s


def measure(gigabytes: float = 1.0, runs: int = 3, report: Callable[[str], object] = str) -> Limits:
    """Measure the limits of this machine.

    Args:
        gigabytes: size of the memory that is read; it must be larger than the CPU's caches.
        runs: number of measurements of each figure, the best of which counts.
        report: called with a line for each figure.
    """
    memory = torch.empty(int(gigabytes * 1e9) // (4 << 20) * (4 << 20), dtype=torch.uint8)
    native.huge_pages(memory)  # before the memory is first written
    memory.fill_(1)
    speeds = {}
    for streams, ahead in READ_PATTERNS:
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
    """Return the operations per nanosecond of ``multiply``, the best of ``runs`` measurements.

    ``multiply`` runs a number of rounds and returns its number of operations. A measurement takes about ``seconds``.
    """
    rounds = 1000
    rounds = max(1, int(rounds * seconds / timed(lambda: multiply(rounds))))
    operations = multiply(rounds)
    return operations / 1e9 / min(timed(lambda: multiply(rounds)) for _ in range(runs))


def timed(call: Callable[[], object]) -> float:
    """Return the duration of one call in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_of(call: Callable[[], object], seconds: float = 1.0, min_calls: int = 5) -> float:
    """Return the median duration of ``call`` in seconds.

    After a warm-up call, it is called for about ``seconds``, and at least ``min_calls`` times.
    """
    call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < min_calls:
        times.append(timed(call))
    return statistics.median(times)
