"""What goes on beside the questions that are asked: now and then, in the background, and to its end.

Knows tasks. Does not know what is done in them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from moesaic.errors import Unavailable

log = logging.getLogger("moesaic.cluster")

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound="BackgroundTasks")


class BackgroundTasks:
    """Whoever has some."""

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[asyncio.Task[Any]] = set()

    def background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have something done that nobody waits for; once it has stopped, it is left undone."""
        if self.stopped:
            work.close()
        else:
            self._begin(work)

    async def to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something wholly, though whoever waits for it may leave.

        Raises:
            Unavailable: it is too late for that.
        """
        if self.stopped:
            work.close()
            raise Unavailable("the gateway is stopping: ask another, or try again later")
        return await asyncio.shield(self._begin(work))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("left undone", extra={"why": f"{type(error).__name__}: {error}"})

    def always(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        """Have something done again and again, with a pause before each time."""
        self.background(_again(seconds, work))

    async def leave_off(self) -> None:
        """End all of it where it is."""
        self.stopped = True
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def shielded(
    method: Callable[Concatenate[C, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[C, P], Coroutine[Any, Any, T]]:
    """Have a method go on to its end though whoever called it has left: what was written is to be known here too."""

    @wraps(method)
    async def run(self: C, /, *args: P.args, **named: P.kwargs) -> T:
        return await self.to_its_end(method(self, *args, **named))

    return run


async def _again(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Unavailable:
            log.debug("the store of jobs cannot be asked")
        except Exception:  # whatever it is, leases have to be watched, and the next time may do better
            log.exception("the gateway's upkeep broke")
