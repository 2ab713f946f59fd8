"""Client for asyncio: sends requests over httpx and returns answers.

``tools/generate_sync_client.py`` generates ``sync`` from this file. Retries, parsing and resumption are decided in the
other modules of this package.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from moesaic.client import requests, responses, transport
from moesaic.client.answers import Answer, Embeddings, Model, Piece, Tokens
from moesaic.client.requests import ChatOptions, CompleteOptions, Messages, Request, Timeouts
from moesaic.client.resume import ResumableStream
from moesaic.client.retry import Attempts, Retries
from moesaic.errors import ConnectionFailed, MoesaicError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class AsyncClient:
    """Connection pool to one server. Use a client in one event loop, and close it after use.

    ``base_url`` is the server's address, with or without ``/v1``; the default is MOESAIC_BASE_URL, else
    http://127.0.0.1:8000. ``key`` is the API key; the default is MOESAIC_API_KEY. ``model`` is the model of calls that
    name none. ``headers`` are added to every request. ``http`` is an httpx client of your own, for example with a
    proxy; this class does not close it.

    Every call may raise any error of ``moesaic.errors``: the server's errors, with ``status``, ``retry_after`` and
    ``request_id``; ``ConnectionFailed``; ``TimedOut``; and ``BadReply`` for an invalid response.
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
        http: httpx.AsyncClient | None = None,
    ) -> None:
        httpx = transport.import_httpx()
        self._server = requests.server_config(base_url, key, model, headers)
        self._owns_http = http is None
        http = http or httpx.AsyncClient(limits=transport.connection_limits())
        self._sender = AsyncSender(http, timeouts or Timeouts(), retries or Retries())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, but not those of an httpx client that was passed as ``http``."""
        if self._owns_http:
            await self._sender.http.aclose()

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Coroutine[Any, Any, Answer]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream: ...

    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Coroutine[Any, Any, Answer] | AsyncStream:
        """Return the answer to a conversation. With ``stream``, return an iterator over its pieces as they arrive.

        ``messages`` is a list of messages, or the text of one user message. ``options`` are fields of the API's
        request; ``extra`` adds fields that ``ChatOptions`` does not list.
        """
        fields = requests.chat_fields(messages, options, extra)
        request = requests.post(self._server, "/v1/chat/completions", fields, stream=stream)
        return AsyncStream(self._sender, request) if stream else self._sender.answer(request)

    @overload
    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Coroutine[Any, Any, Answer]: ...

    @overload
    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[True],
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[CompleteOptions],
    ) -> AsyncStream: ...

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = False,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Coroutine[Any, Any, Answer] | AsyncStream:
        """Return the continuation of a text or of token ids. With ``stream``, return an iterator over its pieces.

        ``options`` are fields of the API's request; ``extra`` adds fields that ``CompleteOptions`` does not list.
        """
        fields = requests.completion_fields(prompt, options, extra)
        request = requests.post(self._server, "/v1/completions", fields, stream=stream)
        return AsyncStream(self._sender, request) if stream else self._sender.answer(request)

    async def models(self) -> list[Model]:
        """Return the models that the server offers."""
        return await self._sender.value(requests.get(self._server, "/v1/models"), responses.parse_models)

    async def embed(
        self, texts: str | Sequence[str], *, model: str | None = None, dimensions: int | None = None
    ) -> Embeddings:
        """Return one embedding vector for each text. ``dimensions`` requests their length; not every server can."""
        fields = requests.embedding_fields(texts, model, dimensions)
        request = requests.post(self._server, "/v1/embeddings", fields)
        return await self._sender.value(request, responses.parse_embeddings)

    async def tokenize(self, text: Messages, *, model: str | None = None) -> Tokens:
        """Return the tokens of a text, or of a conversation in the model's chat format."""
        request = requests.post(self._server, "/tokenize", requests.tokenize_fields(text, model))
        return await self._sender.value(request, responses.parse_tokens)


class AsyncSender:
    """Sends requests to the server, and repeats them after transient errors."""

    def __init__(self, http: httpx.AsyncClient, timeouts: Timeouts, retries: Retries) -> None:
        self.http, self.timeouts, self.retries = http, timeouts, retries
        self.transport_errors = transport.import_httpx().TransportError

    async def answer(self, request: Request) -> Answer:
        """Send a request for a chat or text completion, and return the answer."""
        content, headers = await self._exchange(request)
        answer = responses.parse(responses.parse_answer, content)
        return replace(answer, request_id=headers.get("x-request-id"))

    async def value(self, request: Request, parser: Callable[[Any], T]) -> T:
        """Send a request; return the result of ``parser``, called with the JSON of the response."""
        content, _ = await self._exchange(request)
        return responses.parse(parser, content)

    async def open_stream(self, request: Request) -> httpx.Response:
        """Send a request once; return the response when its headers have arrived, with the body unread.

        Raises:
            MoesaicError: the request failed, or the status is an error.
        """
        response = await self._send(request)
        if response.status_code != 200:
            responses.parse_body(response.status_code, response.headers, await self._read_body(response, request))
        return response

    async def _exchange(self, request: Request) -> tuple[Any, Mapping[str, str]]:
        attempts = Attempts(self.retries)
        while True:
            try:
                response = await self._send(request)
                body = await self._read_body(response, request)
                return responses.parse_body(response.status_code, response.headers, body), response.headers
            except MoesaicError as error:
                wait = attempts.wait_after(error)
            await asyncio.sleep(wait)

    async def _send(self, request: Request) -> httpx.Response:
        timeout = transport.first_byte_timeout(self.timeouts)
        prepared = self.http.build_request(
            request.method, request.url, headers=request.headers, content=request.body, timeout=timeout
        )
        try:
            response = await self.http.send(prepared, stream=True, follow_redirects=False)
        except self.transport_errors as error:
            raise transport.connection_error(error, request, begun=False) from error
        transport.use_silence_timeout(prepared, self.timeouts)
        return response

    async def _read_body(self, response: httpx.Response, request: Request) -> bytes:
        try:
            return await response.aread()
        except self.transport_errors as error:
            raise transport.connection_error(error, request, begun=True) from error
        finally:
            await response.aclose()


class AsyncStream:
    """Iterator over the pieces of an answer. The request is sent when iteration or the ``with`` block begins.

    If the ``with`` block ends early, or after ``close``, the connection is closed and the server stops computing.
    """

    def __init__(self, sender: AsyncSender, request: Request) -> None:
        self._sender, self._request, self._stream = sender, request, ResumableStream()
        self._attempts = Attempts(sender.retries)
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes]
        self._closed = False

    async def __aenter__(self) -> Self:
        try:
            await self._connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        try:
            piece = await self._next_piece()
        except BaseException:
            await self.close()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    @property
    def text(self) -> str:
        """The text of the first answer, as received until now."""
        return self._stream.text

    @property
    def resumed(self) -> int:
        """Number of times that the connection broke and a new one continued the answer."""
        return self._stream.resumed

    async def answer(self) -> Answer:
        """Read the stream to its end and return the complete answer.

        Raises:
            StreamBroken: the stream was closed early, or has failed.
        """
        async for _ in self:
            pass
        return self._stream.answer()

    async def close(self) -> None:
        """Stop reading and close the connection."""
        self._closed = True
        await self._disconnect()

    async def _next_piece(self) -> Piece | None:
        while not self._closed:
            if piece := self._stream.take():
                return piece
            if self._stream.done:
                await self._finish()
            else:
                await self._connect()
                await self._read()
        return None

    async def _disconnect(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            await response.aclose()

    async def _connect(self) -> None:
        while self._response is None:
            try:
                self._response = await self._sender.open_stream(self._request)
            except MoesaicError as error:
                wait = self._attempts.wait_after(self._stream.failure(error))
                await asyncio.sleep(wait)
                continue
            self._stream.start_connection(self._response.headers)
            self._chunks = self._response.aiter_bytes()

    async def _read(self) -> None:
        try:
            chunk = await anext(self._chunks, b"")
        except self._sender.transport_errors as error:
            return await self._reconnect_after(transport.connection_error(error, self._request, begun=True))
        if not chunk:
            return await self._reconnect_after(ConnectionFailed("the stream ended before the answer was complete"))
        if self._stream.feed(chunk):
            self._attempts.progress()

    async def _reconnect_after(self, cause: MoesaicError) -> None:
        await self._disconnect()
        await asyncio.sleep(self._attempts.wait_after(self._stream.failure(cause)))

    async def _finish(self) -> None:
        """Read the end of the response, so that the next request can reuse the connection."""
        if self._response is not None:
            with contextlib.suppress(self._sender.transport_errors):
                await anext(self._chunks, b"")
        await self.close()
