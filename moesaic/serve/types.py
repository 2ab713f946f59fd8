"""The ASGI types, and one HTTP request as the application passes it on.

This module imports no other module of ``serve``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Disconnected(Exception):
    """The client closed its connection."""


@dataclass
class HttpRequest:
    """One HTTP request: its ASGI scope, and values from it, such as the client's address."""

    scope: Scope
    id: str
    """The request id: the client's ``X-Request-Id`` if it is well formed, else a random one."""
    client: str
    """IP address of the client. If a trusted proxy sent the request, it is the address that the proxy forwarded."""
    response_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Headers that the response gets, whatever it is. Headers may be appended until the response starts."""
    path_parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Return the HTTP method in upper case, such as ``POST``."""
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        """Return the path of the request's URL, with percent-encoding decoded."""
        return str(self.scope["path"])

    @property
    def query(self) -> dict[str, str]:
        """Return the query parameters by name. If a name is repeated, its last value is returned."""
        parameters = parse_qs(self.scope["query_string"].decode("latin-1"), keep_blank_values=True)
        return {name: values[-1] for name, values in parameters.items()}

    def header(self, name: bytes) -> str | None:
        """Return the request's first header with this name, given in lower case; None if it has none."""
        return header(self.scope, name)


def header(scope: Scope, name: bytes) -> str | None:
    """Return the request's first header with this name, given in lower case; None if it has none."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None
