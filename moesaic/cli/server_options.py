"""Flags of the commands that run an HTTP server, and the steps from parsed flags to a running server.

This module imports nothing slow, because ``moesaic --help`` imports it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moesaic.cli.event_loop import run_async
from moesaic.errors import InvalidRequest, MoesaicError

if TYPE_CHECKING:
    import socket

    from prometheus_client.metrics_core import Metric

    from moesaic.backend import Backend
    from moesaic.serve.endpoint import Endpoint
    from moesaic.serve.keys import Key, Keys
    from moesaic.serve.settings import Settings

B = TypeVar("B", bound="Backend")
log = logging.getLogger("moesaic.serve")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``settings`` and ``serve`` read."""
    network = parser.add_argument_group("network")
    network.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    network.add_argument("-p", "--port", type=int, help="port to listen on (default 8000; 0: any free port)")
    network.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        help="accept requests whose Host header has this name; repeatable; *: any name",
    )
    network.add_argument(
        "--cors-origin",
        action="append",
        metavar="URL",
        help="allow web pages of this origin to call the API; repeatable; *: any origin",
    )
    network.add_argument(
        "--trusted-proxy",
        action="append",
        metavar="ADDR",
        help="trust the X-Forwarded-For header of this proxy; repeatable",
    )
    network.add_argument("--tls-cert", metavar="FILE", help="TLS certificate chain (PEM)")
    network.add_argument("--tls-key", metavar="FILE", help="private key of the certificate (PEM)")
    keys = parser.add_argument_group("API keys")
    keys.add_argument(
        "--keys", type=Path, metavar="FILE", help="require a key of this file (see `moesaic keys`); SIGHUP reloads it"
    )
    keys.add_argument(
        "--insecure-no-auth", action="store_true", help="require no key although other machines can connect"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--request-timeout", type=float, metavar="S", help="maximum seconds for an answer (default 600)"
    )
    limits.add_argument(
        "--queue-timeout", type=float, metavar="S", help="maximum seconds that a request waits to start (default 300)"
    )
    limits.add_argument(
        "--drain-timeout", type=float, metavar="S", help="seconds to finish running requests after SIGTERM (default 30)"
    )
    limits.add_argument(
        "--keep-alive-timeout",
        "--timeout-keep-alive",
        type=float,
        metavar="S",
        help="seconds until a connection without a request is closed (default 75); more than that of the load balancer",
    )
    limits.add_argument("--max-body", type=int, metavar="BYTES", help="maximum size of a request (default 2 MiB)")
    limits.add_argument(
        "--strict-fields",
        action="store_true",
        help="refuse requests with unknown fields; by default they are ignored and named in a response header",
    )
    add_log_flags(parser).add_argument(
        "--otel", action="store_true", help="send OpenTelemetry traces to $OTEL_EXPORTER_OTLP_ENDPOINT"
    )


def add_admin_port(parser: argparse.ArgumentParser) -> None:
    """Add the flag --admin-port."""
    about = "serve the admin routes only on this port of 127.0.0.1, not on --port (0: any free port)"
    parser.add_argument("--admin-port", type=int, metavar="N", help=about)


def add_log_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of the log, and return their group."""
    logs = parser.add_argument_group("logs")
    logs.add_argument("--log-format", choices=("json", "text"), default="json", help="default json")
    logs.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default info")
    return logs


def require_packages() -> None:
    """Check that the packages that a server needs are installed.

    Raises:
        InvalidRequest: a package is missing.
    """
    try:
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InvalidRequest("packages for serving are not installed: pip install 'moesaic[serve]'") from error


def settings(args: argparse.Namespace, **more: Any) -> Settings:
    """Return the server settings from the flags and from the fields in ``more``; a value of None means the default."""
    from moesaic.serve.settings import Settings

    values = {
        "allowed_hosts": tuple(args.allowed_host or ()),
        "cors_origins": tuple(args.cors_origin or ()),
        "request_seconds": args.request_timeout,
        "queue_seconds": args.queue_timeout,
        "drain_seconds": args.drain_timeout,
        "idle_seconds": args.keep_alive_timeout,
        "body_bytes": args.max_body,
        "trusted_proxies": tuple(args.trusted_proxy or ()),
        "strict_fields": args.strict_fields,
        **more,
    }
    changed = {name: value for name, value in values.items() if value is not None}
    return Settings(host=args.host, port=args.port, **changed)


def serve(
    args: argparse.Namespace,
    settings: Settings,
    make_backend: Callable[[], Awaitable[B]],
    routes: Callable[[B], Iterable[Endpoint]] = lambda _: (),
    metrics: Callable[[B], Callable[[], Iterable[Metric]]] = lambda _: tuple,
    before: Callable[[], None] = lambda: None,
    reloads: Callable[[B], Mapping[str, Callable[[], None]]] = lambda _: {},
) -> int:
    """Serve until a signal stops the server; return the exit code.

    Args:
        args: parsed flags of ``add_flags``.
        settings: settings of the server.
        make_backend: creates the backend, on the server's event loop, after the port is bound.
        routes: returns the backend's own routes, which are served beside the APIs.
        metrics: returns a collector of the backend's own Prometheus metrics.
        before: called when all flags are checked, before the port is bound.
        reloads: returns the functions that SIGHUP calls after it has read the keys again, by what they read.

    Raises:
        InvalidRequest: the address, the keys or the certificate are not usable.
    """
    from moesaic.serve import keys, logs, server
    from moesaic.serve.guard import ADMIN_ADDRESS

    accepted = keys.Keys(read_keys(args), wanted=args.keys is not None, source=lambda: read_keys(args))
    if not settings.loopback and not accepted.wanted and not args.insecure_no_auth:
        raise InvalidRequest(
            f"other machines can reach {args.host}, so API keys are required: pass --keys FILE (`moesaic keys add` "
            "creates one) or --api-key, or set MOESAIC_API_KEYS; --insecure-no-auth accepts requests without a key"
        )
    if (args.tls_cert is None) != (args.tls_key is None):
        raise InvalidRequest("--tls-cert and --tls-key go together: pass both or neither")
    logs.set_up(args.log_level, as_json=args.log_format == "json")
    before()
    server.prepare_process(settings.connections)
    with contextlib.ExitStack() as stack:
        # The port is bound before the model is loaded, so that a port in use is reported at once.
        sockets = [stack.enter_context(server.bind(settings))]
        if settings.admin_port is not None:
            sockets.append(
                stack.enter_context(server.bind(replace(settings, host=ADMIN_ADDRESS, port=settings.admin_port)))
            )
            settings = replace(settings, admin_port=sockets[1].getsockname()[1])
        run_async(_run(args, settings, accepted, sockets, make_backend, routes, metrics, reloads))
    return 0


async def _run(
    args: argparse.Namespace,
    settings: Settings,
    keys: Keys,
    sockets: Sequence[socket.socket],
    make_backend: Callable[[], Awaitable[B]],
    routes: Callable[[B], Iterable[Endpoint]],
    metrics: Callable[[B], Callable[[], Iterable[Metric]]],
    reloads: Callable[[B], Mapping[str, Callable[[], None]]],
) -> None:
    from moesaic.serve import server
    from moesaic.serve.app import App
    from moesaic.serve.tracing import Tracer

    tracer = Tracer() if args.otel else None
    backend = await make_backend()
    app = App(backend, settings, keys, tracer, routes(backend), metrics(backend))

    def reload() -> None:
        for what, read_again in {"API keys": keys.reload, **reloads(backend)}.items():
            try:
                read_again()
                log.info(f"{what} reloaded")
            except MoesaicError as error:
                log.error(f"{what} not reloaded", extra={"why": str(error)})

    if not settings.loopback and not args.tls_cert:
        log.warning("keys and prompts travel unencrypted: pass --tls-cert, or use a reverse proxy that encrypts")
    urls = [f"http://{host}:{port}" for host, port in (listener.getsockname()[:2] for listener in sockets)]
    if args.tls_cert:
        urls[0] = urls[0].replace("http://", "https://")
    admins = {"admins": urls[1]} if urls[1:] else {}
    log.info("serving", extra={"url": urls[0], "models": [model.name for model in backend.models()], **admins})
    try:
        await server.serve(app, *sockets, certificate=args.tls_cert, private_key=args.tls_key, reload=reload)
    finally:
        if tracer:
            tracer.close()


def read_keys(args: argparse.Namespace) -> tuple[Key, ...]:
    """Return the API keys of the key file, of --api-key and of the environment variable MOESAIC_API_KEYS."""
    from moesaic.serve import keys

    from_file = keys.read(args.keys) if args.keys else ()
    single = (keys.Key("api-key", keys.digest(args.api_key)),) if getattr(args, "api_key", None) else ()
    return (*from_file, *single, *keys.from_environment(os.environ.get("MOESAIC_API_KEYS", "")))
