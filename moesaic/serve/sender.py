"""Sends one response over ASGI, whole or as server-sent events.

Before the first byte, an error is raised and becomes a status. After it, an error becomes an event, and the stream
ends without the mark of success: a failure never looks like success.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

from moesaic.errors import Unavailable
from moesaic.serve import sse
from moesaic.serve.endpoint import EventStream, Failure, Response, failure_of
from moesaic.serve.types import Disconnected, Send

LAST_EVENT_SECONDS = 1.0
"""Seconds that a stream has to send its last event when the server stops."""
MIN_SLEEP_SECONDS = 0.01


class ResponseSender:
    """Sends one response. ``started`` tells whether the status line was sent."""

    def __init__(self, send: Send, keep_alive_seconds: float, headers: list[tuple[bytes, bytes]]) -> None:
        """Prepare to send.

        Args:
            send: the ASGI callable.
            keep_alive_seconds: a silent stream sends a comment this often.
            headers: sent with every response; read when the response starts.
        """
        self._send, self._keep_alive_seconds, self._headers = send, keep_alive_seconds, headers
        self.started = False
        self.status = 0
        """The status that was sent; 0 before."""
        self._frames_in_flight = 0
        self._last_sent_at = 0.0

    async def whole(self, response: Response) -> None:
        """Send a complete response."""
        body = response.body()
        await self._start(response.status, response.media, {**response.headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, response: EventStream, broken: Callable[[Failure], bytes]) -> None:
        """Send frames as they come. An error before the first is raised; a later one is sent as an event, too."""
        try:
            async with contextlib.aclosing(response.frames) as frames:  # type: ignore[type-var]
                await self._frames(frames, response.headers)
        except Exception as error:
            if self.started and not isinstance(error, Disconnected):
                await self._send({"type": "http.response.body", "body": broken(failure_of(error))})
            raise
        except asyncio.CancelledError:  # the client disconnected and reads nothing more, or the server stops
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_EVENT_SECONDS if self.started else 0):
                    last = broken(failure_of(Unavailable("the server is stopping")))
                    await self._send({"type": "http.response.body", "body": last})
            raise
        if not self.started:  # a stream without a single frame
            await self._start(200, sse.MEDIA_TYPE, response.headers)
        await self._send({"type": "http.response.body", "body": b""})

    async def _frames(self, frames: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        stream_headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        keep_alive = asyncio.ensure_future(self._keep_alive(stream_headers))
        try:
            async for frame in frames:
                await self._frame(frame, stream_headers)
        finally:
            keep_alive.cancel()

    async def _keep_alive(self, headers: Mapping[str, str]) -> None:
        """Send comments while nothing else is sent.

        One task serves the whole stream: a timer for each frame would cost more than the frame.
        """
        clock, interval = asyncio.get_running_loop().time, self._keep_alive_seconds
        self._last_sent_at = clock()
        while True:
            silence = clock() - self._last_sent_at
            if not self._frames_in_flight and silence >= interval:
                await self._frame(sse.KEEP_ALIVE, headers)
                silence = 0.0
            await asyncio.sleep(max(MIN_SLEEP_SECONDS, interval - silence))

    async def _frame(self, frame: bytes, headers: Mapping[str, str]) -> None:
        self._frames_in_flight += 1
        if not self.started:
            await self._start(200, sse.MEDIA_TYPE, headers)
        await self._send({"type": "http.response.body", "body": frame, "more_body": True})
        self._frames_in_flight -= 1
        self._last_sent_at = asyncio.get_running_loop().time()

    async def _start(self, status: int, media: str, headers: Mapping[str, str]) -> None:
        self.started, self.status = True, status
        named = [(b"content-type", media.encode())] if media else []
        named += [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": self._headers + named})
