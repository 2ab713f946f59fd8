"""A job that a worker runs: its events, how many of them the gateway has, and what fits into a message.

This module does not depend on HTTP or on the model.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec

from moesaic.backend import Event
from moesaic.cluster import wire

MAX_UNACKNOWLEDGED_BYTES = 4 << 20
"""If a job's events in memory are larger than this, about, those that the gateway has on disk are dropped."""
EVENT_BYTES = 64
"""Approximate size of an event in memory, in bytes."""


@dataclass(eq=False)
class RunningJob:
    """A job that this worker runs: its lease, its events, and what the gateway has of them."""

    lease: wire.LeasedJob
    events: list[Event] = field(default_factory=list)
    first: int = 0
    """Number in the job's log of the first event in ``events``."""
    received: int = 0
    """Number of the job's events that the gateway has received, counted from the start of the log."""
    ended: bool = False
    """Whether the job is complete: it has its last event, its outcome or its error."""
    outcome: Any = None
    error: wire.ErrorInfo | None = None
    finishing: bool = False
    """Whether the job's end is being sent to the gateway."""
    task: asyncio.Task[None] | None = None

    @property
    def claim(self) -> wire.LeaseClaim:
        return self.lease.id, self.lease.fence

    def unsent(self) -> list[Event]:
        """Return the events that the gateway has not received yet."""
        return self.events[self.received - self.first :]

    def fits(self, room: int) -> bool:
        """Return whether the JSON of all unsent events fits into ``room`` bytes."""
        unsent = self.unsent()
        return _fitting(unsent, room) == len(unsent)

    def batch(self, room: int) -> tuple[wire.EventBatch, int]:
        """Return the next unsent events, as many as fit into ``room`` bytes of JSON, and the size of the JSON."""
        batch = wire.EventBatch(*self.claim, self.received, self.unsent())
        if (size := len(msgspec.json.encode(batch))) > room:
            batch = msgspec.structs.replace(batch, events=batch.events[: _fitting(batch.events, room)])
            size = len(msgspec.json.encode(batch))
        return batch, size

    def fail(self, error: BaseException) -> None:
        """End the job with an error. Its task is cancelled, and unsent events are dropped."""
        if self.task is not None:
            self.task.cancel()
        del self.events[self.received - self.first :]
        self.outcome, self.error, self.ended = None, wire.error_info(error), True

    def acknowledge(self, received: int, persisted: int) -> None:
        """Record how many of the job's events the gateway has received, and how many it has on disk."""
        self.received = min(max(self.first, received), self.first + len(self.events))
        if persisted > self.first and len(self.events) * EVENT_BYTES > MAX_UNACKNOWLEDGED_BYTES:
            persisted = min(persisted, self.first + len(self.events))
            del self.events[: persisted - self.first]
            self.first = persisted


def _fitting(events: list[Event], room: int) -> int:
    """Return how many events, from the first on, fit into ``room`` bytes of JSON."""
    for count, event in enumerate(events):
        room -= len(msgspec.json.encode(event)) + 1
        if room < 0:
            return count
    return len(events)
