"""The response stream of a request whose model is still being loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from moesaic.backend import Event, ResponseStream


class PendingStream:
    """A ``ResponseStream`` that waits until its request has been accepted. Errors come when it is read."""

    job = None

    def __init__(self, starting: asyncio.Future[ResponseStream]) -> None:
        """Wait for ``starting``, the running call of ``Backend.generate``."""
        self._starting = starting

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for event in await self._starting:
            yield event

    def ready(self) -> list[Event]:
        accepted = self._starting.done() and not self._starting.cancelled() and self._starting.exception() is None
        return self._starting.result().ready() if accepted else []

    def cancel(self) -> None:
        self._starting.cancel()
        self._starting.add_done_callback(_cancel_stream)


def _cancel_stream(starting: asyncio.Future[ResponseStream]) -> None:
    """Cancel the stream of a call that ended before it could be cancelled."""
    if not starting.cancelled() and starting.exception() is None:
        starting.result().cancel()
