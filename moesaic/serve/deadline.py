"""The time limits of one request: how long it may wait until the model reads its prompt, and how long it may take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from moesaic.errors import MoesaicError, TimedOut, Unavailable

T = TypeVar("T")


class Deadline:
    """Time limits of one request. Every ``wait`` of the request is ended when a limit passes.

    One timer serves all calls of ``wait``. ``asyncio.timeout`` would create a timer for each call, which costs more
    than sending a token.
    """

    def __init__(self, request_seconds: float = 0.0, queue_seconds: float = 0.0, started: float | None = None) -> None:
        """Start the time limits of a request.

        Args:
            request_seconds: limit of the whole request, in seconds; 0: no limit.
            queue_seconds: limit from now until ``prompt_read`` is called, in seconds; 0: no limit.
            started: when the request began, on the event loop's clock; None: now.
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
        """Return a new deadline with the same limit of the whole request, and a queue limit that begins now."""
        return Deadline(self._request_seconds, queue_seconds, self._started)

    def prompt_read(self) -> None:
        """Remove the queue limit, because the model has read the prompt."""
        self._queue_end = None

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Await ``awaitable`` within the limits and return its result.

        A result that is already available is returned even if a limit has passed.

        Raises:
            Unavailable: the queue limit passed before the model read the prompt.
            TimedOut: the limit of the whole request passed.
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
        """Cancel the timer, so that it does not outlive the request."""
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
