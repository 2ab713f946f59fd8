"""A job as a gateway follows it: what is known of its answer so far, who does it, and who reads along.

Knows events and their numbers. Does not know stores, workers or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.backend import Delta, Event, Finished
from moesaic.errors import MoesaicError, Unavailable


@dataclass(eq=False)
class Live:
    """One job."""

    id: str
    model: str
    tenant: str
    events: list[Event] = field(default_factory=list)
    kept: int = 0
    """How many of them are on disk."""
    fence: int = 0
    worker: str = ""
    """Who does it, if the worker came to this gateway; "": nobody, or one of another gateway."""
    ended: bool = False
    outcome: Any = None
    error: MoesaicError | None = None
    readers: int = 0
    once: bool = False
    """Whether whoever asked may come again for the answer."""
    unread_since: float = 0.0
    """Since when nobody reads it."""
    saved_at: float = 0.0
    looked_at: float = 0.0
    submitted: float = 0.0
    begun: float = 0.0
    finished: float = 0.0
    """When it ended, if it did while this process was there; like those above in seconds since the epoch."""
    leased_at: float = 0.0
    """When the lease began, by the gateway's own clock."""
    version: int = 0
    """Rises when what was told is taken back."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever writes this job's log."""
    _waiters: set[asyncio.Future[None]] = field(default_factory=set)

    def extend(self, start: int, events: Sequence[Event]) -> None:
        """Take in events that begin at number ``start``, which is not behind the last; those known are left out."""
        fresh = events[len(self.events) - start :]
        if fresh:
            self.events.extend(fresh)
            self.tell()

    def agree(self, start: int, events: Sequence[Event]) -> None:
        """Take in what is on disk from number ``start`` on, which is not behind the last.

        Where more was told than was on disk when the lease was lost, and this gateway was not asked where to go on,
        the answer may have gone on otherwise: then what was told is taken back, and its readers have to ask again.
        """
        known = self.events[start : start + len(events)]
        differs = (place for place, pair in enumerate(zip(known, events, strict=False)) if not _same(*pair))
        if (place := next(differs, None)) is not None:
            self.cut(start + place)
        self.extend(start, events)

    def cut(self, count: int) -> None:
        """Take back what was told behind so many events."""
        if len(self.events) > count:
            del self.events[count:]
            self.version += 1
            self.tell()

    def told(self) -> int:
        """Return how many events readers may have: an end of an answer that nothing follows waits until it counts."""
        count = len(self.events)
        while not self.ended and count and isinstance(self.events[count - 1], Finished):
            count -= 1
        return count

    def end(self, outcome: Any = None, error: MoesaicError | None = None) -> None:
        """No more will come."""
        if not self.ended:
            self.ended, self.outcome, self.error, self.finished = True, outcome, error, time.time()
        self.tell()

    def tell(self) -> None:
        """Wake those who wait for something to come."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self) -> None:
        """Wait for something to come."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)


class Following:
    """A job's events from the first on; see ``backend.ResponseStream``."""

    def __init__(self, live: Live, leave: Callable[[], None], *, known: bool = False) -> None:
        """Read along.

        Args:
            live: what is read.
            leave: called once, when no more is wanted before the end.
            known: whether the job was there before it was asked for.
        """
        self._live, self._leave, self._place, self._left = live, leave, 0, False
        self._version = live.version
        self.job: tuple[str, bool] | None = (live.id, known)
        live.readers += 1

    async def __aiter__(self) -> AsyncIterator[Event]:
        live = self._live
        while True:
            while self._place < live.told() and self._version == live.version:
                self._place += 1
                yield live.events[self._place - 1]
            if live.ended or self._version != live.version:
                break
            await live.changed()
        self._close()
        if self._version != live.version:
            raise Unavailable("the answer goes on otherwise than it was told: ask again, and read it from the start")
        if live.error is not None:
            raise live.error

    def ready(self) -> list[Event]:
        live = self._live
        events = live.events[self._place : live.told()] if self._version == live.version else []
        self._place += len(events)
        return events

    def cancel(self) -> None:
        if not self._left:
            self._close()
            self._leave()

    def _close(self) -> None:
        if not self._left:
            self._left = True
            self._live.readers -= 1


def _same(one: Event, other: Event) -> bool:
    """Whether a reader of the one has read the other too; figures that go with them do not matter."""
    if type(one) is not type(other) or one.index != other.index:
        return False
    if isinstance(one, Delta) and isinstance(other, Delta):
        ids = [token.id for token in one.tokens] == [token.id for token in other.tokens]
        return ids and one.text == other.text and one.calls == other.calls
    if isinstance(one, Finished) and isinstance(other, Finished):
        return one.reason == other.reason
    return True
