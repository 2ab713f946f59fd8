"""What gateways, workers and job stores write to each other: events, requests and errors as JSON, and the messages.

Both sides take the other for a stranger: what arrives is decoded by type, and a wrong message is an error of the tree.
docs/cluster.md has the protocol field by field. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, TypeVar

import msgspec

from moesaic import errors
from moesaic.backend import (
    Delta,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    ModelStats,
    PromptDone,
    TokenInfo,
    ToolCall,
)
from moesaic.errors import InvalidRequest, MoesaicError

T = TypeVar("T")

Index = Annotated[int, msgspec.Meta(ge=0, lt=256)]
"""Of an answer among those of a request: what is counted by it must not grow at a worker's will."""

# Events: arrays, since there is one for each token


class _Mark(msgspec.Struct, array_like=True, frozen=True):
    id: int
    text: str
    special: bool = False
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()


class _Call(msgspec.Struct, array_like=True, frozen=True):
    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class _Begun(msgspec.Struct, array_like=True, frozen=True, tag="b"):
    index: Index
    prompt: tuple[_Mark, ...] = ()
    prompt_tokens: int = 0


class _Piece(msgspec.Struct, array_like=True, frozen=True, tag="p"):
    index: Index
    text: str = ""
    tokens: tuple[_Mark, ...] = ()
    calls: tuple[_Call, ...] = ()


class _Ended(msgspec.Struct, array_like=True, frozen=True, tag="e"):
    index: Index
    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0
    stop: str | None = None
    stop_id: int | None = None
    has_tool_calls: bool = False


Wire = _Begun | _Piece | _Ended
_EVENTS = msgspec.json.Decoder(list[Wire])
_ASK = msgspec.json.Decoder(GenerationRequest)


def to_wire(event: Event) -> Wire:
    """Return an event as it is written."""
    if isinstance(event, Delta):
        calls = tuple(_Call(call.index, call.id, call.name, call.arguments) for call in event.calls)
        return _Piece(event.index, event.text, _marks(event.tokens), calls)
    if isinstance(event, PromptDone):
        return _Begun(event.index, _marks(event.prompt), event.prompt_tokens)
    return _Ended(*(getattr(event, field.name) for field in fields(event)))


def _marks(marks: Sequence[TokenInfo]) -> tuple[_Mark, ...]:
    return tuple(_Mark(mark.id, mark.text, mark.special, mark.logprob, mark.top) for mark in marks)


def from_wire(wire: Wire) -> Event:
    """Return the event that was written."""
    if isinstance(wire, _Piece):
        calls = tuple(ToolCall(call.index, call.id, call.name, call.arguments) for call in wire.calls)
        return Delta(wire.index, wire.text, _unmarked(wire.tokens), calls)
    if isinstance(wire, _Begun):
        return PromptDone(wire.index, _unmarked(wire.prompt), wire.prompt_tokens)
    return Finished(*(getattr(wire, name) for name in wire.__struct_fields__))


def _unmarked(marks: Sequence[_Mark]) -> tuple[TokenInfo, ...]:
    return tuple(TokenInfo(mark.id, mark.text, mark.special, mark.logprob, mark.top) for mark in marks)


def pack_events(events: Sequence[Event]) -> bytes:
    """Return events as a job's log has them."""
    return msgspec.json.encode([to_wire(event) for event in events])


def unpack_events(blob: bytes) -> list[Event]:
    """Return the events of a part of a log."""
    return [from_wire(wire) for wire in decoded(_EVENTS, blob)]


# What is asked


def pack_ask(request: GenerationRequest) -> bytes:
    """Return a request as a job's body has it."""
    return msgspec.json.encode(request)


def unpack_ask(body: bytes) -> GenerationRequest:
    """Return the request in a job's body.

    JSON knows neither tuples nor numbers as keys, which ``Sampling`` is made of: they are made again.
    """
    request: GenerationRequest = decoded(_ASK, body)
    sampling = {name: tuple(value) if isinstance(value, list) else value for name, value in request.sampling.items()}
    if isinstance(bias := sampling.get("logit_bias"), Mapping):
        try:
            sampling["logit_bias"] = {int(id): value for id, value in bias.items()}
        except ValueError:
            raise InvalidRequest("logit_bias: its keys are no token ids") from None
    return replace(request, sampling=sampling)


# How it ended


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error of the tree as it is written."""

    type: str
    message: str
    param: str | None = None
    retry_after: float | None = None


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an ended job leaves besides its log: what was asked for, or an error."""

    outcome: Any = None
    error: Fault | None = None


def fault(error: BaseException) -> Fault:
    """Return how an error is written; of one that is not in the tree nothing is told."""
    if not isinstance(error, MoesaicError):
        return Fault("MoesaicError", "the worker made a mistake; its log has more")
    return Fault(type(error).__name__, str(error), getattr(error, "param", None), getattr(error, "retry_after", None))


def error_of(fault: Fault) -> MoesaicError:
    """Return the error that was written; an unknown kind is the root of the tree."""
    kind = getattr(errors, fault.type, None)
    if not (isinstance(kind, type) and issubclass(kind, MoesaicError)):
        kind = MoesaicError
    error = kind.__new__(kind)  # their own constructors make the message, which is there already
    Exception.__init__(error, fault.message)
    for name in ("param", "retry_after"):
        if (value := getattr(fault, name)) is not None:
            setattr(error, name, value)
    return error


# Messages between workers and gateways

Count = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Claim = tuple[str, Number]
"""A job's id and the fence."""


class Enlist(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/enlist``: a worker offers itself; also again, after a gateway has forgotten it."""

    name: str
    cards: tuple[ModelInfo, ...]
    slots: Count = 1
    about: dict[str, Any] = {}
    holds: tuple[Claim, ...] = ()
    run: str = ""
    """Another in each process, so that one that lost its connection is told from one that was started again."""


class Enlisted(msgspec.Struct, frozen=True):
    """Its answer: the gateway's pace, and of each lease how many events are known and on disk; null: it is lost."""

    renew_seconds: float
    lease_seconds: float
    known: dict[str, tuple[int, int] | None] = {}


class Want(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/lease``: answered when there is something to do or to stop, or after ``wait`` seconds."""

    name: str
    free: Count = 0
    wait: float = 20.0


class Leased(msgspec.Struct, frozen=True):
    """A job to do: its log's events are those that need not be sent again."""

    id: str
    fence: int
    kind: str
    model: str
    body: msgspec.Raw
    log: list[Wire] = []


class Given(msgspec.Struct, frozen=True):
    """Answer to ``Want``."""

    leases: list[Leased] = []
    stop: list[str] = []


class Renew(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/renew``."""

    name: str
    holds: tuple[Claim, ...] = ()
    load: dict[str, ModelStats] = {}


class Renewed(msgspec.Struct, frozen=True):
    """Of each lease "ok", "cancelled" or "fenced"; the last two: stop it."""

    held: dict[str, str] = {}


class Part(msgspec.Struct, array_like=True, frozen=True):
    """Events of one job, from number ``start`` of its log on."""

    id: str
    fence: Number
    start: Number
    events: list[Wire]


class Tokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/tokens``: what came in the last moment, of all jobs."""

    name: str
    parts: list[Part]


class Known(msgspec.Struct, frozen=True):
    """Of each job how many events are known and on disk; null: the lease is lost."""

    known: dict[str, tuple[int, int] | None] = {}


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/done``: the last events of a job, or what was asked for, or an error. May be sent again."""

    name: str
    id: str
    fence: Number
    start: Number = 0
    events: list[Wire] = []
    outcome: Any = None
    error: Fault | None = None


class Counted(msgspec.Struct, frozen=True):
    """Whether it counted; false: the job is somebody else's, or was cancelled."""

    counted: bool


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /worker/release``: leases are given back; with ``leave`` the worker goes."""

    name: str
    holds: tuple[Claim, ...] = ()
    leave: bool = False


def decoded(decoder: msgspec.json.Decoder[T], given: bytes) -> T:
    """Decode a message.

    Raises:
        InvalidRequest: it is not what was expected.
    """
    try:
        return decoder.decode(given)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise InvalidRequest(f"a message of the worker protocol is not understood: {error!s:.200}") from error
