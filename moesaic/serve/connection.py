"""The protocol of a client's connection: uvicorn's, with limits that uvicorn does not have.

The head of a request is limited in bytes, fields and seconds. After it refuses a request, the server reads on for a
moment: closing a socket with unread data would destroy the response. A client that reads nothing is disconnected.
This module depends on sockets and uvicorn's protocol class, not on the content of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from moesaic.serve.settings import Settings

MAX_HEADER_FIELDS = 100
LINGER_SECONDS = 2.0
"""Seconds for which the server reads on, and discards the data, after it refused a request."""
MAX_DISCARDED_BYTES = 8 << 20
"""Most bytes that are discarded after a request was refused; if more come, the connection is reset."""
MIN_READ_BYTES = 16 << 10
"""A client that reads fewer bytes of a response than this in ``Settings.reader_seconds`` is disconnected."""
LINGER_OFF = struct.pack("ii", 1, 0)
"""The value of SO_LINGER with which closing a socket discards unsent data and resets the connection."""
TOO_LARGE = b"431 Request Header Fields Too Large"
TOO_MANY_CONNECTIONS = b"503 Service Unavailable\r\nretry-after: 5"
REFUSAL = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"


def bounded(settings: Settings) -> type[HttpToolsProtocol]:
    """Return a subclass of ``Connection``, for uvicorn to use, that applies the limits in ``settings``."""
    return type("Bounded", (Connection,), {"bounds": settings, "addresses": Counter()})


def without_chunks(cycle: RequestResponseCycle) -> None:
    """Make uvicorn send the response to this request of an HTTP/1.0 client without chunks and without 100 Continue.

    HTTP/1.0 has neither. A response of unknown length ends with the connection (RFC 9112, section 6.3), which uvicorn
    closes after each HTTP/1.0 request. ``cycle`` is uvicorn's object for the request.
    """
    send, has_length = cycle.send, False

    async def send_plain(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))  # uvicorn compares it with what it sends
        await send(message)

    cycle.waiting_for_100_continue = False
    cycle.send = send_plain  # type: ignore[method-assign]


class GuardedTransport:
    """An asyncio transport whose methods ``close`` and ``is_closing`` are replaced by the given functions."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None], is_closing: Callable[[], bool]) -> None:
        self._transport = transport
        self.close, self.is_closing = close, is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits, one object per connection. ``bounded`` returns the subclass to use."""

    bounds: Settings
    addresses: Counter[str]
    """Number of open connections by client address."""

    _address: str | None = None
    _timer: asyncio.TimerHandle | None = None  # until the head must be complete, a refusal read, or the socket closed
    _stall_timer: asyncio.TimerHandle | None = None
    _unread_bytes = 0  # in the write buffer at the last check
    _in_head = True
    _head_bytes = 0  # received of the head, perhaps with what follows it
    _field_bytes = 0  # of the head's fields
    _refusal: bytes | None = None  # the status line of a refusal
    _keep_alive = True  # whether the connection outlives the request
    _discarding = False  # received data is discarded
    _lost = False

    # Start and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        super().connection_made(GuardedTransport(transport, self._end, self._ending))  # type: ignore[arg-type]
        self._address = self.client[0] if self.client else ""
        self.addresses[self._address] += 1
        too_many = self.addresses[self._address] > self.bounds.connections_per_address
        if self._address in self.bounds.trusted_proxies:
            too_many = False
        if too_many or len(self.connections) > self.bounds.connections:
            self._discarding = True
            self._send_refusal(TOO_MANY_CONNECTIONS)
            self._close()
        else:
            self._arm(self.bounds.header_seconds, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._address is not None:
            self.addresses[self._address] -= 1
            if not self.addresses[self._address]:
                del self.addresses[self._address]
        self._disarm()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._keep_alive = False
        super().shutdown()

    def _ending(self) -> bool:
        return self._discarding or self._raw.is_closing()

    def _end(self) -> None:
        """Close the connection because uvicorn asks for it.

        A connection with an incomplete response is reset. If the request was not read to its end, the server reads on
        for a moment before it closes.
        """
        if self._lost or self._ending():
            return
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self._break()
        elif self._in_head:
            self._close()
        else:
            self._linger()

    def _close(self) -> None:
        """Close the connection once all written data is sent; reset it if that takes longer than ``reader_seconds``."""
        self._raw.close()
        self._arm(self.bounds.reader_seconds, self._break)

    def _break(self) -> None:
        """Reset the connection at once, so that the client cannot take a partial response for a complete one."""
        with contextlib.suppress(OSError):
            self._raw.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_OFF)
        self._raw.abort()

    def _linger(self) -> None:
        self._discarding = True
        self.flow.resume_reading()
        with contextlib.suppress(OSError, NotImplementedError):
            if self._raw.can_write_eof():
                self._raw.write_eof()
        self._arm(LINGER_SECONDS, self._close)

    def eof_received(self) -> None:
        self._close()

    # Received data

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_DISCARDED_BYTES:
                self._break()
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._timer is None and not self._responding():
                self._arm(self.bounds.header_seconds, self._head_late)
        super().data_received(data)
        if self._in_head and not self._discarding and self._head_bytes > self.bounds.header_bytes:
            self._refuse(TOO_LARGE)

    def _responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_url(self, url: bytes) -> None:
        self._measure(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._measure(len(name) + len(value) + 4)
        if self._in_head:
            super().on_header(name, value)
            if len(self.headers) > MAX_HEADER_FIELDS:
                self._refusal = TOO_LARGE
                raise ValueError("too many fields")
        # A trailer must not become a header field: RFC 9110, section 6.5.1.

    def _measure(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self.bounds.header_bytes:
            self._refusal = TOO_LARGE
            raise ValueError("too large a head")

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._disarm()
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            without_chunks(self.cycle)
        # A response that is sent before the request is read must be the last one on this connection.
        self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive and not self.parser.should_upgrade(), False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes, self._field_bytes = True, 0, 0
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keep_alive

    def _unsupported_upgrade_warning(self) -> None:
        """Do not warn about a request to switch protocols. After a response in HTTP/1.1, the connection is closed."""

    def _head_late(self) -> None:
        self._timer = None
        if self._head_bytes:
            self._refuse(b"408 Request Timeout")
        else:
            self._close()

    def send_400_response(self, _: str) -> None:
        self._refuse(self._refusal or b"400 Bad Request")

    def _refuse(self, status: bytes) -> None:
        """Send an error response with this status line, and close; reset the connection if a response has begun."""
        if self._lost or self._ending():
            return
        # A request with a broken body has no response yet; one before a broken head has one, or is getting it.
        has_response = bool(self.pipeline) or (self._responding() and (self._in_head or self.cycle.response_started))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if has_response:
            self._break()
        else:
            self._send_refusal(status)
            self._linger()

    def _send_refusal(self, status: bytes) -> None:
        reason = status.partition(b"\r")[0]
        body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":null}}' % reason
        self._raw.write(REFUSAL % (status, len(body), body))

    # Timers

    def _arm(self, seconds: float, then: Callable[[], None]) -> None:
        self._disarm()
        if not self._lost:
            self._timer = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None and not self._lost:
            self._start_stall_timer()

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _start_stall_timer(self) -> None:
        """Start a timer that checks after ``reader_seconds`` how much of the written data the client has read."""
        self._unread_bytes = self._raw.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self.bounds.reader_seconds, self._check_stall)

    def _check_stall(self) -> None:
        if self._unread_bytes - self._raw.get_write_buffer_size() < MIN_READ_BYTES:
            self._stall_timer = None
            self._break()
        else:
            self._start_stall_timer()
