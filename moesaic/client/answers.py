"""What a client hands out: whole answers, pieces of answers, and what else there is to ask for.

Plain values. Does not know where they come from: ``replies`` reads them out of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Usage:
    """What an answer cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that the server did not have to compute again."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the model wants; ``arguments`` is what it wrote, JSON if it kept to its task."""

    id: str
    name: str
    arguments: str

    def parsed(self) -> Any:
        """Return the arguments as a value.

        Raises:
            ValueError: they are no JSON.
        """
        return json.loads(self.arguments)


@dataclass(frozen=True)
class CallPiece:
    """A part of a call: call number ``place`` of an answer gets more ``arguments``.

    The first part of a call has its id and its name, later ones have "".
    """

    place: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability, and the likeliest at its place with theirs."""

    token: str
    logprob: float | None
    """None: the first token of a prompt, which follows from nothing."""
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What has come of an answer since the last piece."""

    text: str = ""
    index: int = 0
    """Which of ``n`` answers it is a piece of."""
    calls: tuple[CallPiece, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reason: str | None = None
    """Why the answer has ended, if it has."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    reason: str
    """"stop" (the model ended it, or a stop string or its grammar did), "length", or "tool_calls"."""
    usage: Usage | None
    """Of all ``n`` answers together; None if the server does not say."""
    calls: tuple[ToolCall, ...] = ()
    """The tools that it calls, in order."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of its tokens, if they were asked for."""
    id: str = ""
    model: str = ""
    request_id: str | None = None
    """What the server's log calls the request."""
    alternatives: tuple[Answer, ...] = ()
    """With ``n`` > 1, the other n - 1 answers."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the server sent; of a stream, the fields of its events, each as it came last."""

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a turn of the conversation, to be put at its end before the next question."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message

    def parsed(self) -> Any:
        """Return what a ``response_format`` made the model write as a value.

        Raises:
            ValueError: the text is no JSON; with reason "length" it was cut.
        """
        return json.loads(self.text)


@dataclass(frozen=True)
class Model:
    """A model that can be asked."""

    id: str
    context: int | None = None
    """How many tokens prompt and answer may have together."""
    task: str = "chat"
    state: str = "loaded"
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Embeddings:
    """A vector for each text, in order."""

    vectors: tuple[tuple[float, ...], ...]
    model: str
    usage: Usage | None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Tokens:
    """What a text, or a conversation, is to the model."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    context: int | None
    """How many tokens the model can hold."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ids)
