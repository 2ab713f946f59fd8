"""The ASGI application: every dialect's routes over one door, each with its guard.

Knows routes and the order of checks. Does not know what an API looks like inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.staticfiles import StaticFiles

from moesaic import registry
from moesaic.backend import Backend
from moesaic.errors import Forbidden, MoesaicError, NotFound, TimedOut, Unavailable, WrongMethod
from moesaic.serve import logs
from moesaic.serve.dialects import _openai
from moesaic.serve.exchange import (
    Disconnected,
    Endpoint,
    EventStream,
    Failure,
    Message,
    Receive,
    RequestContext,
    Response,
    Scope,
    Send,
    Sender,
    failure_of,
    header,
)
from moesaic.serve.guard import Guard
from moesaic.serve.json_body import LARGE_BODY_BYTES, decode_json, read_body
from moesaic.serve.keys import NOBODY, Keys
from moesaic.serve.metrics import Metrics
from moesaic.serve.readiness import Readiness
from moesaic.serve.response_store import ResponseStore
from moesaic.serve.settings import Settings
from moesaic.serve.tracing import Tracer

log = logging.getLogger("moesaic.serve")

WEB = Path(__file__).parent / "web"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class App:
    """The application. ``draining`` is set while it is to take nothing new, ``stopping`` when it is about to end."""

    def __init__(
        self,
        backend: Backend,
        settings: Settings | None = None,
        keys: Keys | None = None,
        tracer: Tracer | None = None,
        more: Iterable[Endpoint] = (),
        figures: Callable[[], Iterable[Metric]] = tuple,
    ) -> None:
        """Offer every dialect over a door, and ``more`` routes and figures."""
        self.backend, self.settings, self.keys = backend, settings or Settings(), keys or Keys()
        self.tracer = tracer
        self.metrics = Metrics(backend.stats, figures)
        self.guard = Guard(self.settings, self.keys)
        self.kept = ResponseStore(self.settings.kept_responses, self.settings.kept_bytes)
        self.progress = Readiness(backend, self.settings.stall_seconds)
        self.descriptions: dict[bool, dict[str, Any]] = {}
        """OpenAPI's, with and without keys, as far as they were asked for."""
        self.draining = self.stopping = False
        self.running = 0
        """Requests that are being answered."""
        self.asking = 0
        """What of them asks a model; one may ask for several answers."""
        self.endpoints = [*endpoints(), *more]
        paths: dict[str, dict[str, Endpoint]] = {}
        for each in self.endpoints:
            paths.setdefault(each.path, {})[each.method] = each
        routes: list[Any] = [Route(path, _Run(self, path, by), methods=list(by)) for path, by in paths.items()]
        self._router = Router(routes, default=self._not_found, redirect_slashes=False)
        self._files = StaticFiles(directory=WEB, check_dir=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        try:
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
        except asyncio.CancelledError:  # told twice to stop: at once, and not an error that needs a trace
            return
        await self.backend.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = header(scope, b"x-request-id")
        scope["request_id"] = given if given and REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope["app"] = self  # then a wrong method is raised, and shown as an API shows errors
        scope["begun"] = time.monotonic()
        scope["client"] = (self.guard.client(scope), 0)
        headers = [*SAFE, (b"x-request-id", scope["request_id"].encode()), *self.guard.cors(scope)]
        scope["sender"] = sender = Sender(send, self.settings, headers)
        try:
            self.guard.check_host(scope)
            self.guard.check_origin(scope)
            if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method"):
                await sender.whole(Response(b"", 204, ""))
            elif self._is_page(scope):
                await self._page(scope, receive, send, headers)
            else:
                await self._router(scope, receive, send)
        except HTTPException as error:
            allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
            await self._refuse(scope, WrongMethod(scope["method"], ", ".join(allowed)))
        except MoesaicError as error:
            await self._refuse(scope, error)
        finally:
            self._log(scope, sender)

    # The web chat

    def _is_page(self, scope: Scope) -> bool:
        if scope["method"] not in ("GET", "HEAD"):
            return False
        wants_page = scope["path"] == "/" and "text/html" in (header(scope, b"accept") or "")
        return wants_page or scope["path"].startswith("/web/")

    async def _page(self, scope: Scope, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Serve a file of the web chat; it is open to everybody, what it asks for is not."""
        extra = [*headers, (b"content-security-policy", PAGE_POLICY.encode()), (b"cache-control", b"no-cache")]
        name = "index.html" if scope["path"] == "/" else scope["path"].removeprefix("/web/")

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["sender"].status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or not (WEB / name).is_file():
            raise NotFound("there is no such file")
        await self._files({**scope, "path": f"/{name}", "root_path": ""}, receive, with_headers)

    # APIs

    async def _not_found(self, scope: Scope, _: Receive, __: Send) -> None:
        raise NotFound(f"there is no {scope['method']} {scope['path'][:100]!r} here")

    async def run(self, endpoint: Endpoint, scope: Scope, receive: Receive) -> None:
        """Answer one request of an endpoint, or raise before anything was sent."""
        if not endpoint.public:
            self.guard.check_listener(scope, admin=endpoint.admin)
        key = NOBODY if endpoint.public else self.guard.who(scope)
        if endpoint.admin and not key.admin:
            raise Forbidden("this needs an admin's key: `moesaic keys add NAME --admin` makes one")
        if key.worker != endpoint.worker and not endpoint.public and self.keys.wanted:
            raise Forbidden("this needs a worker's key" if endpoint.worker else "a worker's key is for its work alone")
        if self.draining and endpoint.body is not None and not (endpoint.worker or endpoint.admin):
            raise Unavailable("the server takes nothing new now: ask another, or try again later")
        call = RequestContext(self, endpoint, scope, key, scope["request_id"])
        self.running += not endpoint.worker
        error: BaseException | None = None
        try:
            if endpoint.body is not None:
                call.body = await self._body(endpoint, scope, receive)
                if not endpoint.worker:
                    call.begin()
            await _unless_left(self._answer(call, scope["sender"]), receive)
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.running -= not endpoint.worker
            call.close(error)

    async def _body(self, endpoint: Endpoint, scope: Scope, receive: Receive) -> Any:
        body = await read_body(scope, receive, self.settings, endpoint.body_bytes)
        read = endpoint.decode or decode_json
        if len(body) > LARGE_BODY_BYTES:
            return await asyncio.to_thread(read, body, endpoint.body)
        return read(body, endpoint.body)

    async def _answer(self, call: RequestContext, sender: Sender) -> None:
        seconds = self.settings.request_seconds
        try:
            async with asyncio.timeout(seconds or None) as bound:
                answer = await call.endpoint.run(call)
        except TimeoutError:
            if not bound.expired():
                raise
            raise TimedOut(f"the answer took longer than {seconds:g} s") from None
        if isinstance(answer, EventStream):
            assert call.endpoint.broken is not None, "an endpoint that streams must say how a stream breaks"
            await sender.stream(answer, answer.broken or call.endpoint.broken)
        else:
            call.close()  # before the answer is there: who has it may come again at once
            await sender.whole(answer)

    async def _refuse(self, scope: Scope, error: BaseException, endpoint: Endpoint | None = None) -> None:
        sender: Sender = scope["sender"]
        if sender.started:
            return
        failure = failure_of(error)
        shape = endpoint.failure if endpoint else self._shape_of(scope["path"])
        wait = failure.retry_after
        headers = {} if wait is None else {"retry-after": str(max(1, math.ceil(wait)))}
        if isinstance(error, WrongMethod):
            headers["allow"] = error.allowed
        if failure.status == 401:
            headers["www-authenticate"] = "Bearer"
        with contextlib.suppress(Disconnected):
            shown = shape(failure)
            answer = shown if isinstance(shown, Response) else Response(shown, failure.status)
            await sender.whole(replace(answer, headers={**answer.headers, **headers}))

    def _shape_of(self, path: str) -> Any:
        """Return how an error is shown where no route was found, or none of that method.

        As the route at or above this path shows it; else as OpenAI does under /v1, and as TGI does elsewhere.
        """
        for endpoint in self.endpoints:
            if endpoint.path not in ("/", "/v1") and f"{path}/".startswith(f"{endpoint.path}/"):
                return endpoint.failure
        return _openai.failure if path.startswith("/v1") else _plain

    def _log(self, scope: Scope, sender: Sender) -> None:
        route = scope.get("endpoint")
        path = route.path if isinstance(route, _Run) else "other"
        self.metrics.requests.labels(scope["method"], path, str(sender.status or 499)).inc()
        log.log(
            logging.DEBUG if path.startswith("/worker/") and sender.status == 200 else logging.INFO,  # a great many
            "request",
            extra={
                "id": scope["request_id"],
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": sender.status or 499,
                "ms": round(1000 * (time.monotonic() - scope["begun"]), 1),
                "client": scope["client"][0],
            },
        )


class _Run:
    """The endpoints of one path, by method, as the router calls them."""

    def __init__(self, app: App, path: str, endpoints: Mapping[str, Endpoint]) -> None:
        self.app, self.path, self.endpoints = app, path, endpoints

    async def __call__(self, scope: Scope, receive: Receive, _: Send) -> None:
        endpoint = self.endpoints["GET" if scope["method"] == "HEAD" else scope["method"]]
        try:
            await self.app.run(endpoint, scope, receive)
        except Disconnected:
            pass
        except asyncio.CancelledError:
            if not self.app.stopping:
                raise
            await self.app._refuse(scope, Unavailable("the server is stopping"), endpoint)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of somebody's Rust is no Exception
            if not isinstance(error, MoesaicError):
                log.error("an endpoint broke", extra={"id": scope["request_id"], **logs.trace(error)})
            await self.app._refuse(scope, error, endpoint)


async def _unless_left(work: Any, receive: Receive) -> None:
    """Run ``work``, and stop it when the client leaves."""
    running = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((running, left), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            raise Disconnected
        await running
    finally:
        left.cancel()
        if not running.done():  # this was cancelled itself; let the work say its last word
            running.cancel()
            await asyncio.wait((running,))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def endpoints() -> Iterable[Endpoint]:
    """Yield the routes of every dialect."""
    for name in registry.names("serve/dialects"):
        yield from registry.load("serve/dialects", name).ENDPOINTS


def _plain(failure: Failure) -> Any:
    return {"error": failure.message, "error_type": failure.kind}
