"""The values that the client returns: answers, pieces of streamed answers, models, embeddings and tokens.

This module does not parse anything: ``responses`` creates these values from the server's JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens that a request used, in the prompt and in its answers."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that the server took from its cache."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class ToolCall:
    """A tool call that the model requests."""

    id: str
    name: str
    arguments: str
    """The arguments as the model wrote them; normally JSON."""

    def parsed(self) -> Any:
        """Return the arguments, parsed as JSON.

        Raises:
            ValueError: the arguments are not valid JSON.
        """
        return json.loads(self.arguments)


@dataclass(frozen=True)
class CallPiece:
    """A part of a streamed tool call. The first part has the id and the name; in later parts both are empty."""

    place: int
    """Index of the tool call within its answer."""
    id: str = ""
    name: str = ""
    arguments: str = ""
    """Text to append to the arguments."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability (natural logarithm) and the most likely alternatives."""

    token: str
    logprob: float | None
    """None for the first token of a prompt, because no token precedes it."""
    top: tuple[tuple[str, float], ...] = ()
    """The most likely tokens at this position with their log-probabilities."""


@dataclass(frozen=True)
class Piece:
    """The part of a streamed answer that arrived since the previous piece."""

    text: str = ""
    index: int = 0
    """Index of the answer, from 0 to ``n`` - 1."""
    calls: tuple[CallPiece, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reason: str | None = None
    """Finish reason; None while the answer continues."""


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    text: str
    reason: str
    """Finish reason: "stop" (end of text, stop string or end of the grammar), "length" or "tool_calls"."""
    usage: Usage | None
    """Tokens of all ``n`` answers together; None if the server does not report them."""
    calls: tuple[ToolCall, ...] = ()
    """The tool calls, in order."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Log-probabilities of the answer's tokens; None unless requested."""
    id: str = ""
    model: str = ""
    request_id: str | None = None
    """The request's id in the server's log."""
    alternatives: tuple[Answer, ...] = ()
    """The other n - 1 answers, if ``n`` > 1."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The server's JSON. For a stream: the fields of all events, each with its latest value."""

    @property
    def message(self) -> dict[str, Any]:
        """The answer as an assistant message, to append to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message

    def parsed(self) -> Any:
        """Return the text, parsed as JSON. Use it with ``response_format``.

        Raises:
            ValueError: the text is not valid JSON, for example because it was cut off (reason "length").
        """
        return json.loads(self.text)


@dataclass(frozen=True)
class Model:
    """A model that the server offers."""

    id: str
    context: int | None = None
    """Context length in tokens: the maximum for prompt and answer together."""
    task: str = "chat"
    state: str = "loaded"
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The server's JSON for this model."""


@dataclass(frozen=True)
class Embeddings:
    """One embedding vector for each input text, in order."""

    vectors: tuple[tuple[float, ...], ...]
    model: str
    usage: Usage | None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The server's JSON."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text or a conversation: their ids, and the text of each token alone."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    context: int | None
    """Context length of the model in tokens."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The server's JSON."""

    def __len__(self) -> int:
        return len(self.ids)
