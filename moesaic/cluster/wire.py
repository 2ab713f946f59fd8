"""Messages between gateways and workers, and the JSON of events, requests and errors in job stores.

Neither side trusts the other: incoming messages are decoded by type, and an invalid message raises InvalidRequest.
docs/reference/worker-protocol.md describes every field. This module does not depend on HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import msgspec

from moesaic import errors
from moesaic.backend import Event, GenerationRequest, ModelInfo, ModelStats
from moesaic.errors import InvalidRequest, MoesaicError

T = TypeVar("T")

_EVENTS = msgspec.json.Decoder(list[Event])
_REQUEST = msgspec.json.Decoder(GenerationRequest)


def pack_events(events: Sequence[Event]) -> bytes:
    """Encode events as JSON, for a job's log."""
    return msgspec.json.encode(events)


def unpack_events(blob: bytes) -> list[Event]:
    """Decode the events of a record in a job's log.

    Raises:
        InvalidRequest: the bytes are not a list of events.
    """
    events: list[Event] = decode(_EVENTS, blob)
    return events


def pack_request(request: GenerationRequest) -> bytes:
    """Encode a request as JSON, for a job's body."""
    return msgspec.json.encode(request)


def unpack_request(body: bytes) -> GenerationRequest:
    """Decode the request in a job's body.

    ``Sampling`` has tuples and integer keys, which JSON does not have; they are restored.

    Raises:
        InvalidRequest: the bytes are not a request.
    """
    request: GenerationRequest = decode(_REQUEST, body)
    sampling = {name: tuple(value) if isinstance(value, list) else value for name, value in request.sampling.items()}
    if isinstance(bias := sampling.get("logit_bias"), Mapping):
        try:
            sampling["logit_bias"] = {int(token_id): value for token_id, value in bias.items()}
        except ValueError:
            raise InvalidRequest("logit_bias: the keys must be token ids") from None
    return replace(request, sampling=sampling)


class EmbedBody(msgspec.Struct, frozen=True):
    """The body of a job that embeds texts or lists of token ids; ``truncate`` is that of ``Backend.embed``."""

    texts: Sequence[str | Sequence[int]]
    truncate: int | None = None


_EMBED = msgspec.json.Decoder(EmbedBody)


def unpack_embed(body: bytes) -> EmbedBody:
    """Decode the texts in the body of a job that embeds them.

    Raises:
        InvalidRequest: the bytes are not an ``EmbedBody``.
    """
    return decode(_EMBED, body)


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error of ``moesaic.errors`` as JSON: its class, message and attributes."""

    type: str
    message: str
    param: str | None = None
    retry_after: float | None = None
    tokens: int | None = None
    """The prompt's number of tokens, in a ``PromptTooLong`` error."""
    limit: int | None = None
    """The maximum number of tokens of a prompt, in a ``PromptTooLong`` error."""


ERROR_ATTRIBUTES = ("param", "retry_after", "tokens", "limit")
"""Attributes of exceptions that ``ErrorInfo`` has under the same names."""


class JobResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """The outcome or the error of an ended job, as the job store keeps it."""

    outcome: Any = None
    error: ErrorInfo | None = None


def error_info(error: BaseException) -> ErrorInfo:
    """Return an error in the form for JSON. An error outside ``moesaic.errors`` is replaced: it may contain secrets."""
    if not isinstance(error, MoesaicError):
        return ErrorInfo("MoesaicError", "internal error of the worker: see its log")
    return ErrorInfo(type(error).__name__, str(error), *(getattr(error, name, None) for name in ERROR_ATTRIBUTES))


def to_error(info: ErrorInfo) -> MoesaicError:
    """Return the exception that ``info`` describes; an unknown type becomes ``MoesaicError``."""
    kind = getattr(errors, info.type, None)
    if not (isinstance(kind, type) and issubclass(kind, MoesaicError)):
        kind = MoesaicError
    error = kind.__new__(kind)  # the constructors of some errors would format the message again
    Exception.__init__(error, info.message)
    for name in ERROR_ATTRIBUTES:
        if (value := getattr(info, name)) is not None:
            setattr(error, name, value)
    return error


# Messages between workers and gateways

Count = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
LeaseClaim = tuple[str, Number]
"""A job's id and its fence."""


class RegisterRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/register``: a worker registers, or registers again after it has lost its connection."""

    name: str
    models: tuple[ModelInfo, ...]
    slots: Count = 1
    about: dict[str, Any] = {}
    leases: tuple[LeaseClaim, ...] = ()
    """Leases that the worker still has from an earlier connection."""
    instance: str = ""
    """Random id of the worker's process."""
    answers_queries: bool = False
    """Whether the worker answers queries, such as tokenizing a prompt."""


class RegisterResponse(msgspec.Struct, frozen=True):
    """Response to ``RegisterRequest``."""

    renew_seconds: float
    """Seconds between two renewals of the worker's leases."""
    lease_seconds: float
    acknowledged: dict[str, tuple[int, int] | None] = {}
    """By job id: the numbers of events that the gateway has received and has on disk; null if the lease is lost."""


class LeaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/lease``: a long poll for jobs, cancellations and queries."""

    name: str
    free_slots: Count = 0
    wait_seconds: float = 20.0


class LeasedJob(msgspec.Struct, frozen=True):
    """A job that the worker must run. If ``log`` has events, the worker continues the answer after them."""

    id: str
    fence: int
    kind: str
    model: str
    body: msgspec.Raw
    log: list[Event] = []


class QueryMessage(msgspec.Struct, frozen=True):
    """A query to a worker, answered by ``POST /worker/answer``."""

    id: str
    kind: str
    model: str
    body: msgspec.Raw


class LeaseResponse(msgspec.Struct, frozen=True):
    """Response to ``LeaseRequest``."""

    leases: list[LeasedJob] = []
    cancel: list[str] = []
    """Ids of jobs that the worker must stop."""
    queries: list[QueryMessage] = []


class RenewRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/renew``: a worker renews its leases and reports its statistics."""

    name: str
    leases: tuple[LeaseClaim, ...] = ()
    stats: dict[str, ModelStats] = {}
    """Engine statistics by model."""


class RenewResponse(msgspec.Struct, frozen=True):
    """Response to ``RenewRequest``."""

    states: dict[str, str] = {}
    """The state of each lease by job id: "ok", "cancelled" or "fenced". The worker must stop the latter two."""


class EventBatch(msgspec.Struct, array_like=True, frozen=True):
    """New events of one job; the first one has number ``start`` in the job's log."""

    id: str
    fence: Number
    start: Number
    events: list[Event]


class EventsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/events``: the new events of all jobs of a worker."""

    name: str
    batches: list[EventBatch]


class EventsResponse(msgspec.Struct, frozen=True):
    """Response to ``EventsRequest``."""

    acknowledged: dict[str, tuple[int, int] | None] = {}
    """By job id: the numbers of events that the gateway has received and has on disk; null if the lease is lost."""


class FinishRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/finish``: the last events of a job, and its outcome or its error. A worker may send it again."""

    name: str
    id: str
    fence: Number
    start: Number = 0
    events: list[Event] = []
    outcome: Any = None
    error: ErrorInfo | None = None


class FinishResponse(msgspec.Struct, frozen=True):
    """Response to ``FinishRequest``."""

    accepted: bool
    """False if the lease is not valid: the job was cancelled or leased again."""


class AnswerRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/answer``: the outcome or the error of the query ``id``."""

    name: str
    id: str
    outcome: Any = None
    error: ErrorInfo | None = None


class ReleaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/release``: a worker gives leases back. With ``unregister``, it also leaves the gateway."""

    name: str
    leases: tuple[LeaseClaim, ...] = ()
    unregister: bool = False


def decode(decoder: msgspec.json.Decoder[T], content: bytes) -> T:
    """Decode the JSON of a message.

    Raises:
        InvalidRequest: the JSON is invalid or does not have the expected type.
    """
    try:
        return decoder.decode(content)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise InvalidRequest(f"invalid message of the worker protocol: {error!s:.200}") from error
