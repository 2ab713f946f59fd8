"""HTTP as all dialects need it: JSON there and back, and server-sent events as they arrive.

Knows sockets, and what their errors are called here. Does not know what anything that comes means.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from moesaic.bench.endpoints import Failed
from moesaic.client.events import EventParser
from moesaic.errors import BadReply

IDLE = 3.0
"""Seconds after which an idle connection is not used again: common servers close it after five, and a request
that meets the closing would fail through no fault of the server."""
SHOWN = 300
"""Characters of a server's message that are kept."""
UNKNOWN = ("status 404", "status 405", "status 501", "bad reply")
"""What a server says that does not know a question."""

clock = time.perf_counter


class Client:
    """Connections to one server; ``key`` is shown to it on every request."""

    def __init__(self, root: str, session: aiohttp.ClientSession, key: str | None = None) -> None:
        self.root = root
        self.key = key
        self._session = session

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """Return the JSON that stands there.

        Raises:
            Failed: nothing, or something else does.
        """
        with failures():
            async with self._session.get(self.root + path, params=query) as response:
                return await _json(response)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send ``body`` and return the JSON of the reply.

        Raises:
            Failed: see ``get``.
        """
        with failures():
            async with self._session.post(self.root + path, json=body) as response:
                return await _json(response)

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[tuple[float, str], None]:
        """Send ``body`` and yield each server-sent event's data with the time at which its last bytes came.

        Reads to the end, so that the connection can be used again; who leaves early closes it (``aclosing``).

        Raises:
            Failed: refused, cut off, or no events.
        """
        with failures():
            async with self._session.post(self.root + path, json=body) as response:
                await _check(response)
                if response.content_type != "text/event-stream":
                    raise Failed("bad reply", f"{response.content_type} instead of events: {await _message(response)}")
                parser = EventParser()
                while chunk := await response.content.readany():
                    now = clock()
                    for data in parser.feed(chunk):
                        yield now, data
                for data in parser.feed(b"\n\n"):  # some servers end the last event without an empty line
                    yield clock(), data


@asynccontextmanager
async def connect(root: str, key: str | None = None, headers: Mapping[str, str] | None = None) -> AsyncIterator[Client]:
    """Give a client with as many connections as it needs, none of which waits for another."""
    shown = {"Accept-Encoding": "identity"}  # what compresses a stream holds it back
    if key:
        shown["Authorization"] = f"Bearer {key}"
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE)
    timeout = aiohttp.ClientTimeout(total=None)  # whoever asks limits the whole
    async with aiohttp.ClientSession(
        connector=connector, headers=shown | dict(headers or {}), timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        yield Client(root, session, key)


async def knows(client: Client, path: str) -> Any:
    """Return the JSON at ``path``; None if the server does not know it.

    Raises:
        Failed: it cannot be reached, wants a key, or is out of order.
    """
    try:
        return await client.get(path)
    except Failed as failed:
        if failed.kind in UNKNOWN:
            return None
        raise


def decode(data: str) -> dict[str, Any]:
    """Return the JSON object that an event carries.

    Raises:
        Failed: it carries none.
    """
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Failed("bad reply", f"an event that is no JSON object: {_short(data)}")
    return found


def count(value: Any) -> int | None:
    """Return a number of tokens; None if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def said(error: Any) -> str:
    """Return what an error object says, in any of the shapes that servers give it."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("error") or error
        return said(error) if isinstance(error, dict) and "message" in error else _short(str(error))
    return _short(" ".join(map(str, error)) if isinstance(error, list) else str(error))


@contextmanager
def failures() -> Iterator[None]:
    """Turn the library's errors into ours."""
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise Failed("no connection", _short(str(error))) from error
    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, ConnectionError) as error:
        raise Failed("cut stream", _short(str(error))) from error
    except (aiohttp.ClientError, BadReply, ValueError) as error:
        raise Failed("bad reply", _short(f"{type(error).__name__}: {error}")) from error


async def _json(response: aiohttp.ClientResponse) -> Any:
    await _check(response)
    try:
        return json.loads(await response.read())
    except ValueError as error:
        raise Failed("bad reply", f"{response.url.path}: no JSON") from error


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise Failed(f"status {response.status}", await _message(response), response.headers.get("Retry-After"))


async def _message(response: aiohttp.ClientResponse) -> str:
    text = (await response.read()).decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        return _short(text)
    return said(found)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
