"""The ASGI application: the routes of all APIs over one backend, and the checks that run before an endpoint.

This module does not depend on the format of any API; the modules in ``dialects`` implement one API each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric
from starlette.routing import Match, Route
from starlette.staticfiles import StaticFiles

from moesaic import registry
from moesaic.backend import Backend
from moesaic.errors import Forbidden, MoesaicError, NotFound, Unavailable, WrongMethod
from moesaic.serve import logs, unknown_fields
from moesaic.serve.concurrency import cancel_on_disconnect
from moesaic.serve.context import RequestContext
from moesaic.serve.cors import is_preflight
from moesaic.serve.deadline import Deadline
from moesaic.serve.endpoint import Endpoint, EventStream, Response, failure_of, openai_failure, plain_failure
from moesaic.serve.guard import Guard
from moesaic.serve.json_body import LARGE_BODY_BYTES, read_body
from moesaic.serve.keys import ANONYMOUS, Key, Keys
from moesaic.serve.metrics import Metrics
from moesaic.serve.readiness import Readiness
from moesaic.serve.response_store import ResponseStore
from moesaic.serve.sender import ResponseSender
from moesaic.serve.services import Services
from moesaic.serve.settings import Settings
from moesaic.serve.tracing import Tracer
from moesaic.serve.types import Disconnected, HttpRequest, Message, Receive, Scope, Send, header

log = logging.getLogger("moesaic.serve")

WEB_DIRECTORY = Path(__file__).parent / "web"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_CLOSED_REQUEST = 499
"""Status in the log for a request whose client disconnected before a status was sent, as nginx logs it."""


@dataclass
class Exchange:
    """One HTTP request that the application handles, the sender of its response, and values for log and metrics."""

    http: HttpRequest
    sender: ResponseSender
    started: float
    """When the request arrived, on the monotonic clock, in seconds."""
    route: str = "other"
    """Path of the matching route, such as ``/v1/jobs/{id}``, as a label in the metrics; "other" if none matched."""


class App:
    """The server's ASGI application: checks each request, runs its endpoint and sends the response."""

    def __init__(
        self,
        backend: Backend,
        settings: Settings | None = None,
        keys: Keys | None = None,
        tracer: Tracer | None = None,
        more_endpoints: Iterable[Endpoint] = (),
        more_metrics: Callable[[], Iterable[Metric]] = tuple,
    ) -> None:
        """Serve the routes of all APIs over one backend.

        Args:
            backend: generates the answers.
            settings: addresses and limits of the server; None: the defaults.
            keys: the API keys that are accepted; None: no key is required.
            tracer: exports a trace span for each generation; None: no traces.
            more_endpoints: further routes, in addition to those of the APIs.
            more_metrics: returns further metrics; called each time ``/metrics`` is read.
        """
        settings, keys = settings or Settings(), keys or Keys()
        self.services = Services(
            backend=backend,
            settings=settings,
            keys=keys,
            guard=Guard(settings, keys),
            fields=unknown_fields.FieldCheck(strict=settings.strict_fields),
            metrics=Metrics(backend.stats, more_metrics),
            readiness=Readiness(backend, settings.stall_seconds),
            responses=ResponseStore(settings.kept_responses, settings.kept_bytes),
            tracer=tracer,
            endpoints=(*dialect_endpoints(), *more_endpoints),
        )
        self.state = self.services.state
        self._endpoints: dict[str, dict[str, Endpoint]] = {}
        for endpoint in self.services.endpoints:
            self._endpoints.setdefault(endpoint.path, {})[endpoint.method] = endpoint
        self._routes = [Route(path, _unused, methods=list(by)) for path, by in self._endpoints.items()]
        self._files = StaticFiles(directory=WEB_DIRECTORY, check_dir=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope: the server's lifespan, an HTTP request, or a websocket, which is refused."""
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
        except asyncio.CancelledError:  # a second signal stops at once; that is not an error that needs a trace
            return
        await self.services.backend.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange(scope, send)
        try:
            self.services.guard.check_host(scope)
            self.services.guard.check_origin(scope)
            if is_preflight(scope):
                await exchange.sender.whole(Response(b"", 204, ""))
            elif self._is_page(scope):
                await self._page(exchange, receive, send)
            else:
                await self._route(exchange, receive)
        except MoesaicError as error:
            await self._refuse(exchange, error)
        finally:
            self._log(exchange)

    def _exchange(self, scope: Scope, send: Send) -> Exchange:
        guard, settings = self.services.guard, self.services.settings
        given_id = header(scope, b"x-request-id")
        request_id = given_id if given_id and REQUEST_ID.fullmatch(given_id) else secrets.token_hex(8)
        headers = [*SECURITY_HEADERS, (b"x-request-id", request_id.encode()), *guard.cors(scope)]
        http = HttpRequest(scope, request_id, guard.client_address(scope), headers)
        return Exchange(http, ResponseSender(send, settings.keep_alive_seconds, headers), time.monotonic())

    # The web chat

    def _is_page(self, scope: Scope) -> bool:
        if scope["method"] not in ("GET", "HEAD"):
            return False
        wants_page = scope["path"] == "/" and "text/html" in (header(scope, b"accept") or "")
        return wants_page or scope["path"].startswith("/web/")

    async def _page(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        """Send a file of the web chat page. The file needs no key; the API calls that the page makes do."""
        http = exchange.http
        extra = [
            *http.response_headers,
            (b"content-security-policy", PAGE_POLICY.encode()),
            (b"cache-control", b"no-cache"),
        ]
        name = "index.html" if http.path == "/" else http.path.removeprefix("/web/")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.sender.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        if not re.fullmatch(r"(client/)?[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or not (WEB_DIRECTORY / name).is_file():
            raise NotFound("file not found")
        await self._files({**http.scope, "path": f"/{name}", "root_path": ""}, receive, send_with_headers)

    # Endpoints

    async def _route(self, exchange: Exchange, receive: Receive) -> None:
        """Run the endpoint of the first route that matches the path.

        Raises:
            NotFound: no route has this path.
            WrongMethod: a route has this path, but not this method.
        """
        http, allowed = exchange.http, None
        for route in self._routes:
            match, child_scope = route.matches(http.scope)
            if match is Match.FULL:
                exchange.route, http.path_parameters = route.path, child_scope["path_params"]
                method = "GET" if http.method == "HEAD" else http.method
                await self._run(self._endpoints[route.path][method], exchange, receive)
                return
            if match is Match.PARTIAL and allowed is None:
                exchange.route, allowed = route.path, sorted(route.methods or ())
        if allowed is not None:
            raise WrongMethod(http.method, ", ".join(allowed))
        raise NotFound(f"there is no {http.method} {http.path[:100]!r} here")

    async def _run(self, endpoint: Endpoint, exchange: Exchange, receive: Receive) -> None:
        """Run one endpoint. An error becomes an error response of the endpoint's API, unless a response has begun."""
        try:
            await self._answer(endpoint, exchange, receive)
        except Disconnected:
            pass
        except asyncio.CancelledError:
            if not self.state.stopping:
                raise
            await self._refuse(exchange, Unavailable("the server is stopping"), endpoint)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # PyO3 panics derive from BaseException
            if not isinstance(error, MoesaicError):
                log.error("endpoint failed", extra={"id": exchange.http.id, **logs.trace(error)})
            await self._refuse(exchange, error, endpoint)

    async def _answer(self, endpoint: Endpoint, exchange: Exchange, receive: Receive) -> None:
        services, http = self.services, exchange.http
        key = self._authorize(endpoint, http)
        context = RequestContext(services, http, key, Deadline(services.settings.request_seconds))
        self.state.running += not endpoint.worker
        error: BaseException | None = None
        try:
            if endpoint.body is not None:
                context.body = await self._body(endpoint, http, receive)
                if not endpoint.worker:
                    context.count_request()
            await cancel_on_disconnect(self._respond(endpoint, context, exchange.sender), receive)
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.state.running -= not endpoint.worker
            context.close(error)

    def _authorize(self, endpoint: Endpoint, http: HttpRequest) -> Key:
        """Check that a request may use an endpoint now; return the API key that it carries.

        Raises:
            Unauthorized, KeyExhausted: the key is missing or wrong, or too many wrong keys came from this address.
            Forbidden: the endpoint requires another kind of key.
            NotFound: the endpoint is not served on the port by which the request came.
            Unavailable: the server is draining, that is, it accepts no new requests.
        """
        guard, keys = self.services.guard, self.services.keys
        if not endpoint.public:
            guard.check_listener(http.scope, admin=endpoint.admin)
        key = ANONYMOUS if endpoint.public else guard.authenticate(http)
        if endpoint.admin and not key.admin:
            raise Forbidden("this needs an administrator's key: `moesaic keys add NAME --admin` makes one")
        if key.worker != endpoint.worker and not endpoint.public and keys.wanted:
            raise Forbidden(
                "this needs a worker's key" if endpoint.worker else "a worker's key is for workers' routes only"
            )
        if self.state.draining and endpoint.body is not None and not (endpoint.worker or endpoint.admin):
            raise Unavailable("the server is draining and accepts no new requests; try another, or try again later")
        return key

    async def _body(self, endpoint: Endpoint, http: HttpRequest, receive: Receive) -> Any:
        body = await read_body(http.scope, receive, self.services.settings, endpoint.body_bytes)
        if endpoint.decode is not None:
            return await _decoded(endpoint.decode, body, endpoint.body)
        value, unknown = await _decoded(unknown_fields.decode, body, endpoint.body)
        if not endpoint.worker:
            self.services.fields.report(http, endpoint.path, unknown)
        return value

    async def _respond(self, endpoint: Endpoint, context: RequestContext, sender: ResponseSender) -> None:
        try:
            response = await context.deadline.wait(endpoint.run(context))
        finally:
            context.deadline.close()
        if isinstance(response, EventStream):
            broken = response.broken or endpoint.broken
            assert broken is not None, "an endpoint that streams must say how an error in a stream is encoded"
            await sender.stream(response, broken)
        else:
            context.close()  # before the response is sent: the client may send its next request at once
            await sender.whole(response)

    async def _refuse(self, exchange: Exchange, error: BaseException, endpoint: Endpoint | None = None) -> None:
        if exchange.sender.started:
            return
        failure = failure_of(error)
        shape = endpoint.failure if endpoint else self._failure_shape(exchange.http.path)
        headers: dict[str, str] = {}
        if failure.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(failure.retry_after)))
        if isinstance(error, WrongMethod):
            headers["allow"] = error.allowed
        if failure.status == 401:
            headers["www-authenticate"] = "Bearer"
        with contextlib.suppress(Disconnected):
            shown = shape(failure)
            response = shown if isinstance(shown, Response) else Response(shown, failure.status)
            await exchange.sender.whole(replace(response, headers={**response.headers, **headers}))

    def _failure_shape(self, path: str) -> Callable[..., Any]:
        """Return the function that formats an error for a path or method without a route.

        It is ``failure`` of the first endpoint whose path is ``path`` or a parent of it. If there is none, it is
        OpenAI's under ``/v1``, and TGI's elsewhere.
        """
        for endpoint in self.services.endpoints:
            if endpoint.path not in ("/", "/v1") and f"{path}/".startswith(f"{endpoint.path}/"):
                return endpoint.failure
        return openai_failure if path.startswith("/v1") else plain_failure

    def _log(self, exchange: Exchange) -> None:
        http, route = exchange.http, exchange.route
        status = exchange.sender.status or CLIENT_CLOSED_REQUEST
        self.services.metrics.requests.labels(http.method, route, str(status)).inc()
        frequent = route.startswith("/worker/") and status == 200
        log.log(
            logging.DEBUG if frequent else logging.INFO,
            "request",
            extra={
                "id": http.id,
                "method": http.method,
                "path": http.path[:200],
                "status": status,
                "ms": round(1000 * (time.monotonic() - exchange.started), 1),
                "client": http.client,
            },
        )


async def _decoded(decode: Callable[[bytes, Any], Any], body: bytes, kind: Any) -> Any:
    if len(body) > LARGE_BODY_BYTES:
        return await asyncio.to_thread(decode, body, kind)
    return decode(body, kind)


async def _unused(_: Any) -> None:
    """Do nothing. starlette's ``Route`` requires a handler, but the routes are used only to match paths."""


def dialect_endpoints() -> Iterable[Endpoint]:
    """Yield the endpoints of every module in ``serve/dialects``."""
    for name in registry.names("serve/dialects"):
        yield from registry.load("serve/dialects", name).ENDPOINTS
