"""A load of requests, put on a server over HTTP, and when each piece of every answer came.

Knows when to ask: so many at once, or at times drawn beforehand. Does not know what is said over the wire
(``endpoints``), what is asked (``workload``), or what is made of it (``latency``). Everything happens in one
thread; how late that thread was is measured too, since a client that is late blames the server.
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

from moesaic.bench.endpoints import Answer, Ask, Endpoint, Failed
from moesaic.bench.workload import Scale, Words
from moesaic.errors import InvalidParameter, InvalidRequest

TICK = 0.01
"""Seconds between two looks at how late a timer is."""
PAUSE = 0.1
"""Seconds that a user waits after a failure; a server that refuses at once is not to be flooded."""
PROBES = (40, 240)
"""Words of the two prompts that show how many tokens a word has."""
SPARE_FILES = 64
"""What the process has open besides its connections."""

clock = time.perf_counter


@dataclass(frozen=True)
class Load:
    """When to ask.

    With ``concurrency`` (a closed loop) so many users each ask again as soon as they were answered; with
    ``rate`` (an open loop) requests begin at ``rate`` a second whatever becomes of them, the times between two
    gamma distributed: ``burstiness`` 1 is a Poisson process, less comes in bursts, more is more even. No more
    begin after ``requests``, or after ``duration`` seconds; those begun are waited for, each ``timeout`` seconds.

    Raises:
        InvalidParameter: a number is out of range.
        InvalidRequest: both, or neither, of two that exclude each other.
    """

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    requests: int | None = None
    duration: float | None = None
    warmup: int = 1
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise InvalidRequest("a load is either --concurrency or --request-rate")
        for name, least in (("concurrency", 1), ("requests", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidParameter(name, f"is {value}, expected at least {least}")
        for name in ("rate", "burstiness", "duration", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidParameter(name, f"is {value}, expected more than 0")
        if self.requests is None and self.duration is None:
            raise InvalidRequest("a load ends by --requests or by --duration")
        if self.rate == math.inf and self.requests is None:
            raise InvalidRequest("a rate without limit needs --requests")

    def arrivals(self) -> list[float]:
        """Return when requests of an open loop begin, in seconds; the same for the same seed.

        A given number of requests takes as long as it should on average, as in vLLM's benchmark.
        """
        assert self.rate is not None
        if self.rate == math.inf:
            return [0.0] * (self.requests or 0)
        draw, count = random.Random(f"{self.seed} arrivals"), self.requests
        mean = 1 / self.rate

        def gap() -> float:
            even = self.burstiness == math.inf
            return mean if even else draw.gammavariate(self.burstiness, mean / self.burstiness)

        if count is None:
            times, now = [], gap()
            while now < (self.duration or 0):
                times.append(now)
                now += gap()
            return times
        times = list(accumulate(gap() for _ in range(count)))
        times = [each * count * mean / times[-1] for each in times]
        return [each for each in times if self.duration is None or each < self.duration]


@dataclass(slots=True)
class Record:
    """What became of one request. Times are on the monotonic clock, in seconds."""

    index: int
    begun: float
    asked_tokens: int
    """The longest that the answer may be."""
    asked_prompt_tokens: int | None = None
    due: float | None = None
    """When it should have begun, in an open loop."""
    ended: float = 0.0
    answer: Answer = field(default_factory=Answer)
    failure: str | None = None
    """What kind of failure; None: it was answered."""
    detail: str = ""
    retry_after: str | None = None


@dataclass
class Run:
    """What was measured of one load."""

    load: Load
    began: float
    ended: float = 0.0
    records: list[Record] = field(default_factory=list)
    late: array[float] = field(default_factory=lambda: array("d"))
    """How late the client's timer was, in seconds, again and again."""
    cpu: float = 0.0
    """Seconds of processor time that the client took."""
    interrupted: bool = False
    """Whether somebody ended it early; what was running then is no record."""


@dataclass(frozen=True)
class Standing:
    """How far a run is."""

    done: int
    failed: int
    running: int
    total: int | None
    """None: it ends by the clock."""


Watch = Callable[[Standing], object]


async def measure(endpoint: Endpoint, asks: Iterator[Ask], load: Load, watch: Watch | None = None) -> Run:
    """Put ``load`` on a server, after ``load.warmup`` requests that do not count.

    Args:
        endpoint: whom to ask.
        asks: what.
        load: when.
        watch: called about once a second.

    Cancelled, it returns what is there by then.

    Raises:
        InvalidRequest: no warm-up was answered, or so many files cannot be open.
    """
    await _warm_up(endpoint, list(islice(asks, load.warmup)), load)
    times = None if load.rate is None else load.arrivals()
    _make_room(load.concurrency or len(times or ()), all_at_once=times is None)
    if load.requests is not None:
        asks = iter(list(islice(asks, load.requests if times is None else len(times))))  # drawn before the clock starts
    gc.collect()
    gc.freeze()  # what is there by now is never garbage: no need to look at it again
    crowd = _Crowd(endpoint, asks, load)
    try:
        return await crowd.run(times, watch)
    finally:
        gc.unfreeze()


async def calibrate(endpoint: Endpoint, timeout: float) -> Scale:
    """Return how many tokens a word has, from two short requests; one, if the server does not count.

    Raises:
        InvalidRequest: one of them was not answered.
    """
    seen = []
    for number, words in enumerate(PROBES):
        ask = next(Words(words, 1).asks(f"probe {number}"))
        record = await request(endpoint, ask, number, timeout)
        if record.failure not in (None, "no text"):
            raise InvalidRequest(f"a first request failed: {_told(record)}")
        if record.answer.prompt_tokens is None:
            return Scale()
        seen.append((words, record.answer.prompt_tokens))
    return Scale.through(*seen)


async def request(endpoint: Endpoint, ask: Ask, index: int, timeout: float, due: float | None = None) -> Record:
    """Ask once, and return what became of it."""
    record = Record(index, clock(), ask.max_tokens, ask.prompt_tokens, due)
    try:
        async with asyncio.timeout(timeout):
            await endpoint.answer(ask, record.answer)
        if not record.answer.arrivals:
            raise Failed("no text", "it ended well, but without any text")
    except Failed as failed:
        record.failure, record.detail, record.retry_after = failed.kind, failed.detail, failed.retry_after
    except TimeoutError:
        record.failure, record.detail = "timeout", f"not whole after {timeout:g} s"
    record.ended = clock()
    return record


class _Crowd:
    """All who ask in one run."""

    def __init__(self, endpoint: Endpoint, asks: Iterator[Ask], load: Load) -> None:
        self._endpoint = endpoint
        self._asks = enumerate(asks)
        self._load = load
        self._running = 0
        self._failed = 0
        self._run = Run(load, 0.0)

    async def run(self, times: list[float] | None, watch: Watch | None) -> Run:
        """Ask, and return what became of it; with ``times`` then, otherwise without a pause."""
        run, cpu = self._run, time.process_time()
        run.began = clock()
        ticker = asyncio.create_task(self._tick(watch))
        try:
            await (self._closed() if times is None else self._open(times))
        except asyncio.CancelledError:
            run.interrupted = True
        finally:
            ticker.cancel()
        run.ended, run.cpu = clock(), time.process_time() - cpu
        run.records.sort(key=lambda record: record.index)
        return run

    async def _closed(self) -> None:
        async with asyncio.TaskGroup() as users:
            for _ in range(self._load.concurrency or 0):
                users.create_task(self._user())
                await asyncio.sleep(0)  # or all would begin before the first has sent anything

    async def _user(self) -> None:
        until = math.inf if self._load.duration is None else self._run.began + self._load.duration
        while clock() < until and (following := next(self._asks, None)):
            if not await self._ask(*following):
                await asyncio.sleep(PAUSE)

    async def _open(self, times: list[float]) -> None:
        async with asyncio.TaskGroup() as requests:
            for at in times:
                due = self._run.began + at
                await asyncio.sleep(due - clock())
                requests.create_task(self._ask(*next(self._asks), due))

    async def _ask(self, index: int, ask: Ask, due: float | None = None) -> bool:
        self._running += 1
        record = await request(self._endpoint, ask, index, self._load.timeout, due)
        self._running -= 1
        self._failed += record.failure is not None
        self._run.records.append(record)
        return record.failure is None

    async def _tick(self, watch: Watch | None) -> None:
        """Note how late a timer rings, and tell ``watch``."""
        late, told = self._run.late.append, clock()
        while True:
            due = clock() + TICK
            await asyncio.sleep(TICK)
            now = clock()
            late(now - due)
            if watch is not None and now - told >= 1:
                told = now
                watch(Standing(len(self._run.records), self._failed, self._running, self._load.requests))


async def _warm_up(endpoint: Endpoint, asks: list[Ask], load: Load) -> None:
    """Ask what does not count, as many at once as later.

    Raises:
        InvalidRequest: none of it was answered.
    """
    most = asyncio.Semaphore(load.concurrency or len(asks) or 1)

    async def one(index: int, ask: Ask) -> Record:
        async with most:
            return await request(endpoint, ask, index, load.timeout)

    records = await asyncio.gather(*(one(index, ask) for index, ask in enumerate(asks)))
    if records and all(record.failure for record in records):
        raise InvalidRequest(f"no warm-up was answered: {_told(records[0])}")


def _told(record: Record) -> str:
    return f"{record.failure}: {record.detail}" if record.detail else str(record.failure)


def _make_room(connections: int, *, all_at_once: bool) -> None:
    """Let the process have so many connections open, or as many as the system allows.

    Raises:
        InvalidRequest: those are too few, and all are needed at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted and all_at_once:
        raise InvalidRequest(f"{connections} connections need more open files than the system allows ({hard})")
