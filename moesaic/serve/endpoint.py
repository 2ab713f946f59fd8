"""An endpoint of an API, the responses that it can return, and the forms in which clients get errors.

This module does not depend on the application or on the context in which an endpoint runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from moesaic.errors import MoesaicError, PromptTooLong

OPENAI_ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "server_error",
}
OPENAI_ERROR_CODES = {
    401: "invalid_api_key",
    404: "model_not_found",
    413: "request_too_large",
    429: "rate_limit_exceeded",
}
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""OpenAI's error code for a prompt that is too long. Clients that get this code shorten the conversation."""


@dataclass(frozen=True)
class Failure:
    """An error as data, from which each API makes an error response in its own form."""

    status: int
    kind: str
    """Name of the error class, such as ``PromptTooLong``."""
    message: str
    param: str | None = None
    """Name of the request parameter that is wrong; None if the error is not about one parameter."""
    retry_after: float | None = None
    """Seconds after which the client may try again; None if there is no such time."""
    tokens: int | None = None
    """Number of tokens of a prompt that is too long; None for other errors."""
    limit: int | None = None
    """Largest number of tokens that a prompt may have, if this one is too long; None for other errors."""

    @property
    def too_long(self) -> bool:
        """Return whether the error is that the prompt is too long (``PromptTooLong``)."""
        return self.kind == PromptTooLong.__name__


@dataclass(frozen=True)
class Response:
    """A complete HTTP response. ``content`` is the body as bytes, or a value that is encoded as JSON."""

    content: Any
    status: int = 200
    media: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """Return the response's body as bytes."""
        return self.content if isinstance(self.content, bytes) else msgspec.json.encode(self.content)


@dataclass(frozen=True)
class EventStream:
    """A response that is streamed as server-sent events. ``frames`` yields the encoded events."""

    frames: AsyncIterator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    broken: Callable[[Failure], bytes] | None = None
    """Encodes an error as the last event of this stream; None: ``Endpoint.broken`` is used."""


AnyResponse = Response | EventStream


@dataclass(frozen=True)
class Endpoint:
    """One route of an API: its path and method, its handler, the type of its body, and the form of its errors."""

    path: str
    """Path of the route. Parameters are in braces, as starlette writes them: ``/v1/jobs/{id}``."""
    run: Callable[[Any], Awaitable[AnyResponse]]
    """The handler: gets the request's ``context.RequestContext`` and returns the response."""
    failure: Callable[[Failure], Any]
    """Formats an error for this API: returns the body's content, or a ``Response`` to use another status as well."""
    broken: Callable[[Failure], bytes] | None = None
    """Encodes an error as the last event of a stream that has begun. Required if the handler returns streams."""
    method: str = "POST"
    body: Any = None
    """Type into which the JSON body is decoded; None: the endpoint reads no body."""
    public: bool = False
    """Whether the endpoint can be used without an API key."""
    admin: bool = False
    """Whether the endpoint requires an administrator's key."""
    worker: bool = False
    """Whether the endpoint requires the key of a gateway's worker. Limits for clients do not apply to it."""
    body_bytes: int | None = None
    """Largest request body in bytes; None: ``Settings.body_bytes`` is the limit."""
    decode: Callable[[bytes, Any], Any] | None = None
    """Decodes the bytes of a body into the type ``body``; None: ``json_body.decode_json``, the strict decoder."""
    summary: str = ""
    query: Mapping[str, Any] = field(default_factory=dict)
    """JSON schemas of the query parameters, by name."""
    statuses: Mapping[int, str] = field(default_factory=dict)
    """Meanings of HTTP statuses on this route, where they differ from other routes, for the OpenAPI description."""


def failure_of(error: BaseException) -> Failure:
    """Return an error as data for clients. An error that is not a ``MoesaicError`` gets status 500 and no details."""
    if not isinstance(error, MoesaicError):
        return Failure(500, "InternalError", "internal server error; the server's log has the details")
    wait = getattr(error, "retry_after", None)
    if wait is None and error.status in (429, 503):
        wait = 1.0
    more = {name: getattr(error, name, None) for name in ("param", "tokens", "limit")}
    return Failure(error.status, type(error).__name__, str(error), retry_after=wait, **more)


def openai_failure(failure: Failure) -> dict[str, Any]:
    """Return the body of an error response in OpenAI's form."""
    default = "server_error" if failure.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": failure.message,
            "type": OPENAI_ERROR_TYPES.get(failure.status, default),
            "param": failure.param,
            "code": CONTEXT_LENGTH_EXCEEDED if failure.too_long else OPENAI_ERROR_CODES.get(failure.status),
        }
    }


def plain_failure(failure: Failure) -> dict[str, Any]:
    """Return the body of an error response in TGI's form: the unchanged message and the name of the error class."""
    return {"error": failure.message, "error_type": failure.kind}
