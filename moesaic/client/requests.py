"""Requests to the server: base URL, API key, timeouts, and the JSON body of each API call.

This module knows the fields of the API. It does no network I/O and does not parse responses.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict
from urllib.parse import urlsplit

from moesaic import __version__
from moesaic.errors import InvalidParameter, InvalidRequest

BASE_URL_VARIABLE, API_KEY_VARIABLE = "MOESAIC_BASE_URL", "MOESAIC_API_KEY"
DEFAULT_BASE_URL = "http://127.0.0.1:8000"

Messages = str | Sequence[Mapping[str, Any]]
"""A conversation, or one user message."""


@dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds; None waits forever."""

    connect: float | None = 10.0
    """Maximum time to establish the connection."""
    first_byte: float | None = 600.0
    """Maximum time until the response begins. A response that is not streamed begins when the answer is complete."""
    silence: float | None = 60.0
    """Maximum time without data once the response has begun. While it computes, the server sends keep-alives."""


class Options(TypedDict, total=False):
    """Generation options under the API's names. None is the same as leaving an option out."""

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[str, float] | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    allowed_token_ids: Sequence[int] | None
    truncate_prompt_tokens: int | None
    """Only this number of the prompt's last tokens is kept; -1: as many as leave room for the answer; None: all."""
    min_tokens: int | None
    ignore_eos: bool | None
    speculation: bool | None
    logprobs: int | None
    """Request log-probabilities, and this number of alternatives for each token; 0 requests no alternatives."""
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    priority: int | None
    user: str | None


class ChatOptions(Options, total=False):
    """Options of chat completions."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    continue_final_message: bool | None


class CompleteOptions(Options, total=False):
    """Options of text completions."""

    echo: bool | None
    best_of: int | None


@dataclass(frozen=True)
class ServerConfig:
    """The server's URL, and what every request to it contains."""

    root: str
    """Base URL without ``/v1``."""
    headers: Mapping[str, str] = field(repr=False)
    """Headers of every request, including the API key."""
    model: str | None = None
    """Model of requests that do not name one; None leaves the choice to the server."""


def server_config(
    base_url: str | None, key: str | None, model: str | None, headers: Mapping[str, str] | None
) -> ServerConfig:
    """Return the configuration from the arguments, the environment, or the defaults, in this order.

    The variables are MOESAIC_BASE_URL and MOESAIC_API_KEY. The default is http://127.0.0.1:8000 without a key.

    Raises:
        InvalidParameter: the URL is not an HTTP URL, or the key contains characters that a header cannot hold.
    """
    root = (base_url or os.environ.get(BASE_URL_VARIABLE) or DEFAULT_BASE_URL).rstrip("/").removesuffix("/v1")
    parts = urlsplit(root)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidParameter("base_url", f"expected http://HOST:PORT or https://HOST, not {root!r:.80}")
    key = key or os.environ.get(API_KEY_VARIABLE)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidParameter("key", "the API key contains invalid characters; check for a line break at the end")
    merged = {"user-agent": f"moesaic-client/{__version__}", "accept": "application/json"}
    if key:
        merged["authorization"] = f"Bearer {key}"
    merged |= {name.lower(): value for name, value in (headers or {}).items()}
    return ServerConfig(root, merged, model)


@dataclass(frozen=True)
class Request:
    """One HTTP request. It may be sent several times; the server recognizes a repetition by the idempotency key."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = None


def get(server: ServerConfig, path: str) -> Request:
    return Request("GET", server.root + path, server.headers)


def post(server: ServerConfig, path: str, fields: Mapping[str, Any], *, stream: bool = False) -> Request:
    """Return a POST request; its JSON body has the ``fields`` that are not None. ``stream``: stream the answer.

    Raises:
        InvalidRequest: a field cannot be encoded as JSON.
    """
    content = {"model": server.model} | {name: value for name, value in fields.items() if value is not None}
    if content["model"] is None:
        del content["model"]
    if stream:
        content |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be encoded as JSON: {error}") from None
    headers = {**server.headers, "content-type": "application/json", "idempotency-key": str(uuid.uuid4())}
    if stream:  # compression would delay the events
        headers |= {"accept": "text/event-stream", "accept-encoding": "identity"}
    return Request("POST", server.root + path, headers, body)


def chat_fields(messages: Messages, options: ChatOptions, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the JSON fields of a request to ``/v1/chat/completions``. A string is one user message."""
    fields = _checked(options, ChatOptions)
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if (top := fields.pop("logprobs", None)) is not None:
        fields |= {"logprobs": True, "top_logprobs": top}
    return {"messages": turns, **fields, **(extra or {})}


def completion_fields(
    prompt: str | Sequence[int], options: CompleteOptions, extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the JSON fields of a request to ``/v1/completions``."""
    return {"prompt": prompt, **_checked(options, CompleteOptions), **(extra or {})}


def embedding_fields(texts: str | Sequence[str], model: str | None, dimensions: int | None) -> dict[str, Any]:
    """Return the JSON fields of a request to ``/v1/embeddings``."""
    return {"input": texts, "model": model, "dimensions": dimensions}


def tokenize_fields(text: Messages, model: str | None) -> dict[str, Any]:
    """Return the JSON fields of a request to ``/tokenize``."""
    return {"prompt" if isinstance(text, str) else "messages": text, "model": model}


def _checked(options: Any, kind: type) -> dict[str, Any]:
    """Return the options that are not None. ``kind``, such as ``ChatOptions``, lists the allowed names.

    Misspelt names are refused here, because servers ignore unknown fields.

    Raises:
        InvalidParameter: an option is unknown.
    """
    names = kind.__optional_keys__  # type: ignore[attr-defined]
    for name in options:
        if name not in names:
            raise InvalidParameter(name, "unknown option; use `extra` for fields that only the server knows")
    return {name: value for name, value in options.items() if value is not None}
