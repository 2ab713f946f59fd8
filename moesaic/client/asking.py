"""What is asked, as JSON: where to, with which key, how long to wait, and the fields of each question.

Knows the fields of the API. Does not know sockets, nor what is answered.
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

BASE_URL, KEY = "MOESAIC_BASE_URL", "MOESAIC_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"

Messages = str | Sequence[Mapping[str, Any]]
"""A conversation, or one question."""


@dataclass(frozen=True)
class Timeouts:
    """How long to wait, in seconds; None is for ever."""

    connect: float | None = 10.0
    """For a connection."""
    first_byte: float | None = 600.0
    """For the answer to begin. An answer that is no stream begins when it is done."""
    silence: float | None = 60.0
    """For more of an answer that has begun; a server that still computes sends a comment now and then."""


class Options(TypedDict, total=False):
    """How to answer: the API's fields, under its names. None is the same as leaving a field out."""

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
    min_tokens: int | None
    ignore_eos: bool | None
    logprobs: int | None
    """So many alternatives to each token, with their log-probabilities; 0 is the tokens' own alone."""
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    priority: int | None
    user: str | None


class ChatOptions(Options, total=False):
    """How to answer a conversation."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    continue_final_message: bool | None


class CompleteOptions(Options, total=False):
    """How to go on from a text."""

    echo: bool | None
    best_of: int | None


@dataclass(frozen=True)
class Address:
    """Where a server is, and what is said to it with every request."""

    root: str
    """Its address without ``/v1``."""
    headers: Mapping[str, str] = field(repr=False)
    """The key is among them."""
    model: str | None = None


def address(base_url: str | None, key: str | None, model: str | None, headers: Mapping[str, str] | None) -> Address:
    """Return where to ask: as given, else as the environment says, else on this machine.

    Raises:
        InvalidParameter: it is no address, or no key.
    """
    root = (base_url or os.environ.get(BASE_URL) or DEFAULT_URL).rstrip("/").removesuffix("/v1")
    parts = urlsplit(root)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidParameter("base_url", f"expected http://HOST:PORT or https://HOST, not {root!r:.80}")
    key = key or os.environ.get(KEY)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidParameter("key", "holds what no key can: is there a line break at its end?")
    said = {"user-agent": f"moesaic-client/{__version__}", "accept": "application/json"}
    said |= {"authorization": f"Bearer {key}"} if key else {}
    return Address(root, said | {name.lower(): value for name, value in (headers or {}).items()}, model)


@dataclass(frozen=True)
class Ask:
    """One request, which may be sent several times: its idempotency key tells the server that it is the same."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = None


def get(at: Address, path: str) -> Ask:
    return Ask("GET", at.root + path, at.headers)


def post(at: Address, path: str, fields: Mapping[str, Any], *, stream: bool = False) -> Ask:
    """Return a request with a body, without those of its fields that are None.

    Raises:
        InvalidRequest: a field cannot be written as JSON.
    """
    said = {"model": at.model} | {name: value for name, value in fields.items() if value is not None}
    if said["model"] is None:
        del said["model"]
    if stream:
        said |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        body = json.dumps(said, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"what is asked cannot be written as JSON: {error}") from None
    headers = {**at.headers, "content-type": "application/json", "idempotency-key": str(uuid.uuid4())}
    if stream:  # what packs a stream holds it back
        headers |= {"accept": "text/event-stream", "accept-encoding": "identity"}
    return Ask("POST", at.root + path, headers, body)


def chat(messages: Messages, options: ChatOptions, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of ``/v1/chat/completions``."""
    fields = _checked(options, ChatOptions)
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if (top := fields.pop("logprobs", None)) is not None:
        fields |= {"logprobs": True, "top_logprobs": top}
    return {"messages": said, **fields, **(extra or {})}


def complete(prompt: str | Sequence[int], options: CompleteOptions, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of ``/v1/completions``."""
    return {"prompt": prompt, **_checked(options, CompleteOptions), **(extra or {})}


def embed(texts: str | Sequence[str], model: str | None, dimensions: int | None) -> dict[str, Any]:
    """Return the fields of ``/v1/embeddings``."""
    return {"input": texts, "model": model, "dimensions": dimensions}


def tokenize(text: Messages, model: str | None) -> dict[str, Any]:
    """Return the fields of ``/tokenize``."""
    return {"prompt" if isinstance(text, str) else "messages": text, "model": model}


def _checked(options: Any, kind: type) -> dict[str, Any]:
    """Return options, none of which is misspelt: the server would overlook it.

    Raises:
        InvalidParameter: there is none of that name.
    """
    known = kind.__optional_keys__  # type: ignore[attr-defined]
    for name in options:
        if name not in known:
            raise InvalidParameter(name, "is not known; what only the server knows goes into `extra`")
    return {name: value for name, value in options.items() if value is not None}
