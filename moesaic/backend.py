"""The door to a model, whoever runs it: what is asked of it, and what it answers, event by event.

Knows no text format, no HTTP and no torch: this is what lets a program that has no model, such as a
gateway, offer the same as one that has. ``local`` is the door of models in this process.

Everything here is made of plain values, so that it can be written as JSON and read back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import msgspec

from moesaic.errors import InvalidRequest

FinishReason = Literal["stop", "length", "cancelled"]
AnswerIndex = Annotated[int, msgspec.Meta(ge=0, lt=256)]
"""Index of an answer among the ``n`` answers of a request. The bound is checked when an event is decoded."""


@dataclass(frozen=True)
class TokenLimits:
    """Limits on the tokens of a request, as TGI's routes set them.

    They travel with the request, so that a gateway needs no tokenizer. Errors are worded as TGI words them.
    """

    prompt: int | None = None
    """Largest prompt; None: whatever leaves room for one token of an answer."""
    total: int | None = None
    """Largest prompt and answer together; None: the model's context."""

    def max_tokens(self, prompt_tokens: int, max_tokens: int | None, context: int | None) -> int | None:
        """Return how many tokens the answer may have.

        Args:
            prompt_tokens: tokens of the prompt.
            max_tokens: what the client asked for; None: as many as there is room for.
            context: the model's context; None: unknown.

        Raises:
            InvalidRequest: the prompt is too long, or leaves no room for the answer.
        """
        total = min((limit for limit in (self.total, context) if limit is not None), default=None)
        if total is None:
            return max_tokens
        if max_tokens is not None and prompt_tokens + max_tokens > total:
            given = f"Given: {prompt_tokens} `inputs` tokens and {max_tokens} `max_new_tokens`"
            raise InvalidRequest(f"`inputs` tokens + `max_new_tokens` must be <= {total}. {given}")
        longest = min(limit for limit in (self.prompt, total - 1) if limit is not None)
        if prompt_tokens > longest:
            raise InvalidRequest(f"`inputs` must have less than {longest} tokens. Given: {prompt_tokens}")
        return total - prompt_tokens if max_tokens is None else max_tokens


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked: a conversation or a prompt, and how to answer.

    Exactly one of ``messages`` and ``prompt`` is there. ``sampling`` has the fields of
    ``moesaic.Sampling`` that were asked for; what is left out is as the checkpoint recommends.
    """

    model: str = ""
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    """Whether the last message, which is then the assistant's, is to be continued."""
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    grammar: tuple[str, Any] | None = None
    """A kind and a value; see ``moesaic.text.grammar``."""
    truncate: int | None = None
    """Read only this many tokens of the prompt, its last ones."""
    limits: TokenLimits | None = None
    """Limits that are checked where the prompt is tokenized; None: only the model's context counts."""
    parse_special: bool = False
    """Take the names of special tokens in a prompt that is text for these tokens: whoever wrote it wrote all of it."""
    add_bos: bool = True
    """Put the beginning-of-text token in front of a prompt that is text, unless it is there already."""
    skip_special: bool = True
    resume: tuple[tuple[int, ...], ...] = ()
    """For each of the n answers, the ids of its tokens so far, where it was begun by somebody who is gone.

    They are taken as drawn, count as generated, and come again as the answer's first pieces, one by one and without
    log-probabilities; so does its ``Begun``, without those of the prompt. The text up to a token follows from the
    tokens up to it, so that whoever passed on k tokens drops the first k and their text, and goes on as if nothing
    had happened. Only with a seed is what follows what would have. Set by a gateway, never by a client."""
    priority: int = 0
    tenant: str = ""
    """Whose request it is: different tenants share no cached prefix. Set by the server alone."""
    idempotency_key: str = ""
    """A name under which the tenant may ask this again and gets the same answers, where jobs are kept; "": none."""


class TokenInfo(msgspec.Struct, frozen=True, array_like=True):
    """A token as it is shown."""

    id: int
    text: str
    special: bool = False
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest: id, text, log-probability."""


class PromptDone(msgspec.Struct, frozen=True, array_like=True, tag="b"):
    """The prompt is read. Comes once for each answer, before its first piece."""

    index: AnswerIndex
    prompt: tuple[TokenInfo, ...] = ()
    """Its tokens with their log-probabilities, if asked for."""
    prompt_tokens: int = 0
    """How many it has."""


class ToolCall(msgspec.Struct, frozen=True, array_like=True):
    """A call of a tool, or a further part of its arguments."""

    index: int
    """Which of the answer's calls this is."""
    id: str = ""
    name: str = ""
    arguments: str = ""


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """A part of an answer: text that can be shown now, tokens that came, calls of tools. Any may be empty."""

    index: AnswerIndex
    text: str = ""
    tokens: tuple[TokenInfo, ...] = ()
    calls: tuple[ToolCall, ...] = ()


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="e"):
    """The end of one answer."""

    index: AnswerIndex
    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0
    stop: str | None = None
    """The stop string that was met."""
    stop_id: int | None = None
    """The token that ended it."""
    has_tool_calls: bool = False
    """Whether the answer called tools."""


Event = PromptDone | Delta | Finished


@dataclass(frozen=True)
class ModelInfo:
    """A model that can be asked."""

    name: str
    aliases: tuple[str, ...] = ()
    task: Literal["chat", "classify"] = "chat"
    state: Literal["loaded", "loading", "unloaded", "failed"] = "loaded"
    context: int | None = None
    """The most tokens of prompt and answer; None until it is known."""
    labels: tuple[str, ...] = ()
    """Of a classifier."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Architecture, dtype, formats and backends, to be shown."""


@dataclass(frozen=True)
class ModelStats:
    """How busy a model is; what rises, rises from its start."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    blocks: int = 0
    free_blocks: int = 0
    numerical_errors: int = 0
    alive: bool = True
    """Whether it can still answer."""


class ResponseStream(Protocol):
    """A running request: its events, those of its ``n`` answers as they come. Read by one task."""

    @property
    def job(self) -> tuple[str, bool] | None:
        """The number under which it is kept, and whether it was there before it was asked; None: it is not kept."""
        ...

    def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events; an error of the tree in ``moesaic.errors`` ends it."""
        ...

    def ready(self) -> list[Event]:
        """Return the events that can be had without waiting; with an answer's last token, its end can be had."""
        ...

    def cancel(self) -> None:
        """Take the request back; nothing more comes."""
        ...


class Backend(Protocol):
    """What offers models. Every method raises errors of the tree in ``moesaic.errors``, before anything runs."""

    def models(self) -> Sequence[ModelInfo]:
        """Return the models, the default first."""
        ...

    def stats(self) -> Mapping[str, ModelStats]:
        """Return how busy each loaded model is."""
        ...

    async def generate(self, request: GenerationRequest) -> ResponseStream:
        """Take a request in."""
        ...

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        """Return the prompt's tokens, as they would be read."""
        ...

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        """Return a vector for each text, and how many tokens were read."""
        ...

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """Return the probability of each label for each text."""
        ...

    async def close(self) -> None:
        """End everything."""
        ...


def join(events: Sequence[Event]) -> list[Event]:
    """Return events with neighbouring pieces of one answer made one, but for those that call tools."""
    out: list[Event] = []
    run: list[Delta] = []
    for event in events:
        text = isinstance(event, Delta) and not event.calls
        if run and not (text and event.index == run[0].index):
            out.append(_joined(run))
            run = []
        if text:
            run.append(event)  # type: ignore[arg-type]  # a piece
        else:
            out.append(event)
    return [*out, _joined(run)] if run else out


def _joined(run: list[Delta]) -> Delta:
    if len(run) == 1:
        return run[0]
    text = "".join([piece.text for piece in run])
    return Delta(run[0].index, text, tuple([token for piece in run for token in piece.tokens]))
