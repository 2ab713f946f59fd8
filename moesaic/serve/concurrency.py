"""Two helpers: run several awaitables at once, and cancel an awaitable when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from moesaic.serve.types import Disconnected, Receive

T = TypeVar("T")


async def gather_all(awaitables: Sequence[Awaitable[T]]) -> list[T]:
    """Run awaitables at once and return their results in order. The first error cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_await(awaitable)) for awaitable in awaitables]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


async def cancel_on_disconnect(work: Awaitable[Any], receive: Receive) -> None:
    """Run ``work`` to its end, but cancel it if ``receive`` (ASGI) reports that the client disconnected.

    Raises:
        Disconnected: the client disconnected before ``work`` ended.
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            raise Disconnected
        await task
    finally:
        disconnect.cancel()
        if not task.done():  # this coroutine was cancelled itself: let the work send its last event
            task.cancel()
            await asyncio.wait((task,))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
