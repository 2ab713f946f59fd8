"""One request on its way to its answer: run, send, and never a failure that looks like success.

Before the first byte is sent, an error is a status; after it, an error event, and the stream is closed
without the mark of a good end. A client that leaves takes its request back. Knows ASGI. Does not know how a
body is read (``reading``) nor what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from moesaic.backend import Backend, Event, GenerationRequest, ResponseStream
from moesaic.errors import InvalidParameter, MoesaicError, Overloaded, Unavailable
from moesaic.serve.keys import Key
from moesaic.serve.metrics import RequestMetrics
from moesaic.serve.settings import Settings

if TYPE_CHECKING:
    from moesaic.serve.app import App
    from moesaic.serve.tracing import Span

T = TypeVar("T")

MAX_IDEMPOTENCY_KEY_CHARS = 255
"""Characters of an idempotency key."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Disconnected(Exception):
    """The client has left."""


@dataclass(frozen=True)
class Failure:
    """An error as a dialect is to show it."""

    status: int
    kind: str
    message: str
    param: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True)
class Response:
    """An answer in one piece: bytes, or what becomes JSON."""

    content: Any
    status: int = 200
    media: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else msgspec.json.encode(self.content)


@dataclass(frozen=True)
class EventStream:
    """An answer as it comes: frames of server-sent events.

    ``broken`` shows an error as an event of this very stream, where its endpoint's cannot.
    """

    frames: AsyncIterator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    broken: Callable[[Failure], bytes] | None = None


AnyResponse = Response | EventStream


@dataclass(frozen=True)
class Endpoint:
    """One route of an API.

    ``failure`` shows an error as this API does (a ``Whole`` where its status differs from ours), ``broken`` as an
    event in a stream that has begun.
    """

    path: str
    run: Callable[[RequestContext], Awaitable[AnyResponse]]
    failure: Callable[[Failure], Any]
    broken: Callable[[Failure], bytes] | None = None
    method: str = "POST"
    body: Any = None
    """The type of the JSON body; None: there is none."""
    public: bool = False
    """Whether it is open to everybody."""
    admin: bool = False
    worker: bool = False
    """Whether it is for a gateway's workers: with a worker's key, outside all shares and bounds of clients."""
    body_bytes: int | None = None
    """The most bytes of its body; None: as the settings say."""
    decode: Callable[[bytes, Any], Any] | None = None
    """Reads the body as a value of that type; None: ``reading.decode`` does, as strictly as for anybody."""
    summary: str = ""
    query: Mapping[str, Any] = field(default_factory=dict)
    """What may stand behind the path's question mark: names and JSON schemas."""
    statuses: Mapping[int, str] = field(default_factory=dict)
    """What it answers with that other routes do not, and what that means."""


@dataclass
class RequestContext:
    """A request that was let in."""

    app: App
    endpoint: Endpoint
    scope: Scope
    key: Key
    id: str
    body: Any = None
    running: list[ResponseStream] = field(default_factory=list)
    spent: int = 0
    """Tokens that it has cost, besides those of what was asked through ``ask``."""
    _watches: list[RequestMetrics] = field(default_factory=list)
    _begun: int = 0

    @property
    def backend(self) -> Backend:
        return self.app.backend

    @property
    def settings(self) -> Settings:
        return self.app.settings

    @property
    def parameters(self) -> Mapping[str, str]:
        """Return the variable parts of the path."""
        found: Mapping[str, str] = self.scope.get("path_params", {})
        return found

    def header(self, name: bytes) -> str | None:
        """Return the first header of that name."""
        return header(self.scope, name)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Ask the door in this client's name; return the events, which are counted and timed as they pass.

        The request is taken in when this returns, and taken back when the exchange ends before it.
        """
        answers, watch = await self._admitted(request)
        return watch.events(answers)

    async def generate_in_batches(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        """Do the same, with all events together that can be had at once: an answer's last token and its end can."""
        answers, watch = await self._admitted(request)
        return watch.batches(answers)

    async def _admitted(self, request: GenerationRequest) -> tuple[ResponseStream, RequestMetrics]:
        # With keys, a client may stand back behind others, but not step in front of them.
        wish = max(0, request.priority) if self.app.keys.wanted and not self.key.admin else request.priority
        request = replace(request, tenant=self.key.name, priority=wish + self.key.priority)
        if once := self.header(b"idempotency-key"):
            if len(once) > MAX_IDEMPOTENCY_KEY_CHARS:
                raise InvalidParameter("Idempotency-Key", f"has more than {MAX_IDEMPOTENCY_KEY_CHARS} characters")
            place = len(self._watches)
            request = replace(request, idempotency_key=f"{once}/{place}" if place else once)
        most = self.settings.concurrent_requests
        if most is not None and self.app.asking >= most:
            raise Overloaded(f"{most} requests are being answered, and no more are taken in")
        if len(self._watches) >= self._begun:  # the first is the request itself, which was counted
            self.begin()
        watch = RequestMetrics(self.app.metrics, self.app.settings, request, self._span(request), self._settle_early)
        self._watches.append(watch)
        self.app.asking += 1
        answers = await watch.admitted(self.backend.generate(request))
        self.running.append(answers)
        if answers.job is not None:
            self.scope["sender"].kept(*answers.job, once=bool(request.idempotency_key))
        return answers, watch

    def _span(self, request: GenerationRequest) -> Span | None:
        tracer = self.app.tracer
        return tracer.begin(request, self.header(b"traceparent"), self.header(b"tracestate")) if tracer else None

    def begin(self) -> None:
        """Count a request against the key's share.

        Raises:
            KeyExhausted: there is nothing left of it.
        """
        self.app.keys.begin(self.key)
        self._begun += 1

    def belongs_to(self, key: Key) -> None:
        """Count the request as this key's, where only its body told whose it is.

        Raises:
            KeyExhausted: there is nothing left of the key's share.
        """
        begun, self._begun = self._begun, 0
        for _ in range(begun):
            self.app.keys.end(self.key, 0)
        self.key = key
        for _ in range(begun):
            self.begin()

    def close(self, error: BaseException | None = None) -> None:
        """Take back what still runs, which ``error`` ended if anything did, and settle with the key."""
        for answers in self.running:
            answers.cancel()
        if isinstance(error, Disconnected | asyncio.CancelledError):
            error = None
        for watch in self._watches:
            self.app.asking -= 1
            watch.close(error)
            self.spent += watch.tokens
        for place in range(self._begun):
            self.app.keys.end(self.key, 0 if place else self.spent)
        self.running.clear()
        self._watches.clear()
        self._begun = self.spent = 0

    def _settle_early(self) -> None:
        """Settle as soon as all has been said: who has heard the end may come again at once."""
        if all(watch.ended for watch in self._watches):
            self.close()


def header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None


def failure_of(error: BaseException) -> Failure:
    """Return how an error is shown; of one that is not in our tree, nothing is told."""
    if not isinstance(error, MoesaicError):
        return Failure(500, "InternalError", "the server made a mistake; its log has more")
    wait = getattr(error, "retry_after", None)
    if wait is None and error.status in (429, 503):
        wait = 1.0
    return Failure(error.status, type(error).__name__, str(error), getattr(error, "param", None), wait)


async def gather_all(work: Sequence[Awaitable[T]]) -> list[T]:
    """Do several things at once and return what they return; the first error ends them all, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_awaited(each)) for each in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _awaited(work: Awaitable[T]) -> T:
    return await work


# Sending


class Sender:
    """Sends one answer. ``started`` says whether a status has gone out."""

    def __init__(self, send: Send, settings: Settings, headers: list[tuple[bytes, bytes]]) -> None:
        self._send, self._settings, self._headers = send, settings, headers
        self.started = False
        self.status = 0
        self._busy = 0  # frames that are being sent
        self._last = 0.0  # when one was

    def kept(self, job: str, known: bool, *, once: bool) -> None:
        """Tell the client under which number its request is kept, and whether it was asked before."""
        self._headers.append((b"x-moesaic-job", job.encode()))
        if once:
            self._headers.append((b"idempotency-replayed", b"true" if known else b"false"))

    async def whole(self, answer: Response) -> None:
        body = answer.body()
        await self._start(answer.status, answer.media, {**answer.headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, answer: EventStream, broken: Callable[[Failure], bytes]) -> None:
        """Send frames as they come; an error before the first is raised, one after it becomes an event."""
        try:
            async with contextlib.aclosing(answer.frames) as frames:  # type: ignore[type-var]
                await self._frames(frames, answer.headers)
        except Exception as error:
            if self.started and not isinstance(error, Disconnected):
                await self._send({"type": "http.response.body", "body": broken(failure_of(error))})
            raise
        except asyncio.CancelledError:  # the client has left, and hears nothing; or the server stops
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1 if self.started else 0):
                    last = broken(failure_of(Unavailable("the server is stopping")))
                    await self._send({"type": "http.response.body", "body": last})
            raise
        if not self.started:  # an answer without a frame
            await self._start(200, "text/event-stream; charset=utf-8", answer.headers)
        await self._send({"type": "http.response.body", "body": b""})

    async def _frames(self, frames: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        sse = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        silence = asyncio.ensure_future(self._fill_silence(sse))
        try:
            async for frame in frames:
                await self._frame(frame, sse)
        finally:
            silence.cancel()

    async def _fill_silence(self, sse: Mapping[str, str]) -> None:
        """Send comments where nothing else is sent, so that proxies do not cut the stream.

        One task for a whole stream: a timer for each frame would cost more than the frame.
        """
        clock, patience = asyncio.get_running_loop().time, self._settings.keep_alive_seconds
        self._last = clock()
        while True:
            quiet = clock() - self._last
            if not self._busy and quiet >= patience:
                await self._frame(b": keep-alive\n\n", sse)
                quiet = 0.0
            await asyncio.sleep(max(0.01, patience - quiet))

    async def _frame(self, frame: bytes, sse: Mapping[str, str]) -> None:
        self._busy += 1
        if not self.started:
            await self._start(200, "text/event-stream; charset=utf-8", sse)
        await self._send({"type": "http.response.body", "body": frame, "more_body": True})
        self._busy -= 1
        self._last = asyncio.get_running_loop().time()

    async def _start(self, status: int, media: str, headers: Mapping[str, str]) -> None:
        self.started, self.status = True, status
        named = [(b"content-type", media.encode())] if media else []
        named += [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": self._headers + named})
