"""A job that a gateway follows in memory: its events so far, its worker, and its subscribers.

This module does not depend on stores, workers or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.backend import Delta, Event, Finished
from moesaic.cluster.jobs import LeaseToken
from moesaic.errors import MoesaicError, Unavailable


@dataclass(eq=False)
class ActiveJob:
    """A job that a gateway follows: its events so far, its state, and the means to wake its subscribers."""

    id: str
    model: str
    tenant: str
    events: list[Event] = field(default_factory=list)
    persisted: int = 0
    """The first this many events are on disk."""
    fence: int = 0
    """The fence of the job's newest lease that this gateway knows; see ``jobs``."""
    worker: str = ""
    """The worker that runs the job through this gateway; "" if none does."""
    ended: bool = False
    outcome: Any = None
    """The result of an ended job that has no events, such as embeddings."""
    error: MoesaicError | None = None
    readers: int = 0
    """Number of subscribers at this gateway."""
    resumable: bool = False
    """Whether the client can fetch the answer over a new connection, after the first one has closed."""
    unread_since: float = 0.0
    """Time since which the job has had no subscribers, by the gateway's clock. Infinity: it needs none."""
    flushed_at: float = 0.0
    """Time of the last write to the job's log, by the gateway's clock."""
    refreshed_at: float = 0.0
    """Time at which the job was last read from the store, by the gateway's clock."""
    submitted_at: float = 0.0
    """Time of the submission in seconds since the epoch; 0 if unknown."""
    started_at: float = 0.0
    """Time of the newest lease in seconds since the epoch; 0 if unknown."""
    finished_at: float = 0.0
    """Time of the end in seconds since the epoch; 0 if unknown."""
    leased_at: float = 0.0
    """Time of the last lease, by the gateway's clock; 0 if unknown."""
    revision: int = 0
    """Counter that rises when ``truncate`` removes events that subscribers may have read."""
    write_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the job's log is written."""
    _waiters: set[asyncio.Future[None]] = field(default_factory=set)

    @property
    def lease_token(self) -> LeaseToken:
        return LeaseToken(self.id, self.fence)

    @property
    def log_position(self) -> tuple[int, int]:
        """The number of events that the gateway has received, and the number of those that are on disk."""
        return len(self.events), self.persisted

    def extend(self, start: int, events: Sequence[Event]) -> None:
        """Append the events of the job's log from number ``start`` on, and wake the subscribers.

        Known events are skipped. ``start`` must not be larger than the number of known events.
        """
        fresh = events[len(self.events) - start :]
        if fresh:
            self.events.extend(fresh)
            self.notify()

    def reconcile(self, start: int, events: Sequence[Event]) -> None:
        """Replace the events from number ``start`` on by ``events``, which are on disk, where they differ.

        Events that subscribers have read but that were not on disk when the lease expired may differ from the
        continuation by another worker. They are then removed, and subscribers must read the job again from the start.
        ``start`` must not be larger than the number of known events.
        """
        known = self.events[start : start + len(events)]
        for index, (ours, stored) in enumerate(zip(known, events, strict=False)):
            if not _same(ours, stored):
                self.truncate(start + index)
                break
        self.extend(start, events)

    def truncate(self, count: int) -> None:
        """Remove all events except the first ``count``. Subscribers then get ``Unavailable`` and must read again."""
        if len(self.events) > count:
            del self.events[count:]
            self.revision += 1
            self.notify()

    def visible(self) -> int:
        """Return how many events subscribers may read. ``Finished`` events at the end wait for the job's end."""
        count = len(self.events)
        while not self.ended and count and isinstance(self.events[count - 1], Finished):
            count -= 1
        return count

    def finish(self, outcome: Any = None, error: MoesaicError | None = None) -> None:
        """Mark the job as ended, with its outcome or its error, and wake the subscribers."""
        if not self.ended:
            self.ended, self.outcome, self.error, self.finished_at = True, outcome, error, time.time()
        self.notify()

    def notify(self) -> None:
        """Wake the subscribers, which wait in ``changed``."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self) -> None:
        """Wait for the next ``notify``."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)


class Subscription:
    """Stream of all events of a job, from the first on. Implements ``backend.ResponseStream``."""

    def __init__(self, job: ActiveJob, on_cancel: Callable[[], None], *, replayed: bool = False) -> None:
        """Subscribe to a job.

        Args:
            job: the job whose events are read.
            on_cancel: called at most once, when the subscriber cancels before the end of the job.
            replayed: whether the job existed before this request.
        """
        self._job, self._on_cancel, self._index, self._closed = job, on_cancel, 0, False
        self._revision = job.revision
        self.job: tuple[str, bool] | None = (job.id, replayed)
        job.readers += 1

    async def __aiter__(self) -> AsyncIterator[Event]:
        job = self._job
        while True:
            while self._index < job.visible() and self._revision == job.revision:
                self._index += 1
                yield job.events[self._index - 1]
            if job.ended or self._revision != job.revision:
                break
            await job.changed()
        self._close()
        if self._revision != job.revision:
            raise Unavailable("the answer was continued differently by another worker: read it again from the start")
        if job.error is not None:
            raise job.error

    def ready(self) -> list[Event]:
        job = self._job
        events = job.events[self._index : job.visible()] if self._revision == job.revision else []
        self._index += len(events)
        return events

    def cancel(self) -> None:
        if not self._closed:
            self._close()
            self._on_cancel()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._job.readers -= 1


def _same(one: Event, other: Event) -> bool:
    """Return whether two events have the same content for a reader. Token counts and log-probabilities are ignored."""
    if type(one) is not type(other) or one.index != other.index:
        return False
    if isinstance(one, Delta) and isinstance(other, Delta):
        same_ids = [token.id for token in one.tokens] == [token.id for token in other.tokens]
        return same_ids and one.text == other.text and one.calls == other.calls
    if isinstance(one, Finished) and isinstance(other, Finished):
        return one.reason == other.reason
    return True
