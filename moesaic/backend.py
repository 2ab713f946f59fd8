"""The interface between APIs and models: requests in, events out.

A program without a model, such as a gateway, can implement the same interface as one with a model. This module does not
depend on chat formats, HTTP or torch. ``local_backend`` runs models in this process.

All values can be written as JSON and read back.
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

    They travel with the request, so a gateway needs no tokenizer. The errors have TGI's wording.
    """

    prompt: int | None = None
    """Maximum number of prompt tokens; None leaves room for one token of an answer."""
    total: int | None = None
    """Maximum number of tokens of prompt and answer together; None means the model's context."""

    def max_tokens(self, prompt_tokens: int, max_tokens: int | None, context: int | None) -> int | None:
        """Return the maximum number of tokens of the answer.

        Args:
            prompt_tokens: number of tokens of the prompt.
            max_tokens: the client's limit; None means no limit.
            context: the model's context; None if unknown.

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
    """A conversation or a prompt, and parameters of the answer.

    Exactly one of ``messages`` and ``prompt`` is set. ``sampling`` has the fields of ``moesaic.Sampling`` that the
    client set; the others have the checkpoint's recommended values.
    """

    model: str = ""
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    """Continue the last message, which must be the assistant's."""
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat format or the chat template of the model."""
    now: str | None = None
    """Local time, as ISO 8601, that a prompt with a date states; None: the time at which it is tokenized. A gateway
    sets it, so that the prompt stays the same if another worker continues the answer."""
    grammar: tuple[str, Any] | None = None
    """Kind and value of a grammar, as ``moesaic.text.grammar`` defines them."""
    grammar_param: str = "grammar"
    """Name of the client's field that sets the grammar; errors name it."""
    truncate: int | None = None
    """Keep only this number of tokens of the prompt: the last ones, and the beginning-of-text token in front if there
    is one. -1: as many as leave room for the answer."""
    limits: TokenLimits | None = None
    """Limits that are checked when the prompt is tokenized; None means the model's context."""
    parse_special: bool = False
    """Parse names of special tokens in a text prompt as these tokens."""
    add_bos: bool = True
    """Add the beginning-of-text token to a text prompt, unless it has one."""
    skip_special: bool = True
    include_stop: bool = False
    """Whether the text of an answer includes the stop string that ended it."""
    resume: tuple[tuple[int, ...], ...] = ()
    """For each of the n answers, the ids of the tokens that a lost worker has generated. Set by a gateway only.

    The tokens count as generated. The stream repeats them as the answer's first deltas, one by one and without
    log-probabilities, after its ``PromptDone`` without the prompt's tokens. The text up to a token depends only on the
    tokens up to it, so a caller that has passed on k tokens drops the first k and their text, and continues. With a
    seed the continuation is the one that the lost worker would have generated."""
    priority: int = 0
    tenant: str = ""
    """The name of the client's key; tenants share no cached prefixes. Set by the server only."""
    idempotency_key: str = ""
    """A tenant that sends this key again gets the same answers, if the backend keeps jobs; "" means no key."""


class TopToken(msgspec.Struct, frozen=True, array_like=True):
    """One of the most likely tokens at a place."""

    id: int
    text: str
    logprob: float
    data: bytes = b""
    """The bytes that the token would have added to the text."""


class TokenInfo(msgspec.Struct, frozen=True, array_like=True):
    """A token and its text."""

    id: int
    text: str
    """The text of the token alone, for display. Bytes that are no complete character are U+FFFD."""
    special: bool = False
    logprob: float | None = None
    top: tuple[TopToken, ...] = ()
    data: bytes = b""
    """The bytes that the token adds to the text of the answer or the prompt; only with a log-probability.

    Joined, they are the text in UTF-8, and the tokens of a stop string after it. A special token that is left out of
    the text adds none. In a prompt, a special token has its name."""
    offset: int = 0
    """Number of characters of the answer that are complete before the token; only with a log-probability."""


class PromptDone(msgspec.Struct, frozen=True, array_like=True, tag="b"):
    """Event: the prompt has been processed. Each answer has one, before its first ``Delta``."""

    index: AnswerIndex
    prompt: tuple[TokenInfo, ...] = ()
    """The prompt's tokens with their log-probabilities, if requested."""
    prompt_tokens: int = 0
    """Number of tokens of the prompt."""


class ToolCall(msgspec.Struct, frozen=True, array_like=True):
    """The beginning of a tool call, with its id and its name, or a further part of its arguments."""

    index: int
    """Index of the call among the answer's calls."""
    id: str = ""
    name: str = ""
    arguments: str = ""


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """Event: a part of an answer. It has text that can be shown, tokens, and parts of tool calls; each may be empty.

    Parts that continue an earlier call come before the text; parts of new calls come after it.
    """

    index: AnswerIndex
    text: str = ""
    tokens: tuple[TokenInfo, ...] = ()
    calls: tuple[ToolCall, ...] = ()


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="e"):
    """Event: the end of an answer."""

    index: AnswerIndex
    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0
    stop: str | None = None
    """The stop string that ended the answer."""
    stop_id: int | None = None
    """The token that ended the answer."""
    has_tool_calls: bool = False
    """Whether the answer has tool calls, all of them whole: with arguments that are a JSON object."""


Event = PromptDone | Delta | Finished


@dataclass(frozen=True)
class ModelInfo:
    """A model of a backend."""

    name: str
    aliases: tuple[str, ...] = ()
    task: Literal["chat", "classify"] = "chat"
    state: Literal["loaded", "loading", "unloaded", "failed"] = "loaded"
    context: int | None = None
    """Maximum number of tokens of prompt and answer; None if unknown."""
    labels: tuple[str, ...] = ()
    """Labels of a classifier."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Architecture, dtype, formats and op backends, for display."""


@dataclass(frozen=True)
class ModelStats:
    """Utilisation of a model. Counters are cumulative since its start."""

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
    """Whether the model can still answer."""


class ResponseStream(Protocol):
    """The events of a running request, of all its ``n`` answers. Read by one task."""

    @property
    def job(self) -> tuple[str, bool] | None:
        """Job id, and whether the job existed before this request; None if the backend keeps no jobs."""
        ...

    def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events, or raise an error of ``moesaic.errors``."""
        ...

    def ready(self) -> list[Event]:
        """Return the events that are available now. ``Finished`` is available together with the last token."""
        ...

    def cancel(self) -> None:
        """Cancel the request; no further events come."""
        ...


class Backend(Protocol):
    """A provider of models. Every method raises errors of ``moesaic.errors`` before the request runs."""

    def models(self) -> Sequence[ModelInfo]:
        """Return the models, the default one first."""
        ...

    def stats(self) -> Mapping[str, ModelStats]:
        """Return statistics of each loaded model."""
        ...

    async def generate(self, request: GenerationRequest) -> ResponseStream:
        """Start a request."""
        ...

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        """Return the tokens of the request's prompt."""
        ...

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...

    async def embed(
        self, model: str, texts: Sequence[str | Sequence[int]], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        """Return an embedding of each text, and the total number of tokens.

        With ``truncate``, only that number of the last tokens of each text is read; -1: as many as the model supports.
        """
        ...

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """Return the probability of each label for each text."""
        ...

    async def close(self) -> None:
        """Cancel all requests and release the models."""
        ...


def join(events: Sequence[Event]) -> list[Event]:
    """Return events with adjacent deltas of one answer merged, except those with tool calls."""
    out: list[Event] = []
    run: list[Delta] = []
    for event in events:
        text = isinstance(event, Delta) and not event.calls
        if run and not (text and event.index == run[0].index):
            out.append(_joined(run))
            run = []
        if text:
            run.append(event)  # type: ignore[arg-type]  # a delta without calls
        else:
            out.append(event)
    return [*out, _joined(run)] if run else out


def _joined(run: list[Delta]) -> Delta:
    if len(run) == 1:
        return run[0]
    text = "".join([delta.text for delta in run])
    return Delta(run[0].index, text, tuple([token for delta in run for token in delta.tokens]))
