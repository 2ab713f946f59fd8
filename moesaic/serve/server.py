"""The server under the application: its socket, its signals, its end.

A first SIGTERM or SIGINT drains: what runs is given ``drain_seconds``, what comes is refused with 503; a second
one ends at once. SIGHUP reads the keys again. What a single connection may do is in ``connection``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from moesaic.errors import InvalidRequest
from moesaic.serve.app import App
from moesaic.serve.connection import LINGER, bounded
from moesaic.serve.guard import ADMINS
from moesaic.serve.settings import Settings

log = logging.getLogger("moesaic.serve")

BACKLOG = 1024
UNREAD = 256 << 10
"""Bytes that the system keeps for a reader: Linux would take up to 4 MiB for each."""
FILES = 256
"""Open files besides connections."""


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._app.stopping or self._loop is None:
            self.force_exit = self._app.stopping
            super().handle_exit(sig, frame)
            return
        self._app.draining = self._app.stopping = True
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        log.info("draining", extra={"running": self._app.running})
        loop = asyncio.get_running_loop()
        until = loop.time() + self._app.settings.drain_seconds
        while self._app.running and loop.time() < until and not self.should_exit:
            await asyncio.sleep(0.05)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, as uvicorn does, but let nobody take his time over TLS's handshake."""
        self._loop = asyncio.get_running_loop()
        await self.lifespan.startup()
        config, settings = self.config, self._app.settings
        tls: dict[str, Any] = {"ssl": config.ssl}
        if config.ssl:
            tls |= {"ssl_handshake_timeout": settings.header_seconds, "ssl_shutdown_timeout": LINGER}
        admins = (ADMINS, settings.admin_port)

        def connection() -> asyncio.Protocol:
            kind: Any = config.http_protocol_class
            made: asyncio.Protocol = kind(config, self.server_state, self.lifespan.state)
            return made

        self.servers = [
            await self._loop.create_server(
                connection, sock=each, backlog=BACKLOG, **({} if each.getsockname()[:2] == admins else tls)
            )
            for each in sockets or ()
        ]
        self.started = True


def prepare(connections: int) -> None:
    """Let this process have as many files open as there may be connections, and leave no image of its memory behind."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            log.warning("too few files may be open for all connections", extra={"open": most, "wanted": wanted})


def bind(settings: Settings) -> socket.socket:
    """Return a listening socket.

    Raises:
        InvalidRequest: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)  # connections have it from here
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"cannot listen on {settings.host}:{settings.port}: {why}") from error
    return listening


async def serve(
    app: App,
    *listening: socket.socket,
    certificate: str | None = None,
    private_key: str | None = None,
    reload_keys: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal says to stop; administrators' own port, if it is among these, without TLS.

    Raises:
        InvalidRequest: the certificate or its key cannot be used.
    """
    config = configured(app, certificate, private_key)
    if reload_keys and hasattr(signal, "SIGHUP"):
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload_keys)
    await Server(config, app).serve(list(listening))


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
        "timeout_keep_alive": app.settings.idle_seconds,
        "timeout_graceful_shutdown": 2,
        "ssl_certfile": certificate,
        "ssl_keyfile": private_key,
    }
    config = uvicorn.Config(app, **options)
    try:
        config.load()
    except OSError as error:  # of which the ssl module's errors are
        raise InvalidRequest(f"the certificate or its key cannot be used: {error.strerror or error}") from error
    return config
