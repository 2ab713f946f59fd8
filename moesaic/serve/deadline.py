"""A bound on how long is waited. Knows the event loop's clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlineExceeded(Exception):
    """What was waited for did not come in time."""


class Deadline:
    """Bounds many waits in turn with one timer: ``asyncio.timeout`` has one for each, which costs more than a token."""

    def __init__(self) -> None:
        self._until: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waits: asyncio.Task[Any] | None = None
        self._over = False

    async def wait(self, what: Awaitable[T], until: float | None) -> T:
        """Await something until a time of the loop's clock, or for ever. What is there already is had at any time.

        Raises:
            OutOfPatience: it did not come.
        """
        task = asyncio.current_task()
        assert task is not None
        self._arm(until)
        self._waits, self._over, cancelled = task, False, task.cancelling()
        try:
            return await what
        except asyncio.CancelledError:
            if self._over and task.cancelling() <= cancelled + 1:  # and nobody else's wish
                raise DeadlineExceeded from None
            raise
        finally:
            self._waits = None
            if self._over:
                task.uncancel()

    def _arm(self, until: float | None) -> None:
        if until != self._until or self._timer is None:
            self.close()
            self._until = until
            if until is not None:
                self._timer = asyncio.get_running_loop().call_at(until, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._waits is not None:
            self._over = True
            self._waits.cancel()

    def close(self) -> None:
        """End the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
