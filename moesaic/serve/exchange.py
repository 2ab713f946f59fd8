"""One request from its bytes to its answer: read, decode, run, send, and never a failure that looks like success.

Before the first byte is sent, an error is a status; after it, an error event, and the stream is closed
without the mark of a good end. A client that leaves takes its request back; one that takes nothing of its
answer for a minute is given up. Knows ASGI and JSON. Does not know what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from moesaic.door import Answers, Ask, Door, Event
from moesaic.errors import InvalidParameter, InvalidRequest, MoesaicError, TooLarge
from moesaic.serve.keys import Key
from moesaic.serve.settings import Settings
from moesaic.serve.watch import Watch

if TYPE_CHECKING:
    from moesaic.serve.app import App

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

EXACT = 2**53
"""Below this a float is as exact as a whole number."""
DEPTH = 32
"""How deep JSON may be nested."""


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
class Whole:
    """An answer in one piece: bytes, or what becomes JSON."""

    content: Any
    status: int = 200
    media: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else msgspec.json.encode(self.content)


@dataclass(frozen=True)
class Streamed:
    """An answer as it comes: frames of server-sent events.

    ``broken`` shows an error as an event of this very stream, where its endpoint's cannot.
    """

    frames: AsyncIterator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    broken: Callable[[Failure], bytes] | None = None


Answer = Whole | Streamed


@dataclass(frozen=True)
class Endpoint:
    """One route of an API.

    ``failure`` shows an error as this API does, ``broken`` as an event in a stream that has begun.
    """

    path: str
    run: Callable[[Call], Awaitable[Answer]]
    failure: Callable[[Failure], Any]
    broken: Callable[[Failure], bytes] | None = None
    method: str = "POST"
    body: Any = None
    """The type of the JSON body; None: there is none."""
    public: bool = False
    """Whether it is open to everybody."""
    admin: bool = False
    summary: str = ""
    query: Mapping[str, Any] = field(default_factory=dict)
    """What may stand behind the path's question mark: names and JSON schemas."""


@dataclass
class Call:
    """A request that was let in."""

    app: App
    endpoint: Endpoint
    scope: Scope
    key: Key
    id: str
    body: Any = None
    running: list[tuple[Answers, Watch]] = field(default_factory=list)

    @property
    def door(self) -> Door:
        return self.app.door

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

    async def ask(self, ask: Ask) -> AsyncIterator[Event]:
        """Ask the door in this client's name; return the events, which are counted and timed as they pass.

        The request is taken in when this returns, and taken back when the exchange ends before it.
        """
        ask = replace(ask, tenant=self.key.name, priority=ask.priority + self.key.priority)
        keys = self.app.keys
        keys.begin(self.key)
        watch = Watch(self.app.metrics, self.app.settings, ask, self.app.tracer)
        try:
            answers = await watch.admitted(self.door.ask(ask))
        except BaseException:
            keys.end(self.key, 0)
            raise
        self.running.append((answers, watch))
        return watch.events(answers)

    def close(self) -> None:
        """Take back what still runs, and settle with the key."""
        for answers, watch in self.running:
            answers.cancel()
            watch.close()
            self.app.keys.end(self.key, watch.tokens)
        self.running.clear()


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


# Reading


async def read_body(scope: Scope, receive: Receive, settings: Settings) -> bytes:
    """Return the body of a request.

    Raises:
        TooLarge, InvalidRequest: it is too long, is compressed, or did not come in time.
        Disconnected: the client left first.
    """
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > settings.body_bytes:
        raise TooLarge(f"the body has {length} bytes, at most {settings.body_bytes} are taken")
    if (header(scope, b"content-encoding") or "identity") != "identity":
        raise InvalidRequest("compressed bodies are not taken")
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                if len(body) > settings.body_bytes:
                    raise TooLarge(f"the body has more than {settings.body_bytes} bytes")
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise InvalidRequest(f"the body did not come within {settings.body_seconds:g} s") from None


def decode(body: bytes, kind: Any) -> Any:
    """Return JSON as a value of a type, strictly: no NaN, no infinity, no key twice, no abyss of brackets.

    A whole number may be written as one with a fraction of nothing: JSON knows no difference.

    Raises:
        InvalidRequest, InvalidParameter: it is not that; a parameter is named where one is at fault.
    """
    try:
        text = body.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_number, parse_constant=_no_constant)
        _shallow(value)
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None
    except RecursionError:
        raise InvalidRequest(f"the body is nested deeper than {DEPTH}") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _number(written: str) -> float:
    value = float(written)
    if math.isinf(value):
        raise ValueError(f"{written:.40} is too large a number")
    return int(value) if value.is_integer() and abs(value) < EXACT else value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise RecursionError


def _misfit(message: str) -> InvalidRequest:
    found = re.fullmatch(r"(.*) - at `\$\.?(.*?)`", message, re.S)
    if found and found[2]:
        return InvalidParameter(found[2], found[1])
    if missing := re.fullmatch(r"Object missing required field `(.*?)`.*", message):
        return InvalidParameter(missing[1], "is missing")
    return InvalidRequest(found[1] if found else message)


# Sending


class Sender:
    """Sends one answer. ``started`` says whether a status has gone out."""

    def __init__(self, send: Send, settings: Settings, headers: list[tuple[bytes, bytes]]) -> None:
        self._send, self._settings, self._headers = send, settings, headers
        self.started = False
        self.status = 0
        self._busy = 0  # frames that are being sent
        self._last = 0.0  # when one was
        self._stuck = False

    async def whole(self, answer: Whole) -> None:
        body = answer.body()
        await self._start(answer.status, answer.media, {**answer.headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, answer: Streamed, broken: Callable[[Failure], bytes]) -> None:
        """Send frames as they come; an error before the first is raised, one after it becomes an event."""
        try:
            async with contextlib.aclosing(answer.frames) as frames:  # type: ignore[type-var]
                await self._frames(frames, answer.headers)
        except Exception as error:
            if self.started and not isinstance(error, Disconnected):
                await self._send({"type": "http.response.body", "body": broken(failure_of(error))})
            raise
        if not self.started:  # an answer without a frame
            await self._start(200, "text/event-stream; charset=utf-8", answer.headers)
        await self._send({"type": "http.response.body", "body": b""})

    async def _frames(self, frames: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        sse = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        this = asyncio.current_task()
        assert this is not None
        watchdog = asyncio.ensure_future(self._watch_over(this, sse))
        try:
            async for frame in frames:
                await self._frame(frame, sse)
        except asyncio.CancelledError:
            if self._stuck:
                this.uncancel()
                raise Disconnected from None
            raise
        finally:
            watchdog.cancel()

    async def _watch_over(self, sending: asyncio.Task[Any], sse: Mapping[str, str]) -> None:
        """Fill silences with comments, and give up a reader who takes nothing.

        One task for a whole stream: a timer for each frame would cost more than the frame.
        """
        clock, settings = asyncio.get_running_loop().time, self._settings
        self._last = clock()
        while True:
            quiet = clock() - self._last
            if self._busy and quiet >= settings.reader_seconds:
                self._stuck = True
                sending.cancel()
                return
            if not self._busy and quiet >= settings.keep_alive_seconds:
                await self._frame(b": keep-alive\n\n", sse)
                quiet = 0.0
            bound = settings.reader_seconds if self._busy else settings.keep_alive_seconds
            await asyncio.sleep(max(0.01, bound - quiet))

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
