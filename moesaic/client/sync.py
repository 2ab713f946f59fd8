"""The client that waits: one call, one answer. Knows httpx's blocking half; decisions are made in the other modules."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from moesaic.client import asking, replies, transport
from moesaic.client.answers import Answer, Embeddings, Model, Piece, Tokens
from moesaic.client.asking import Ask, ChatOptions, CompleteOptions, Messages, Timeouts
from moesaic.client.resuming import Course
from moesaic.client.retrying import Attempts, Retries
from moesaic.errors import ConnectionFailed, MoesaicError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class Client:
    """A server to ask. Threads may share one; it keeps its connections until it is closed.

    ``base_url`` is the server's address, with or without ``/v1``: by default what MOESAIC_BASE_URL says, else this
    machine. ``key`` is the API key, by default MOESAIC_API_KEY. ``model`` is asked where a call names none. ``http``
    is an httpx client of one's own, for proxies and certificates; it is not closed here.

    Every call may raise any of ``moesaic.errors``: what the server says, with its ``status``, ``retry_after`` and
    ``request_id``; ``ConnectionFailed``; ``TimedOut``; ``BadReply`` if something else answered.
    """

    def __init__(
        self,
        base_url: str | None = None,
        key: str | None = None,
        *,
        model: str | None = None,
        timeouts: Timeouts | None = None,
        retries: Retries | None = None,
        headers: Mapping[str, str] | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        httpx = transport.load()
        self._at = asking.address(base_url, key, model, headers)
        self._wire = Wire(http or httpx.Client(limits=transport.limits()), timeouts or Timeouts(), retries or Retries())
        self._own = http is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._wire.http.close()

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Answer: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream: ...

    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Answer | Stream:
        """Answer a conversation, whole, or with ``stream`` as it comes.

        ``options`` are the API's fields; ``extra`` is for those that are not among them.
        """
        fields = asking.chat(messages, options, extra)
        ask = asking.post(self._at, "/v1/chat/completions", fields, stream=stream)
        return Stream(self._wire, ask) if stream else self._wire.answer(ask)

    @overload
    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Answer: ...

    @overload
    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[True],
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Stream: ...

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = False,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Answer | Stream:
        """Go on from a text, or from token ids; as ``chat`` otherwise."""
        fields = asking.complete(prompt, options, extra)
        ask = asking.post(self._at, "/v1/completions", fields, stream=stream)
        return Stream(self._wire, ask) if stream else self._wire.answer(ask)

    def models(self) -> list[Model]:
        """Return the models that can be asked."""
        return self._wire.value(asking.get(self._at, "/v1/models"), replies.models)

    def embed(
        self, texts: str | Sequence[str], *, model: str | None = None, dimensions: int | None = None
    ) -> Embeddings:
        """Return a vector for each text."""
        ask = asking.post(self._at, "/v1/embeddings", asking.embed(texts, model, dimensions))
        return self._wire.value(ask, replies.embeddings)

    def tokenize(self, text: Messages, *, model: str | None = None) -> Tokens:
        """Return the tokens of a text, or of a conversation as the model reads it."""
        return self._wire.value(asking.post(self._at, "/tokenize", asking.tokenize(text, model)), replies.tokens)


class Wire:
    """Sends what is asked, and again where that may help."""

    def __init__(self, http: httpx.Client, timeouts: Timeouts, retries: Retries) -> None:
        self.http, self.timeouts, self.retries = http, timeouts, retries
        self.failures = transport.load().TransportError

    def answer(self, ask: Ask) -> Answer:
        value, headers = self._reply(ask)
        return replace(replies.read(replies.answer, value), request_id=headers.get("x-request-id"))

    def value(self, ask: Ask, reader: Callable[[Any], T]) -> T:
        return replies.read(reader, self._reply(ask)[0])

    def stream(self, ask: Ask) -> httpx.Response:
        """Return a response whose body is still to come.

        Raises:
            MoesaicError: it is an error.
        """
        response = self._send(ask)
        if response.status_code != 200:
            replies.content(response.status_code, response.headers, self._whole(response, ask))
        return response

    def _reply(self, ask: Ask) -> tuple[Any, Mapping[str, str]]:
        attempts = Attempts(self.retries)
        while True:
            try:
                response = self._send(ask)
                body = self._whole(response, ask)
                return replies.content(response.status_code, response.headers, body), response.headers
            except MoesaicError as error:
                wait = attempts.wait_after(error)
            time.sleep(wait)

    def _send(self, ask: Ask) -> httpx.Response:
        request = self.http.build_request(
            ask.method, ask.url, headers=ask.headers, content=ask.body, timeout=transport.waits(self.timeouts)
        )
        try:
            response = self.http.send(request, stream=True, follow_redirects=False)
        except self.failures as error:
            raise transport.lost(error, ask, begun=False) from error
        transport.bear_silence(request, self.timeouts)
        return response

    def _whole(self, response: httpx.Response, ask: Ask) -> bytes:
        try:
            return response.read()
        except self.failures as error:
            raise transport.lost(error, ask, begun=True) from error
        finally:
            response.close()


class Stream:
    """An answer as it comes: iterate over its pieces. It is asked for when that begins, or at the ``with``.

    Leaving the ``with`` before the end, or ``close``, closes the connection, and the server stops computing.
    """

    def __init__(self, wire: Wire, ask: Ask) -> None:
        self._wire, self._ask, self._course = wire, ask, Course()
        self._attempts = Attempts(wire.retries)
        self._response: httpx.Response | None = None
        self._bytes: Iterator[bytes]
        self._closed = False

    def __enter__(self) -> Self:
        try:
            self._connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        try:
            piece = self._next()
        except BaseException:
            self.close()
            raise
        if piece is None:
            raise StopIteration
        return piece

    @property
    def text(self) -> str:
        """What has come so far, of the first answer if there are several."""
        return self._course.text

    @property
    def resumed(self) -> int:
        """How often the connection broke and another one went on."""
        return self._course.resumed

    def answer(self) -> Answer:
        """Return the whole answer; what has not come yet is waited for.

        Raises:
            StreamBroken: the stream was closed before its end, or has failed.
        """
        for _ in self:
            pass
        return self._course.answer()

    def close(self) -> None:
        """Take no more of it."""
        self._closed = True
        self._hang_up()

    def _next(self) -> Piece | None:
        while not self._closed:
            if piece := self._course.take():
                return piece
            if self._course.done:
                self._finish()
            else:
                self._connect()
                self._read()
        return None

    def _hang_up(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def _connect(self) -> None:
        while self._response is None:
            try:
                self._response = self._wire.stream(self._ask)
            except MoesaicError as error:
                wait = self._attempts.wait_after(self._course.failed(error))
                time.sleep(wait)
                continue
            self._course.opened(self._response.headers)
            self._bytes = self._response.iter_bytes()

    def _read(self) -> None:
        try:
            data = next(self._bytes, b"")
        except self._wire.failures as error:
            return self._broke(transport.lost(error, self._ask, begun=True))
        if not data:
            return self._broke(ConnectionFailed("the stream ended before the answer did"))
        if self._course.feed(data):
            self._attempts.progress()

    def _broke(self, cause: MoesaicError) -> None:
        self._hang_up()
        time.sleep(self._attempts.wait_after(self._course.failed(cause)))

    def _finish(self) -> None:
        """Read the end of the response, which leaves its connection to the next request."""
        if self._response is not None:
            with contextlib.suppress(self._wire.failures):
                next(self._bytes, b"")
        self.close()
