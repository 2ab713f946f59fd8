"""A job as the worker has it that does it: what has come, what the gateway knows of it, and what fits into a message.

Knows events as they are written. Does not know who computes them, nor HTTP.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec

from moesaic.cluster import wire

MAX_UNACKNOWLEDGED_BYTES = 4 << 20
"""What is kept of one job's events, about, before those that the gateway has on disk are dropped."""
EVENT_BYTES = 64
"""What an event takes, about."""


@dataclass(eq=False)
class RunningJob:
    """A job that is being done."""

    lease: wire.LeasedJob
    events: list[wire.Wire] = field(default_factory=list)
    first: int = 0
    """The number of the first of them in the job's log."""
    known: int = 0
    """Up to which number the gateway has them."""
    over: bool = False
    """Whether nothing more comes."""
    outcome: Any = None
    error: wire.ErrorInfo | None = None
    ending: bool = False
    """Whether the end is being told."""
    task: asyncio.Task[None] | None = None

    @property
    def claim(self) -> wire.LeaseClaim:
        return self.lease.id, self.lease.fence

    def unsent(self) -> list[wire.Wire]:
        return self.events[self.known - self.first :]

    def fits(self, room: int) -> bool:
        """Return whether the end of it fits into a message of so many bytes, with all that is not sent yet."""
        unsent = self.unsent()
        return _fitting(unsent, room) == len(unsent)

    def part(self, room: int) -> tuple[wire.EventBatch, int]:
        """Return what of it is to be sent next, at most so many bytes, and how many these are."""
        part = wire.EventBatch(*self.claim, self.known, self.unsent())
        if (size := len(msgspec.json.encode(part))) > room:
            part = msgspec.structs.replace(part, events=part.events[: _fitting(part.events, room)])
            size = len(msgspec.json.encode(part))
        return part, size

    def fail(self, error: BaseException) -> None:
        """End it with an error, and with what is known of it."""
        if self.task is not None:
            self.task.cancel()
        del self.events[self.known - self.first :]
        self.outcome, self.error, self.over = None, wire.error_info(error), True

    def acknowledge(self, known: int, kept: int) -> None:
        """The gateway has events up to the first number, on disk up to the second."""
        self.known = min(max(self.first, known), self.first + len(self.events))
        if kept > self.first and len(self.events) * EVENT_BYTES > MAX_UNACKNOWLEDGED_BYTES:
            kept = min(kept, self.first + len(self.events))
            del self.events[: kept - self.first]
            self.first = kept


def _fitting(events: list[wire.Wire], room: int) -> int:
    """Return how many of the first events take at most so many bytes."""
    for count, event in enumerate(events):
        room -= len(msgspec.json.encode(event)) + 1
        if room < 0:
            return count
    return len(events)
