"""Load generator: sends requests to a server over HTTP and records the arrival time of every piece of every answer.

This module decides when to send: with a constant number of concurrent requests, or at times drawn beforehand. It does
not know the wire format (``endpoints``), the content of requests (``workload``) or the evaluation (``latency``).
Everything runs in one thread. The delay of that thread is measured too, because a slow client makes a server look slow.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import resource
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice

from moesaic.bench.endpoints import Answer, Endpoint, Request, RequestFailed
from moesaic.bench.workload import RandomWords, TokenScale
from moesaic.errors import InvalidParameter, InvalidRequest

TIMER_SECONDS = 0.01
"""Seconds of the timer whose delay, measured again and again, shows how late the client itself is."""
FAILURE_PAUSE_SECONDS = 0.1
"""Pause of a simulated user after a failure, so that a server that refuses at once is not flooded."""
PROBE_WORDS = (40, 240)
"""Lengths, in words, of the two prompts with which ``calibrate`` measures the tokens per word."""
OTHER_FILES = 64
"""Open files that the process needs besides its connections."""

clock = time.perf_counter


@dataclass(frozen=True)
class LoadProfile:
    """When requests are sent.

    A closed loop has ``concurrency`` simulated users, each of whom sends the next request as soon as the last one is
    answered. An open loop sends ``rate`` requests per second regardless of the answers. The intervals are gamma
    distributed: ``burstiness`` 1 is a Poisson process, smaller values make bursts, larger values even intervals.
    No request starts after ``requests`` requests or ``duration`` seconds. Started requests are waited for, each at
    most ``timeout`` seconds.

    Raises:
        InvalidParameter: a number is out of range.
        InvalidRequest: two fields exclude each other, or a required field is missing.
    """

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    requests: int | None = None
    duration: float | None = None
    warmup: int = 1
    """Number of requests before the measurement, which are not recorded."""
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise InvalidRequest("pass either --concurrency or --request-rate")
        for name, minimum in (("concurrency", 1), ("requests", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InvalidParameter(name, f"is {value}, expected at least {minimum}")
        for name in ("rate", "burstiness", "duration", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidParameter(name, f"is {value}, expected more than 0")
        if self.requests is None and self.duration is None:
            raise InvalidRequest("a limit is required: pass --requests or --duration")
        if self.rate == math.inf and self.requests is None:
            raise InvalidRequest("--request-rate inf requires --requests")

    def arrivals(self) -> list[float]:
        """Return the start times of an open loop's requests, in seconds; the same seed gives the same times.

        If ``requests`` is set, the times are scaled so that the last one is at its expected time, as in vLLM's
        benchmark.
        """
        assert self.rate is not None
        if self.rate == math.inf:
            return [0.0] * (self.requests or 0)
        generator, count = random.Random(f"{self.seed} arrivals"), self.requests
        mean = 1 / self.rate

        def interval() -> float:
            even = self.burstiness == math.inf
            return mean if even else generator.gammavariate(self.burstiness, mean / self.burstiness)

        if count is None:
            times, now = [], interval()
            while now < (self.duration or 0):
                times.append(now)
                now += interval()
            return times
        times = list(accumulate(interval() for _ in range(count)))
        times = [value * count * mean / times[-1] for value in times]
        return [value for value in times if self.duration is None or value < self.duration]


@dataclass(slots=True)
class RequestRecord:
    """Result of one request. Times are on the monotonic clock, in seconds."""

    index: int
    start: float
    max_tokens: int
    """Maximum tokens of the answer."""
    prompt_tokens: int | None = None
    """Intended length of the prompt in tokens; None if unknown."""
    due: float | None = None
    """Planned start time in an open loop; None in a closed loop."""
    end: float = 0.0
    answer: Answer = field(default_factory=Answer)
    failure: str | None = None
    """Kind of failure; None if the request was answered."""
    detail: str = ""
    retry_after: str | None = None


@dataclass
class Run:
    """Measurement of one load profile."""

    load: LoadProfile
    start: float
    end: float = 0.0
    records: list[RequestRecord] = field(default_factory=list)
    timer_delays: array[float] = field(default_factory=lambda: array("d"))
    """Delays of the client's timer, in seconds."""
    cpu_seconds: float = 0.0
    """Processor time that the client used."""
    interrupted: bool = False
    """Whether the run was cancelled; requests that were running then have no record."""


@dataclass(frozen=True)
class Progress:
    """State of a running measurement."""

    done: int
    failed: int
    running: int
    total: int | None
    """Number of requests of the whole run; None if its duration ends it."""


ProgressCallback = Callable[[Progress], object]


async def measure(
    endpoint: Endpoint, requests: Iterator[Request], load: LoadProfile, on_progress: ProgressCallback | None = None
) -> Run:
    """Send the requests of a load profile to a server, and return the measurement.

    Before, ``load.warmup`` requests are sent that are not recorded.

    If the task is cancelled, the measurement of the requests completed so far is returned.

    Args:
        endpoint: the server.
        requests: the requests to send.
        load: when to send them.
        on_progress: called about once per second.

    Raises:
        InvalidRequest: all warm-up requests failed, or the system allows too few open files.
    """
    await _warm_up(endpoint, list(islice(requests, load.warmup)), load)
    times = None if load.rate is None else load.arrivals()
    _raise_file_limit(load.concurrency or len(times or ()), all_at_once=times is None)
    if load.requests is not None:  # generate the requests before the clock starts
        requests = iter(list(islice(requests, load.requests if times is None else len(times))))
    gc.collect()
    gc.freeze()  # existing objects are never garbage, so collections need not scan them
    generator = _LoadGenerator(endpoint, requests, load)
    try:
        return await generator.run(times, on_progress)
    finally:
        gc.unfreeze()


async def calibrate(endpoint: Endpoint, timeout: float) -> TokenScale:
    """Return the tokens per word, measured with two short requests; 1 if the server does not count prompt tokens.

    Raises:
        InvalidRequest: one of the requests failed.
    """
    counts = []
    for number, words in enumerate(PROBE_WORDS):
        request = next(RandomWords(words, 1).requests(f"probe {number}"))
        record = await send_request(endpoint, request, number, timeout)
        if record.failure not in (None, "no text"):
            raise InvalidRequest(f"the first request failed: {_failure(record)}")
        if record.answer.prompt_tokens is None:
            return TokenScale()
        counts.append((words, record.answer.prompt_tokens))
    return TokenScale.from_prompts(*counts)


async def send_request(
    endpoint: Endpoint, request: Request, index: int, timeout: float, due: float | None = None
) -> RequestRecord:
    """Send one request and return its record; failures are recorded, not raised."""
    record = RequestRecord(index, clock(), request.max_tokens, request.prompt_tokens, due)
    try:
        async with asyncio.timeout(timeout):
            await endpoint.send(request, record.answer)
        if not record.answer.arrivals:
            raise RequestFailed("no text", "the answer is complete but has no text")
    except RequestFailed as failed:
        record.failure, record.detail, record.retry_after = failed.kind, failed.detail, failed.retry_after
    except TimeoutError:
        record.failure, record.detail = "timeout", f"not complete after {timeout:g} s"
    record.end = clock()
    return record


class _LoadGenerator:
    """Sends the requests of one run."""

    def __init__(self, endpoint: Endpoint, requests: Iterator[Request], load: LoadProfile) -> None:
        self._endpoint = endpoint
        self._requests = enumerate(requests)
        self._load = load
        self._running = 0
        self._failed = 0
        self._run = Run(load, 0.0)

    async def run(self, times: list[float] | None, on_progress: ProgressCallback | None) -> Run:
        """Send all requests, at ``times`` or in a closed loop if it is None, and return the measurement."""
        run, cpu = self._run, time.process_time()
        run.start = clock()
        timer = asyncio.create_task(self._measure_delays(on_progress))
        try:
            await (self._closed_loop() if times is None else self._open_loop(times))
        except asyncio.CancelledError:
            run.interrupted = True
        finally:
            timer.cancel()
        run.end, run.cpu_seconds = clock(), time.process_time() - cpu
        run.records.sort(key=lambda record: record.index)
        return run

    async def _closed_loop(self) -> None:
        async with asyncio.TaskGroup() as users:
            for _ in range(self._load.concurrency or 0):
                users.create_task(self._user())
                await asyncio.sleep(0)  # let each user send its request before the next user starts

    async def _user(self) -> None:
        end = math.inf if self._load.duration is None else self._run.start + self._load.duration
        while clock() < end and (entry := next(self._requests, None)):
            if not await self._send(*entry):
                await asyncio.sleep(FAILURE_PAUSE_SECONDS)

    async def _open_loop(self, times: list[float]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for offset in times:
                due = self._run.start + offset
                await asyncio.sleep(due - clock())
                tasks.create_task(self._send(*next(self._requests), due))

    async def _send(self, index: int, request: Request, due: float | None = None) -> bool:
        """Send a request, add its record to the run, and return whether it was answered."""
        self._running += 1
        record = await send_request(self._endpoint, request, index, self._load.timeout, due)
        self._running -= 1
        self._failed += record.failure is not None
        self._run.records.append(record)
        return record.failure is None

    async def _measure_delays(self, on_progress: ProgressCallback | None) -> None:
        """Record the delay of a timer until cancelled, and call ``on_progress`` once per second."""
        add_delay, reported = self._run.timer_delays.append, clock()
        while True:
            due = clock() + TIMER_SECONDS
            await asyncio.sleep(TIMER_SECONDS)
            now = clock()
            add_delay(now - due)
            if on_progress is not None and now - reported >= 1:
                reported = now
                on_progress(Progress(len(self._run.records), self._failed, self._running, self._load.requests))


async def _warm_up(endpoint: Endpoint, requests: list[Request], load: LoadProfile) -> None:
    """Send warm-up requests with the concurrency of the run.

    Raises:
        InvalidRequest: all of them failed.
    """
    slots = asyncio.Semaphore(load.concurrency or len(requests) or 1)

    async def send(index: int, request: Request) -> RequestRecord:
        async with slots:
            return await send_request(endpoint, request, index, load.timeout)

    records = await asyncio.gather(*(send(index, request) for index, request in enumerate(requests)))
    if records and all(record.failure for record in records):
        raise InvalidRequest(f"all warm-up requests failed: {_failure(records[0])}")


def _failure(record: RequestRecord) -> str:
    return f"{record.failure}: {record.detail}" if record.detail else str(record.failure)


def _raise_file_limit(connections: int, *, all_at_once: bool) -> None:
    """Raise this process's limit on open files for this many connections, or as far as the system allows.

    Raises:
        InvalidRequest: the system allows too few, and all connections are needed at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    required = connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or required <= soft:
        return
    allowed = required if hard == resource.RLIM_INFINITY else min(required, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < required and all_at_once:
        raise InvalidRequest(f"{connections} connections need more open files than the system allows ({hard})")
