"""The server under the application: sockets, signals, and deadlines that the HTTP library does not have.

uvicorn by itself reads headers of any length for any time. Here they have ``Settings.header_seconds`` and
``header_bytes``, and connections are counted, also by address. A first SIGTERM or SIGINT drains: what runs
is given ``drain_seconds``, what comes is refused with 503; a second one ends at once. SIGHUP reads the keys again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moesaic.errors import InvalidRequest
from moesaic.serve.app import App
from moesaic.serve.settings import Settings

log = logging.getLogger("moesaic.serve")

HEADERS = 100
"""Fields of one request."""
REFUSED = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"


def bounded(settings: Settings) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with these bounds."""
    addresses: Counter[str] = Counter()

    class Bounded(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _head = 0
        _in_head = True
        _counted = ""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._counted = self.client[0] if self.client else ""
            addresses[self._counted] += 1
            crowded = addresses[self._counted] > settings.connections_per_address
            if crowded or len(self.connections) > settings.connections:
                transport.close()
            else:
                self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            addresses[self._counted] -= 1
            if not addresses[self._counted]:
                del addresses[self._counted]
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head += len(data)
                if self._head > settings.header_bytes + settings.body_bytes:  # nobody sends that much in one piece
                    self._refuse(b"431 Request Header Fields Too Large")
                    return
            super().data_received(data)
            if self._in_head and self._head > settings.header_bytes and self.parser is not None:
                self._refuse(b"431 Request Header Fields Too Large")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head = True
            if self._timer is None:
                self._arm()

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            if len(self.headers) > HEADERS:
                raise ValueError("too many header fields")

        def on_headers_complete(self) -> None:
            self._in_head, self._head = False, 0
            self._disarm()
            super().on_headers_complete()

        def _arm(self) -> None:
            self._timer = self.loop.call_later(settings.header_seconds, self._late)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if self._head:
                self._refuse(b"408 Request Timeout")
            else:
                self.transport.close()

        def _refuse(self, status: bytes) -> None:
            body = b'{"error":{"message":"%b","type":"invalid_request_error"}}' % status
            if not self.transport.is_closing():
                self.transport.write(REFUSED % (status, len(body), body))
                self.transport.close()

    return Bounded


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._app.draining or self._loop is None:
            self.force_exit = self._app.draining
            super().handle_exit(sig, frame)
            return
        self._app.draining = True
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        log.info("draining", extra={"running": self._app.running})
        loop = asyncio.get_running_loop()
        until = loop.time() + self._app.settings.drain_seconds
        while self._app.running and loop.time() < until and not self.should_exit:
            await asyncio.sleep(0.05)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes uvloop's event loop, which writes to sockets at half the cost; None where there is none."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def bind(settings: Settings) -> socket.socket:
    """Return a listening socket.

    Raises:
        InvalidRequest: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        listening.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"cannot listen on {settings.host}:{settings.port}: {why}") from error
    return listening


async def serve(
    app: App,
    listening: socket.socket,
    *,
    certificate: str | None = None,
    private_key: str | None = None,
    reload_keys: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal says to stop.

    Raises:
        InvalidRequest: the certificate or its key cannot be used.
    """
    config = configured(app, certificate, private_key)
    if reload_keys and hasattr(signal, "SIGHUP"):
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload_keys)
    await Server(config, app).serve([listening])


def configured(app: App, certificate: str | None = None, private_key: str | None = None) -> uvicorn.Config:
    """Return how uvicorn is to serve an application.

    Raises:
        InvalidRequest: the certificate or its key cannot be used.
    """
    options: dict[str, Any] = {
        "http": bounded(app.settings),
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": round(app.settings.idle_seconds) or 1,
        "timeout_graceful_shutdown": 5,
        "ssl_certfile": certificate,
        "ssl_keyfile": private_key,
    }
    config = uvicorn.Config(app, **options)
    try:
        config.load()
    except OSError as error:  # of which the ssl module's errors are
        raise InvalidRequest(f"the certificate or its key cannot be used: {error.strerror or error}") from error
    return config
