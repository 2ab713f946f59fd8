"""An endpoint of an API, the responses it can return, and how errors are shown.

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
"""OpenAI's code of a prompt that is too long. Clients shorten the conversation when they read it."""


@dataclass(frozen=True)
class Failure:
    """An error in the form that every API can show."""

    status: int
    kind: str
    """Name of the error class."""
    message: str
    param: str | None = None
    """The parameter at fault, if there is one."""
    retry_after: float | None = None
    """Seconds after which the client may try again."""
    tokens: int | None = None
    """Of a prompt that is too long: its number of tokens."""
    limit: int | None = None
    """Of a prompt that is too long: the most tokens that it may have."""

    @property
    def too_long(self) -> bool:
        """Return whether the prompt is too long."""
        return self.kind == PromptTooLong.__name__


@dataclass(frozen=True)
class Response:
    """A complete response. ``content`` is bytes, or a value that is encoded as JSON."""

    content: Any
    status: int = 200
    media: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """Return the body as bytes."""
        return self.content if isinstance(self.content, bytes) else msgspec.json.encode(self.content)


@dataclass(frozen=True)
class EventStream:
    """A response that is streamed as server-sent events."""

    frames: AsyncIterator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    broken: Callable[[Failure], bytes] | None = None
    """Encodes an error as an event of this stream; None: the endpoint's ``broken`` does."""


AnyResponse = Response | EventStream


@dataclass(frozen=True)
class Endpoint:
    """One route of an API."""

    path: str
    """The path, with parameters as starlette writes them: ``/v1/jobs/{id}``."""
    run: Callable[[Any], Awaitable[AnyResponse]]
    """The handler. Its argument is a ``context.RequestContext``."""
    failure: Callable[[Failure], Any]
    """Returns an error as this API shows it: content, or a ``Response`` if the status differs from the error's."""
    broken: Callable[[Failure], bytes] | None = None
    """Encodes an error as an event in a stream that has begun. Required for endpoints that stream."""
    method: str = "POST"
    body: Any = None
    """Type of the JSON body; None: the endpoint reads no body."""
    public: bool = False
    """Whether the endpoint is open without a key."""
    admin: bool = False
    """Whether the endpoint requires an administrator's key."""
    worker: bool = False
    """Whether the endpoint requires a worker's key. Clients' rate limits and bounds do not apply to it."""
    body_bytes: int | None = None
    """Largest body in bytes; None: ``Settings.body_bytes``."""
    decode: Callable[[bytes, Any], Any] | None = None
    """Decodes the body into its type; None: ``json_body.decode_json``, the strict decoder."""
    summary: str = ""
    query: Mapping[str, Any] = field(default_factory=dict)
    """JSON schemas of the query parameters, by name."""
    statuses: Mapping[int, str] = field(default_factory=dict)
    """Statuses that other routes do not return, and their meaning, for the OpenAPI description."""


def failure_of(error: BaseException) -> Failure:
    """Return how an error is shown. Errors outside our tree are shown as a bare internal error."""
    if not isinstance(error, MoesaicError):
        return Failure(500, "InternalError", "internal server error; the server's log has the details")
    wait = getattr(error, "retry_after", None)
    if wait is None and error.status in (429, 503):
        wait = 1.0
    more = {name: getattr(error, name, None) for name in ("param", "tokens", "limit")}
    return Failure(error.status, type(error).__name__, str(error), retry_after=wait, **more)


def openai_failure(failure: Failure) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
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
    """Return an error as TGI's routes show it, without a prefix or a status of its own."""
    return {"error": failure.message, "error_type": failure.kind}
