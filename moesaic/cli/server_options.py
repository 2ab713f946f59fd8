"""What everything that listens has in common: address, keys, limits, logs, and the way from flags to a running server.

Imports nothing slow: ``moesaic --help`` reads this.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moesaic.cli.event_loop import run_async
from moesaic.errors import InvalidRequest, MoesaicError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from moesaic.backend import Backend
    from moesaic.serve.exchange import Endpoint
    from moesaic.serve.keys import Key, Keys
    from moesaic.serve.settings import Settings

D = TypeVar("D", bound="Backend")
log = logging.getLogger("moesaic.serve")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``settings`` and ``serve`` read."""
    net = parser.add_argument_group("network")
    net.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    net.add_argument("-p", "--port", type=int, help="default 8000; 0: any free one")
    net.add_argument("--allowed-host", action="append", metavar="NAME", help="a name clients call it by; *: any")
    net.add_argument("--cors-origin", action="append", metavar="URL", help="a page's origin that may call it")
    net.add_argument(
        "--trusted-proxy", action="append", metavar="ADDR", help="a proxy whose X-Forwarded-For is believed"
    )
    net.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM")
    net.add_argument("--tls-key", metavar="FILE", help="its private key, PEM")
    keys = parser.add_argument_group("keys")
    keys.add_argument(
        "--keys", type=Path, metavar="FILE", help="who may use it, see `moesaic keys`; read again on SIGHUP"
    )
    keys.add_argument("--insecure-no-auth", action="store_true", help="off loopback, let everybody in")
    how = parser.add_argument_group("limits (seconds)")
    how.add_argument("--request-timeout", type=float, metavar="S", help="the most an answer takes (default 600)")
    how.add_argument("--queue-timeout", type=float, metavar="S", help="the most it waits for its turn (default 300)")
    how.add_argument("--drain-timeout", type=float, metavar="S", help="for what runs, after SIGTERM (default 30)")
    how.add_argument("--max-body", type=int, metavar="BYTES", help="default 2 MiB")
    out = parser.add_argument_group("logs")
    out.add_argument("--log-format", choices=("json", "text"), default="json")
    out.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    out.add_argument("--otel", action="store_true", help="traces to OTEL_EXPORTER_OTLP_ENDPOINT")


def need_packages() -> None:
    """Refuse to go on without the packages that serving needs.

    Raises:
        InvalidRequest: one is missing.
    """
    try:
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InvalidRequest("serving needs more packages: pip install 'moesaic[serve]'") from error


def settings(args: argparse.Namespace, **more: Any) -> Settings:
    """Return a server's bounds as the flags say, and as ``more`` does where it is not None."""
    from moesaic.serve.settings import Settings

    given = {
        "allowed_hosts": tuple(args.allowed_host or ()),
        "cors_origins": tuple(args.cors_origin or ()),
        "request_seconds": args.request_timeout,
        "queue_seconds": args.queue_timeout,
        "drain_seconds": args.drain_timeout,
        "body_bytes": args.max_body,
        "trusted_proxies": tuple(args.trusted_proxy or ()),
        **more,
    }
    named = {name: value for name, value in given.items() if value is not None}
    return Settings(host=args.host, port=args.port, **named)


def serve(
    args: argparse.Namespace,
    settings: Settings,
    backend: Callable[[], Awaitable[D]],
    routes: Callable[[D], Iterable[Endpoint]] = lambda _: (),
    figures: Callable[[D], Callable[[], Iterable[Metric]]] = lambda _: tuple,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal says to stop; return the exit code.

    Args:
        args: what ``add_flags`` has added.
        settings: the bounds.
        door: makes what answers, on the server's loop, when the port is taken.
        routes: what it offers besides the dialects.
        figures: what it shows besides the server's own figures.
        before: called when nothing can be refused any more.

    Raises:
        InvalidRequest: the address, the keys or the certificate cannot be used as they are.
    """
    from moesaic.serve import keys, logs, server
    from moesaic.serve.guard import ADMINS

    who = keys.Keys(read_keys(args), wanted=args.keys is not None, source=lambda: read_keys(args))
    if not settings.loopback and not who.wanted and not args.insecure_no_auth:
        raise InvalidRequest(
            f"{args.host} can be reached from elsewhere: give --keys FILE (`moesaic keys add` makes one), "
            "MOESAIC_API_KEYS, --api-key, or --insecure-no-auth to let everybody in"
        )
    if (args.tls_cert is None) != (args.tls_key is None):
        raise InvalidRequest("--tls-cert and --tls-key go together")
    logs.set_up(args.log_level, as_json=args.log_format == "json")
    before()
    server.prepare(settings.connections)
    with contextlib.ExitStack() as stack:
        # Before a model is read: a port that is taken is known at once.
        sockets = [stack.enter_context(server.bind(settings))]
        if settings.admin_port is not None:
            sockets.append(stack.enter_context(server.bind(replace(settings, host=ADMINS, port=settings.admin_port))))
            settings = replace(settings, admin_port=sockets[1].getsockname()[1])
        run_async(_run(args, settings, who, sockets, backend, routes, figures))
    return 0


async def _run(
    args: argparse.Namespace,
    settings: Settings,
    who: Keys,
    sockets: Sequence[socket.socket],
    backend: Callable[[], Awaitable[D]],
    routes: Callable[[D], Iterable[Endpoint]],
    figures: Callable[[D], Callable[[], Iterable[Metric]]],
) -> None:
    from moesaic.serve import server
    from moesaic.serve.app import App
    from moesaic.serve.tracing import Tracer

    tracer = Tracer() if args.otel else None
    opened = await backend()
    app = App(opened, settings, who, tracer, routes(opened), figures(opened))

    def reload() -> None:
        try:
            who.reload()
            log.info("keys read again")
        except MoesaicError as error:
            log.error("the keys stay as they were", extra={"why": str(error)})

    if not settings.loopback and not args.tls_cert:
        log.warning("keys and prompts travel unencrypted: give --tls-cert, or have a proxy in front that encrypts")
    urls = [f"http://{address}:{port}" for address, port in (each.getsockname()[:2] for each in sockets)]
    if args.tls_cert:
        urls[0] = urls[0].replace("http://", "https://")
    admins = {"admins": urls[1]} if urls[1:] else {}
    log.info("serving", extra={"url": urls[0], "models": [c.name for c in opened.models()], **admins})
    try:
        await server.serve(app, *sockets, certificate=args.tls_cert, private_key=args.tls_key, reload_keys=reload)
    finally:
        if tracer:
            tracer.close()


def read_keys(args: argparse.Namespace) -> tuple[Key, ...]:
    """Return the keys that the flags and the environment name."""
    from moesaic.serve import keys

    listed = keys.read(args.keys) if args.keys else ()
    one = (keys.Key("api-key", keys.digest(args.api_key)),) if getattr(args, "api_key", None) else ()
    return (*listed, *one, *keys.from_environment(os.environ.get("MOESAIC_API_KEYS", "")))
