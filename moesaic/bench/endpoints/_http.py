"""HTTP client for all dialects: JSON requests, and server-sent events with their arrival times.

This module maps network errors to kinds of failures. It does not know the meaning of what a server sends.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from moesaic.bench.endpoints._failure import RequestFailed
from moesaic.client.events import EventParser
from moesaic.errors import BadReply

KEEPALIVE_SECONDS = 3.0
"""Idle time after which a connection is not reused. Common servers close idle connections after five seconds, and a
request on a connection that is being closed would fail through no fault of the server."""
MAX_MESSAGE_CHARACTERS = 300
"""Length to which messages of a server are cut."""
UNKNOWN_ROUTE = ("status 404", "status 405", "status 501", "bad reply")
"""Kinds of ``RequestFailed`` that mean that a server does not have the requested route."""

clock = time.perf_counter


class Client:
    """Connections to one server, with the API key in every request."""

    def __init__(self, root: str, session: aiohttp.ClientSession, key: str | None = None) -> None:
        self.root = root
        self.key = key
        self._session = session

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """Send GET and return the decoded JSON.

        Raises:
            RequestFailed: the request failed or the response is not JSON.
        """
        with translate_errors():
            async with self._session.get(self.root + path, params=query) as response:
                return await _json(response)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send ``body`` with POST and return the decoded JSON of the response.

        Raises:
            RequestFailed: the request failed or the response is not JSON.
        """
        with translate_errors():
            async with self._session.post(self.root + path, json=body) as response:
                return await _json(response)

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[tuple[float, str], None]:
        """Send ``body`` with POST and yield the data of each server-sent event with the arrival time of its last bytes.

        The response is read to its end, so that the connection can be reused. A caller that stops early must close
        the generator (``aclosing``).

        Raises:
            RequestFailed: the request failed, the stream was cut off, or the response has no events.
        """
        with translate_errors():
            async with self._session.post(self.root + path, json=body) as response:
                await _check(response)
                if response.content_type != "text/event-stream":
                    message = (
                        f"the response is {response.content_type}, not server-sent events: {await _message(response)}"
                    )
                    raise RequestFailed("bad reply", message)
                parser = EventParser()
                while chunk := await response.content.readany():
                    now = clock()
                    for data in parser.feed(chunk):
                        yield now, data
                for data in parser.feed(b"\n\n"):  # some servers end the last event without an empty line
                    yield clock(), data


@asynccontextmanager
async def connect(root: str, key: str | None = None, headers: Mapping[str, str] | None = None) -> AsyncIterator[Client]:
    """Return a context with a client that has no limit on connections, so that no request waits for another.

    ``root`` is the server's address without a route.
    """
    common = {"Accept-Encoding": "identity"}  # compression would delay the events of a stream
    if key:
        common["Authorization"] = f"Bearer {key}"
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=None)  # the caller limits the time of a whole request
    async with aiohttp.ClientSession(
        connector=connector, headers=common | dict(headers or {}), timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        yield Client(root, session, key)


async def get_if_known(client: Client, path: str) -> Any:
    """Return the JSON at ``path``; None if the server does not have this route.

    Raises:
        RequestFailed: the server cannot be reached, requires a key, or has an internal error.
    """
    try:
        return await client.get(path)
    except RequestFailed as failed:
        if failed.kind in UNKNOWN_ROUTE:
            return None
        raise


def decode(data: str) -> dict[str, Any]:
    """Return the JSON object in the data of an event.

    Raises:
        RequestFailed: the data is not a JSON object.
    """
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise RequestFailed("bad reply", f"the stream has an event that is not a JSON object: {_short(data)}")
    return content


def count(value: Any) -> int | None:
    """Return ``value`` if it is a non-negative integer, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def error_message(error: Any) -> str:
    """Return the message of an error object, in any of the shapes that servers use."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("error") or error
        return error_message(error) if isinstance(error, dict) and "message" in error else _short(str(error))
    return _short(" ".join(map(str, error)) if isinstance(error, list) else str(error))


@contextmanager
def translate_errors() -> Iterator[None]:
    """Return a context in which aiohttp's errors are raised as RequestFailed."""
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise RequestFailed("no connection", _short(str(error))) from error
    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, ConnectionError) as error:
        raise RequestFailed("cut stream", _short(str(error))) from error
    except (aiohttp.ClientError, BadReply, ValueError) as error:
        raise RequestFailed("bad reply", _short(f"{type(error).__name__}: {error}")) from error


async def _json(response: aiohttp.ClientResponse) -> Any:
    await _check(response)
    try:
        return json.loads(await response.read())
    except ValueError as error:
        raise RequestFailed("bad reply", f"{response.url.path}: the response is not JSON") from error


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        message = await _message(response)
        raise RequestFailed(f"status {response.status}", message, response.headers.get("Retry-After"))


async def _message(response: aiohttp.ClientResponse) -> str:
    text = (await response.read()).decode(errors="replace")
    try:
        content = json.loads(text)
    except ValueError:
        return _short(text)
    return error_message(content)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else line[: MAX_MESSAGE_CHARACTERS - 1] + "…"
