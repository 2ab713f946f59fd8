"""Background and periodic tasks, and a decorator that shields a method from cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from moesaic.errors import Unavailable

log = logging.getLogger("moesaic.cluster")

P = ParamSpec("P")
T = TypeVar("T")


class BackgroundTasks:
    """The background tasks of one gateway. ``close`` ends them all."""

    def __init__(self) -> None:
        self._closed = False
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine in the background. After ``close`` it is discarded."""
        if self._closed:
            work.close()
        else:
            self._start(work)

    def start_periodic(self, seconds: float, function: Callable[[], Awaitable[None]]) -> None:
        """Call a function again and again, with a pause of ``seconds`` before each call."""
        self.start(_repeat(seconds, function))

    async def run_shielded(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end, even if the caller is cancelled.

        Raises:
            Unavailable: ``close`` was called; the coroutine was not started.
        """
        if self._closed:
            work.close()
            raise Unavailable("the gateway is stopping: ask another gateway, or try again later")
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("background task failed", extra={"why": f"{type(error).__name__}: {error}"})

    async def close(self) -> None:
        """Cancel all tasks and wait for their end."""
        self._closed = True
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class HasTasks(Protocol):
    """An object with methods that are decorated with ``shielded``; they run as tasks of ``tasks``."""

    @property
    def tasks(self) -> BackgroundTasks: ...


S = TypeVar("S", bound=HasTasks)


def shielded(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Decorate a method so that it runs to its end even if its caller is cancelled.

    Otherwise, a cancellation after a write to the store would leave this process's memory out of date.
    """

    @wraps(method)
    async def run(self: S, /, *args: P.args, **named: P.kwargs) -> T:
        return await self.tasks.run_shielded(method(self, *args, **named))

    return run


async def _repeat(seconds: float, function: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await function()
        except Unavailable:
            log.debug("job store unavailable")
        except Exception:  # leases must still be watched, and the next call may succeed
            log.exception("periodic task failed")
