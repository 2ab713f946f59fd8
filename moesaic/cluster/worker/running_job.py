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
"""Approximate size of a job's events from which on those that the gateway has on disk are dropped."""
EVENT_BYTES = 64
"""Approximate size of an event in memory."""


@dataclass(eq=False)
class RunningJob:
    """A job that is being run."""

    lease: wire.LeasedJob
    events: list[Event] = field(default_factory=list)
    first: int = 0
    """Number of the first of ``events`` in the job's log."""
    received: int = 0
    """Number of events of the log that the gateway has received."""
    ended: bool = False
    """Whether the job has its last event, its outcome or its error."""
    outcome: Any = None
    error: wire.ErrorInfo | None = None
    finishing: bool = False
    """Whether the end is being sent."""
    task: asyncio.Task[None] | None = None

    @property
    def claim(self) -> wire.LeaseClaim:
        return self.lease.id, self.lease.fence

    def unsent(self) -> list[Event]:
        """Return the events that the gateway has not received."""
        return self.events[self.received - self.first :]

    def fits(self, room: int) -> bool:
        """Return whether all unsent events fit into ``room`` bytes."""
        unsent = self.unsent()
        return _fitting(unsent, room) == len(unsent)

    def batch(self, room: int) -> tuple[wire.EventBatch, int]:
        """Return the next events to send, at most ``room`` bytes, and their size in bytes."""
        batch = wire.EventBatch(*self.claim, self.received, self.unsent())
        if (size := len(msgspec.json.encode(batch))) > room:
            batch = msgspec.structs.replace(batch, events=batch.events[: _fitting(batch.events, room)])
            size = len(msgspec.json.encode(batch))
        return batch, size

    def fail(self, error: BaseException) -> None:
        """End the job with an error; unsent events are dropped."""
        if self.task is not None:
            self.task.cancel()
        del self.events[self.received - self.first :]
        self.outcome, self.error, self.ended = None, wire.error_info(error), True

    def acknowledge(self, received: int, persisted: int) -> None:
        """Note the numbers of events that the gateway has received and has on disk."""
        self.received = min(max(self.first, received), self.first + len(self.events))
        if persisted > self.first and len(self.events) * EVENT_BYTES > MAX_UNACKNOWLEDGED_BYTES:
            persisted = min(persisted, self.first + len(self.events))
            del self.events[: persisted - self.first]
            self.first = persisted


def _fitting(events: list[Event], room: int) -> int:
    """Return the number of first events that fit into ``room`` bytes."""
    for count, event in enumerate(events):
        room -= len(msgspec.json.encode(event)) + 1
        if room < 0:
            return count
    return len(events)
