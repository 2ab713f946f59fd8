"""The server process that runs the application: sockets, signals and shutdown.

The first SIGTERM or SIGINT drains: running requests get ``drain_seconds``, new ones are refused with 503. A second
signal stops at once. SIGHUP reads the keys and other files again. The module ``connection`` has the limits of a single
connection.
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
from moesaic.serve.connection import LINGER_SECONDS, bounded
from moesaic.serve.guard import ADMIN_ADDRESS
from moesaic.serve.settings import Settings

log = logging.getLogger("moesaic.serve")

BACKLOG = 1024
SEND_BUFFER_BYTES = 256 << 10
"""Size of a connection's send buffer in the kernel. Linux would let it grow to 4 MiB for each slow client."""
OTHER_FILES = 256
"""Number of open files that the process needs in addition to its connections."""


class Server(uvicorn.Server):
    """uvicorn's server, extended to drain: running requests may end before the server stops."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._state, self._settings = app.state, app.services.settings
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On the first signal, drain: refuse new requests and let running ones end. On the second, stop at once."""
        if self._state.stopping or self._loop is None:
            self.force_exit = self._state.stopping
            super().handle_exit(sig, frame)
            return
        self._state.draining = self._state.stopping = True
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        log.info("draining", extra={"running": self._state.running})
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.drain_seconds
        while self._state.running and loop.time() < end and not self.should_exit:
            await asyncio.sleep(0.05)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on ``sockets`` as uvicorn does, with a time limit for the TLS handshake.

        The administrators' port has no TLS.
        """
        self._loop = asyncio.get_running_loop()
        await self.lifespan.startup()
        config, settings = self.config, self._settings
        tls: dict[str, Any] = {"ssl": config.ssl}
        if config.ssl:
            tls |= {"ssl_handshake_timeout": settings.header_seconds, "ssl_shutdown_timeout": LINGER_SECONDS}
        admin_listener = (ADMIN_ADDRESS, settings.admin_port)

        def make_connection() -> asyncio.Protocol:
            protocol_class: Any = config.http_protocol_class
            connection: asyncio.Protocol = protocol_class(config, self.server_state, self.lifespan.state)
            return connection

        self.servers = [
            await self._loop.create_server(
                make_connection,
                sock=listener,
                backlog=BACKLOG,
                **({} if listener.getsockname()[:2] == admin_listener else tls),
            )
            for listener in sockets or ()
        ]
        self.started = True


def prepare_process(connections: int) -> None:
    """Raise the limit of open files to what this number of connections needs, and disable core dumps.

    A core dump would contain prompts. On Windows, nothing is changed.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < wanted:
            log.warning("file limit is too low for all connections", extra={"limit": limit, "wanted": wanted})


def bind(settings: Settings) -> socket.socket:
    """Return a socket that listens on ``settings.host`` and ``settings.port``.

    Raises:
        InvalidRequest: the server cannot listen on this address.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sets TCP_NODELAY on accepted connections only if the listening socket names its protocol. Without it, the
    # body of a response waits up to 40 ms for the client to acknowledge the head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # accepted connections inherit it
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"cannot listen on {settings.host}:{settings.port}: {why}") from error
    return listener


async def serve(
    app: App,
    *listeners: socket.socket,
    certificate: str | None = None,
    private_key: str | None = None,
    reload: Callable[[], None] | None = None,
) -> None:
    """Serve the application until a signal stops it.

    Args:
        app: the application.
        listeners: sockets that already listen. The one for administrators' own port, if there is one, has no TLS.
        certificate: path of the TLS certificate; None: no TLS.
        private_key: path of the certificate's private key.
        reload: called on SIGHUP to read the API keys and other files again; None: SIGHUP is not handled.

    Raises:
        InvalidRequest: the certificate or its private key cannot be used.
    """
    config = uvicorn_config(app, certificate, private_key)
    if reload and hasattr(signal, "SIGHUP"):
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    await Server(config, app).serve(list(listeners))


def uvicorn_config(app: App, certificate: str | None = None, private_key: str | None = None) -> uvicorn.Config:
    """Return uvicorn's configuration for an application.

    ``certificate`` and ``private_key`` are paths of the files for TLS; None: no TLS.

    Raises:
        InvalidRequest: the certificate or its private key cannot be used.
    """
    settings = app.services.settings
    options: dict[str, Any] = {
        "http": bounded(settings),
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": settings.idle_seconds,
        "timeout_graceful_shutdown": 2,
        "ssl_certfile": certificate,
        "ssl_keyfile": private_key,
    }
    config = uvicorn.Config(app, **options)
    try:
        config.load()
    except OSError as error:  # the errors of the ssl module derive from it
        raise InvalidRequest(f"the certificate or its key cannot be used: {error.strerror or error}") from error
    return config
