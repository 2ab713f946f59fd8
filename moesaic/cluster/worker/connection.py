"""A worker's HTTP connection to a gateway.

This module sends messages of the worker protocol and converts refusals to errors. It does not read the messages.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypeVar

import aiohttp
import msgspec

from moesaic.cluster import wire
from moesaic.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    MoesaicError,
    NotFound,
    Overloaded,
    Unauthorized,
    Unavailable,
)

T = TypeVar("T")

TRANSPORT_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)
RETRYABLE_ERRORS = (NotFound, Unavailable, Conflict, Overloaded, *TRANSPORT_ERRORS)
"""Errors after which the worker connects to a gateway again."""
REFUSALS: dict[int, type[MoesaicError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: Overloaded,
}


class GatewayConnection:
    """Sends messages of the worker protocol to the gateway at ``url``, which may change."""

    def __init__(self, key: str | None = None, ssl: Any = True) -> None:
        """Prepare a connection; use it as an asynchronous context manager.

        Args:
            key: the worker's API key.
            ssl: how the gateway's TLS certificate is checked: the parameter ``ssl`` of aiohttp.
        """
        self.url = ""
        """Base URL of the gateway."""
        self._headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        self._ssl = ssl
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> GatewayConnection:
        self._session = aiohttp.ClientSession(headers=self._headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def post(self, route: str, message: Any, kind: type[T], seconds: float) -> T:
        """Post a message to ``/worker/<route>``; return the response, decoded as the type ``kind``.

        Raises:
            Unauthorized, Forbidden, NotFound, Conflict, Overloaded: the gateway refused the message.
            Unavailable: the gateway failed, or the server is not a gateway.
            TRANSPORT_ERRORS: there was no response within ``seconds``.
        """
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=5)
        url = f"{self.url}/worker/{route}"
        body = msgspec.json.encode(message)
        async with self._session.post(url, data=body, timeout=timeout, ssl=self._ssl) as response:
            content = await response.read()
            if response.status != 200:
                raise _refusal(response.status, content)
        try:
            return wire.decode(msgspec.json.Decoder(kind), content)
        except InvalidRequest as error:
            raise Unavailable(f"{url} is not a gateway, or a proxy has changed its response") from error


def _refusal(status: int, content: bytes) -> MoesaicError:
    """Return the error that a response with a status other than 200 reports."""
    try:
        message = str(msgspec.json.decode(content)["error"]["message"])[:300]
    except (msgspec.DecodeError, KeyError, TypeError):
        message = f"the gateway responded with status {status} and without a reason"
    return REFUSALS.get(status, Unavailable if status >= 500 else MoesaicError)(message)
