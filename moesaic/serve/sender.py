"""Sends one response over ASGI, complete or as a stream of server-sent events.

An error before the first byte is raised, so that the caller can send an error status. A later error is also sent as
the last event of the stream, without the mark of success (such as ``[DONE]``): a failure never looks like success.
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
"""Seconds that a stream has to send its last event, an error, when the server stops."""
MIN_SLEEP_SECONDS = 0.01


class ResponseSender:
    """Sends the response to one request. ``started`` is whether the status line was sent."""

    def __init__(self, send: Send, keep_alive_seconds: float, headers: list[tuple[bytes, bytes]]) -> None:
        """Prepare to send the response to one request.

        Args:
            send: the ASGI callable that sends a message to the client.
            keep_alive_seconds: a stream without events sends a comment this often.
            headers: added to the response; headers appended to this list before the response starts are sent too.
        """
        self._send, self._keep_alive_seconds, self._headers = send, keep_alive_seconds, headers
        self.started = False
        self.status = 0
        """The HTTP status that was sent; 0 before one was sent."""
        self._frames_in_flight = 0
        self._last_sent_at = 0.0

    async def whole(self, response: Response) -> None:
        """Send a complete response."""
        body = response.body()
        await self._start(response.status, response.media, {**response.headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, response: EventStream, broken: Callable[[Failure], bytes]) -> None:
        """Send the frames (encoded events) of a response as they come.

        An error is always raised. After the first frame, it is also sent as an event, which ``broken`` encodes.
        """
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
        """Send a keep-alive comment whenever nothing else was sent for ``keep_alive_seconds``, until cancelled.

        One task serves the whole stream: a timer for each frame (event) would cost more than the frame.
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
