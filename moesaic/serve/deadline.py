"""The time limits of one request: how long it may wait for its turn, and how long its answer may take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from moesaic.errors import MoesaicError, TimedOut, Unavailable

T = TypeVar("T")


class Deadline:
    """Time limits of one request, for any number of waits in turn.

    One timer serves all waits: ``asyncio.timeout`` makes one for each, which costs more than sending a token.
    """

    def __init__(self, request_seconds: float = 0.0, queue_seconds: float = 0.0, started: float | None = None) -> None:
        """Start the clock.

        Args:
            request_seconds: limit of the whole request; 0: none.
            queue_seconds: limit until ``prompt_read`` is called; 0: none.
            started: when ``request_seconds`` begins, on the event loop's clock; None: now.
        """
        now = asyncio.get_running_loop().time()
        self._started = now if started is None else started
        self._request_seconds, self._queue_seconds = request_seconds, queue_seconds
        self._request_end = self._started + request_seconds if request_seconds else None
        self._queue_end = now + queue_seconds if queue_seconds else None
        self._armed_for: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Task[Any] | None = None
        self._expired = False

    def with_queue_limit(self, queue_seconds: float) -> Deadline:
        """Return a deadline with the same end of the request, and a queue limit that begins now."""
        return Deadline(self._request_seconds, queue_seconds, self._started)

    def prompt_read(self) -> None:
        """Lift the queue limit: the request has got its turn."""
        self._queue_end = None

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Await something within the limits. A result that is there already is returned at any time.

        Raises:
            Unavailable: the request waited too long for its turn.
            TimedOut: the answer took too long.
        """
        task = asyncio.current_task()
        assert task is not None
        self._arm()
        self._waiter, self._expired, cancellations = task, False, task.cancelling()
        try:
            return await awaitable
        except asyncio.CancelledError:
            if self._expired and task.cancelling() <= cancellations + 1:  # nothing else cancelled the task
                raise self._error() from None
            raise
        finally:
            self._waiter = None
            if self._expired:
                task.uncancel()

    def close(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> float | None:
        return min((end for end in (self._queue_end, self._request_end) if end is not None), default=None)

    def _error(self) -> MoesaicError:
        if self._queue_end is not None and self._queue_end == self._end():
            return Unavailable(f"the request waited {self._queue_seconds:g} s for its turn; try again later")
        return TimedOut(f"the answer took longer than {self._request_seconds:g} s")

    def _arm(self) -> None:
        end = self._end()
        if end != self._armed_for or self._timer is None:
            self.close()
            self._armed_for = end
            if end is not None:
                self._timer = asyncio.get_running_loop().call_at(end, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._waiter is not None:
            self._expired = True
            self._waiter.cancel()
