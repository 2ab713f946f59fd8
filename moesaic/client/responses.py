"""Parsers for the server's responses: answers, pieces of streamed answers, and errors.

This module knows the API's JSON. It does no network I/O.
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

ERROR_BY_STATUS: Mapping[int, type[MoesaicError]] = {
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
ERROR_BY_NAME = {
    kind.__name__: kind
    for kind in (*ERROR_BY_STATUS.values(), errors.InvalidMessages, errors.GrammarError, errors.NumericalError)
} | {"EngineStopped": errors.EngineStopped}
"""Error classes by the name that the server sends in the field ``type`` of an error."""


# Errors


def response_error(status: int, headers: Mapping[str, str], body: bytes) -> MoesaicError:
    """Return the error that a response with an error status describes."""
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    error = _error(status, content)
    error.retry_after = parse_retry_after(headers.get("retry-after"))
    error.request_id = headers.get("x-request-id")
    return error


def _error(status: int, content: Any) -> MoesaicError:
    """Return the error of a response. ``content`` is its JSON in the format of OpenAI or Hugging Face TGI, if valid."""
    details = content.get("error") if isinstance(content, dict) else None
    if isinstance(details, str):
        details = {"message": details, "type": content.get("error_type")}
    if not isinstance(details, dict):
        details = {}
    message = str(details.get("message") or f"the server answered with status {status}")
    kind = ERROR_BY_NAME.get(str(details.get("type"))) or ERROR_BY_STATUS.get(status)
    param = details.get("param")
    error: MoesaicError
    if isinstance(param, str) and status == 400:
        error = errors.InvalidParameter(param, message.removeprefix(f"{param}: "))
    else:
        error = (kind or (errors.InvalidRequest if 400 <= status < 500 else MoesaicError))(message)
    error.status = status
    return error


def event_error(content: Mapping[str, Any]) -> MoesaicError:
    """Return the error of an event in a stream. ``content`` is the event's JSON, with the field ``error``."""
    details = content["error"]
    code = details.get("code") if isinstance(details, dict) else None
    if code == "context_length_exceeded":
        code = 400
    return _error(code if isinstance(code, int) and 400 <= code < 600 else 500, content)


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which holds seconds or a date; None if it is missing or invalid."""
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


def parse(parser: Callable[[Any], T], content: Any) -> T:
    """Return ``parser(content)``, where ``content`` is the JSON of a response.

    Raises:
        BadReply: the JSON does not have the expected structure.
    """
    try:
        return parser(content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadReply(f"the response does not follow the OpenAI API ({type(error).__name__}: {error})") from None


def parse_body(status: int, headers: Mapping[str, str], body: bytes) -> Any:
    """Return the decoded JSON of a successful response.

    Raises:
        MoesaicError: the status is an error.
        BadReply: the response is a redirect, or is not valid JSON.
    """
    if 300 <= status < 400:
        location = headers.get("location", "nowhere")
        raise BadReply(f"the server redirects to {location!r:.200}; use that address as base_url")
    if status != 200:
        raise response_error(status, headers, body)
    try:
        return json.loads(body)
    except ValueError:
        raise BadReply("the response is not valid JSON; check that base_url points to a Moesaic server") from None


def parse_usage(content: Any) -> Usage | None:
    if content is None:
        return None
    details = content.get("prompt_tokens_details") or {}
    return Usage(content["prompt_tokens"], content.get("completion_tokens", 0), details.get("cached_tokens") or 0)


def parse_answer(content: Any) -> Answer:
    """Return the answer of a chat or text completion, including its alternatives."""
    choices = sorted(content["choices"], key=lambda choice: int(choice["index"]))
    usage = parse_usage(content.get("usage"))
    first, *others = (_parse_choice(choice, content, usage) for choice in choices)
    return Answer(**{**first.__dict__, "alternatives": tuple(others)}) if others else first


def _parse_choice(choice: Any, content: Any, usage: Usage | None) -> Answer:
    message = choice.get("message") or {"content": choice.get("text")}
    calls = tuple(
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    )
    logprobs = choice.get("logprobs")
    return Answer(
        text=message.get("content") or "",
        reason=str(choice["finish_reason"]),
        usage=usage,
        calls=calls,
        logprobs=None if logprobs is None else parse_logprobs(logprobs),
        id=content.get("id", ""),
        model=content.get("model", ""),
        raw=content,
    )


def parse_logprobs(content: Any) -> tuple[TokenLogprob, ...]:
    """Return the log-probabilities from JSON in the format of chat completions or of text completions."""
    if "content" in content:
        return tuple(
            TokenLogprob(
                entry["token"],
                entry["logprob"],
                tuple((top["token"], top["logprob"]) for top in entry.get("top_logprobs") or ()),
            )
            for entry in content["content"] or ()
        )
    tops = content.get("top_logprobs") or [None] * len(content["tokens"])
    rows = zip(content["tokens"], content["token_logprobs"], tops, strict=True)
    return tuple(TokenLogprob(token, logprob, tuple((top or {}).items())) for token, logprob, top in rows)


def parse_pieces(chunk: Any) -> list[Piece]:
    """Return the pieces in one event of a streamed chat or text completion: one for each answer in it."""
    return [_parse_piece(choice) for choice in chunk.get("choices") or ()]


def _parse_piece(choice: Any) -> Piece:
    delta = choice.get("delta") or {"content": choice.get("text")}
    logprobs = choice.get("logprobs")
    return Piece(
        text=delta.get("content") or "",
        index=choice["index"],
        calls=tuple(_parse_call_piece(call) for call in delta.get("tool_calls") or ()),
        logprobs=() if logprobs is None else parse_logprobs(logprobs),
        reason=choice.get("finish_reason"),
    )


def _parse_call_piece(call: Any) -> CallPiece:
    function = call.get("function") or {}
    return CallPiece(call["index"], call.get("id") or "", function.get("name") or "", function.get("arguments") or "")


def parse_models(content: Any) -> list[Model]:
    return [
        Model(
            id=entry["id"],
            context=entry.get("max_model_len"),
            task=entry.get("task") or "chat",
            state=entry.get("state") or "loaded",
            raw=entry,
        )
        for entry in content["data"]
    ]


def parse_embeddings(content: Any) -> Embeddings:
    rows = sorted(content["data"], key=lambda row: int(row["index"]))
    vectors = tuple(tuple(map(float, row["embedding"])) for row in rows)
    return Embeddings(vectors, content.get("model", ""), parse_usage(content.get("usage")), content)


def parse_tokens(content: Any) -> Tokens:
    return Tokens(
        tuple(content["tokens"]), tuple(content.get("token_strs") or ()), content.get("max_model_len"), content
    )
