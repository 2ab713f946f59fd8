"""One client's connection: the bounds that the HTTP library does not have.

A request's head has so many bytes, fields and seconds; what is refused is read on for a moment, since closing on
unread data would destroy the answer on its way; a reader who takes nothing is cut off; and what is closed is gone
for certain. Knows sockets and uvicorn's protocol, whose gaps these are. Does not know what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moesaic.serve.settings import Settings

FIELDS = 100
"""Fields of one request's head."""
LINGER = 2.0
"""Seconds for which more is read, and thrown away, after a refusal."""
DISCARDED = 8 << 20
"""Bytes that are thrown away so, at most."""
CRAWL = 16 << 10
"""Who takes less than this of what waits for him, in ``reader_seconds``, takes nothing."""
AT_ONCE = struct.pack("ii", 1, 0)
TOO_LARGE = b"431 Request Header Fields Too Large"
CROWDED = b"503 Service Unavailable\r\nretry-after: 5"
REFUSED = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"


def bounded(settings: Settings) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with these bounds."""

    return type("Bounded", (Connection,), {"bounds": settings, "addresses": Counter()})


class Wire:
    """A connection's transport, of which uvicorn's requests to close are answered by the connection."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None], is_closing: Callable[[], bool]) -> None:
        self._transport = transport
        self.close, self.is_closing = close, is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, bounded."""

    bounds: Settings
    addresses: Counter[str]
    """Connections by address."""

    _address: str | None = None
    _timer: asyncio.TimerHandle | None = None  # for a head to come, for a refusal to be read, or for the end
    _stalled: asyncio.TimerHandle | None = None
    _unread = 0  # bytes that wait for the reader, when last looked at
    _in_head = True
    _head = 0  # bytes that came of it, perhaps with what follows
    _size = 0  # of its fields
    _why: bytes | None = None  # it is refused
    _keep = True  # whether the connection is to outlive the request
    _deaf = False  # what comes is thrown away
    _gone = False

    # How it begins and ends

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        super().connection_made(Wire(transport, self._end, self._ending))  # type: ignore[arg-type]
        self._address = self.client[0] if self.client else ""
        self.addresses[self._address] += 1
        crowded = self.addresses[self._address] > self.bounds.connections_per_address
        if self._address in self.bounds.trusted_proxies:
            crowded = False
        if crowded or len(self.connections) > self.bounds.connections:
            self._deaf = True
            self._say(CROWDED)
            self._close()
        else:
            self._arm(self.bounds.header_seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        if self._address is not None:
            self.addresses[self._address] -= 1
            if not self.addresses[self._address]:
                del self.addresses[self._address]
        self._disarm()
        self._heard()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._keep = False
        super().shutdown()

    def _ending(self) -> bool:
        return self._deaf or self._raw.is_closing()

    def _end(self) -> None:
        """Close as uvicorn asks for it: at once if an answer breaks off, later if its request is not read yet."""
        if self._gone or self._ending():
            return
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self._break()
        elif self._in_head:
            self._close()
        else:
            self._linger()

    def _close(self) -> None:
        """Close; who does not take what was sent before, is cut off."""
        self._raw.close()
        self._arm(self.bounds.reader_seconds, self._break)

    def _break(self) -> None:
        """End it so that nobody takes what came for whole, and nothing waits in the system to be taken."""
        with contextlib.suppress(OSError):
            self._raw.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        self._raw.abort()

    def _linger(self) -> None:
        self._deaf = True
        self.flow.resume_reading()
        with contextlib.suppress(OSError, NotImplementedError):
            if self._raw.can_write_eof():
                self._raw.write_eof()
        self._arm(LINGER, self._close)

    def eof_received(self) -> None:
        self._close()

    # What comes

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._head += len(data)
            if self._head > DISCARDED:
                self._break()
            return
        if self._in_head:
            self._head += len(data)
            if self._timer is None and not self._answering():
                self._arm(self.bounds.header_seconds, self._late)
        super().data_received(data)
        if self._in_head and not self._deaf and self._head > self.bounds.header_bytes:
            self._refuse(TOO_LARGE)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_url(self, url: bytes) -> None:
        self._measure(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._measure(len(name) + len(value) + 4)
        if self._in_head:
            super().on_header(name, value)
            if len(self.headers) > FIELDS:
                self._why = TOO_LARGE
                raise ValueError("too many fields")
        # else a trailer, which is no field of the head and must not become one: RFC 9110, 6.5.1

    def _measure(self, size: int) -> None:
        self._size += size
        if self._size > self.bounds.header_bytes:
            self._why = TOO_LARGE
            raise ValueError("too large a head")

    def on_headers_complete(self) -> None:
        self._in_head, self._head = False, 0
        self._disarm()
        super().on_headers_complete()
        # Until the request is read: an answer that comes before is the last one here.
        self._keep, self.cycle.keep_alive = self.cycle.keep_alive and not self.parser.should_upgrade(), False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head, self._size = True, 0, 0
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keep

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: whoever asks for another protocol goes on with this one, and leaves."""

    def _late(self) -> None:
        self._timer = None
        if self._head:
            self._refuse(b"408 Request Timeout")
        else:
            self._close()

    def send_400_response(self, _: str) -> None:
        self._refuse(self._why or b"400 Bad Request")

    def _refuse(self, status: bytes) -> None:
        """Say why, unless an answer is on its way already, and close."""
        if self._gone or self._ending():
            return
        # A request whose body is broken has not been answered; one before a broken head has, or is being.
        spoken = bool(self.pipeline) or (self._answering() and (self._in_head or self.cycle.response_started))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if spoken:
            self._break()
        else:
            self._say(status)
            self._linger()

    def _say(self, status: bytes) -> None:
        shown = status.partition(b"\r")[0]
        body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":null}}' % shown
        self._raw.write(REFUSED % (status, len(body), body))

    # Time

    def _arm(self, seconds: float, then: Callable[[], None]) -> None:
        self._disarm()
        if not self._gone:
            self._timer = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None and not self._gone:
            self._look()

    def resume_writing(self) -> None:
        self._heard()
        super().resume_writing()

    def _heard(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _look(self) -> None:
        """Look again after a while at what the reader has taken by then."""
        self._unread = self._raw.get_write_buffer_size()
        self._stalled = self.loop.call_later(self.bounds.reader_seconds, self._look_again)

    def _look_again(self) -> None:
        if self._unread - self._raw.get_write_buffer_size() < CRAWL:
            self._stalled = None
            self._break()
        else:
            self._look()
