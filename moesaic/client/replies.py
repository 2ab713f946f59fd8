"""What a server says, read: answers, pieces of answers, and errors, which become those of ``moesaic.errors``.

Knows the API's JSON. Does not know connections.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from moesaic import errors
from moesaic.client.answers import (
    Answer,
    CallPiece,
    Embeddings,
    Model,
    Piece,
    TokenLogprob,
    Tokens,
    ToolCall,
    Usage,
)
from moesaic.errors import BadReply, MoesaicError

T = TypeVar("T")

BY_STATUS: Mapping[int, type[MoesaicError]] = {
    400: errors.InvalidRequest,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    408: errors.TimedOut,
    413: errors.TooLarge,
    415: errors.WrongMedia,
    429: errors.Overloaded,
    499: errors.Cancelled,
    501: errors.NotInstalled,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.TimedOut,
}
NAMED = {
    kind.__name__: kind
    for kind in (*BY_STATUS.values(), errors.InvalidMessages, errors.GrammarError, errors.NumericalError)
} | {"EngineStopped": errors.EngineStopped}
"""Errors that a reply may name outright."""


# Errors


def failure(status: int, headers: Mapping[str, str], body: bytes) -> MoesaicError:
    """Return the error that a reply stands for."""
    try:
        shown = json.loads(body)
    except ValueError:
        shown = None
    error = _error(status, shown)
    error.retry_after = retry_after(headers.get("retry-after"))
    error.request_id = headers.get("x-request-id")
    return error


def _error(status: int, shown: Any) -> MoesaicError:
    """Return an error of our tree for one in JSON, in OpenAI's form or in TGI's."""
    told = shown.get("error") if isinstance(shown, dict) else None
    if isinstance(told, str):
        told = {"message": told, "type": shown.get("error_type")}
    if not isinstance(told, dict):
        told = {}
    message = str(told.get("message") or f"the server answered with status {status}")
    kind = NAMED.get(str(told.get("type"))) or BY_STATUS.get(status)
    param = told.get("param")
    error: MoesaicError
    if isinstance(param, str) and status == 400:
        error = errors.InvalidParameter(param, message.removeprefix(f"{param}: "))
    else:
        error = (kind or (errors.InvalidRequest if 400 <= status < 500 else MoesaicError))(message)
    error.status = status
    return error


def event_error(shown: Mapping[str, Any]) -> MoesaicError:
    """Return the error that an event in a stream tells of."""
    told = shown["error"]
    code = told.get("code") if isinstance(told, dict) else None
    return _error(code if isinstance(code, int) and 400 <= code < 600 else 500, shown)


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After, which may be a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


# Values


def read(reader: Callable[[Any], T], value: Any) -> T:
    """Return what a reader makes of a value.

    Raises:
        BadReply: it is not of the API's shape.
    """
    try:
        return reader(value)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadReply(f"the server's answer is not of OpenAI's shape ({type(error).__name__}: {error})") from None


def content(status: int, headers: Mapping[str, str], body: bytes) -> Any:
    """Return the JSON of a reply.

    Raises:
        MoesaicError: it is an error.
        BadReply: it is no JSON, or leads elsewhere.
    """
    if 300 <= status < 400:
        raise BadReply(f"the server sends on to {headers.get('location', 'nowhere')!r:.200}: make that the base_url")
    if status != 200:
        raise failure(status, headers, body)
    try:
        return json.loads(body)
    except ValueError:
        raise BadReply("the server's answer is no JSON: does base_url lead to something else?") from None


def usage(value: Any) -> Usage | None:
    if value is None:
        return None
    details = value.get("prompt_tokens_details") or {}
    return Usage(value["prompt_tokens"], value.get("completion_tokens", 0), details.get("cached_tokens") or 0)


def answer(value: Any) -> Answer:
    """Return the answer of either API with its alternatives."""
    choices = sorted(value["choices"], key=lambda choice: int(choice["index"]))
    used = usage(value.get("usage"))
    first, *others = (_choice(choice, value, used) for choice in choices)
    return _with(first, others)


def _with(first: Answer, others: list[Answer]) -> Answer:
    return Answer(**{**first.__dict__, "alternatives": tuple(others)}) if others else first


def _choice(choice: Any, value: Any, used: Usage | None) -> Answer:
    message = choice.get("message") or {"content": choice.get("text")}
    calls = tuple(
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    )
    found = choice.get("logprobs")
    return Answer(
        text=message.get("content") or "",
        reason=str(choice["finish_reason"]),
        usage=used,
        calls=calls,
        logprobs=None if found is None else logprobs(found),
        id=value.get("id", ""),
        model=value.get("model", ""),
        raw=value,
    )


def logprobs(value: Any) -> tuple[TokenLogprob, ...]:
    """Return log-probabilities, in the form of chats or of completions."""
    if "content" in value:
        return tuple(
            TokenLogprob(
                each["token"],
                each["logprob"],
                tuple((top["token"], top["logprob"]) for top in each.get("top_logprobs") or ()),
            )
            for each in value["content"] or ()
        )
    tops = value.get("top_logprobs") or [None] * len(value["tokens"])
    rows = zip(value["tokens"], value["token_logprobs"], tops, strict=True)
    return tuple(TokenLogprob(token, logprob, tuple((top or {}).items())) for token, logprob, top in rows)


def pieces(chunk: Any) -> list[Piece]:
    """Return what an event of either API brings."""
    return [_piece(choice) for choice in chunk.get("choices") or ()]


def _piece(choice: Any) -> Piece:
    delta = choice.get("delta") or {"content": choice.get("text")}
    found = choice.get("logprobs")
    return Piece(
        text=delta.get("content") or "",
        index=choice["index"],
        calls=tuple(_call_piece(call) for call in delta.get("tool_calls") or ()),
        logprobs=() if found is None else logprobs(found),
        reason=choice.get("finish_reason"),
    )


def _call_piece(call: Any) -> CallPiece:
    function = call.get("function") or {}
    return CallPiece(call["index"], call.get("id") or "", function.get("name") or "", function.get("arguments") or "")


def models(value: Any) -> list[Model]:
    return [
        Model(
            id=each["id"],
            context=each.get("max_model_len"),
            task=each.get("task") or "chat",
            state=each.get("state") or "loaded",
            raw=each,
        )
        for each in value["data"]
    ]


def embeddings(value: Any) -> Embeddings:
    rows = sorted(value["data"], key=lambda each: int(each["index"]))
    vectors = tuple(tuple(map(float, each["embedding"])) for each in rows)
    return Embeddings(vectors, value.get("model", ""), usage(value.get("usage")), value)


def tokens(value: Any) -> Tokens:
    return Tokens(tuple(value["tokens"]), tuple(value.get("token_strs") or ()), value.get("max_model_len"), value)
