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
    """Limits on the tokens of a request, as the routes of Hugging Face TGI (Text Generation Inference) set them.

    The limits are part of the request, so a gateway needs no tokenizer. The errors have TGI's wording.
    """

    prompt: int | None = None
    """Maximum number of prompt tokens; None means one less than the total, so that one token of an answer fits."""
    total: int | None = None
    """Maximum number of tokens of prompt and answer together; None means the model's context length."""

    def max_tokens(self, prompt_tokens: int, max_tokens: int | None, context: int | None) -> int | None:
        """Return the maximum number of tokens of the answer; None if nothing limits it.

        Args:
            prompt_tokens: number of tokens of the prompt.
            max_tokens: the client's limit for the answer; None means no limit.
            context: the model's context length in tokens; None if unknown.

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
    """Whether the answer continues the last message, which must be the assistant's, instead of beginning a new one."""
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Extra variables for the model's chat format or Jinja chat template."""
    now: str | None = None
    """Local time in ISO 8601, for chat formats that put the date into the prompt; None: the time of tokenization. A
    gateway sets it, so that the prompt stays the same if another worker continues the answer."""
    grammar: tuple[str, Any] | None = None
    """Kind and value of the grammar that the answer must follow (see ``moesaic.text.grammar``); None: no grammar."""
    grammar_param: str = "grammar"
    """Name of the request field with which the client set the grammar, for error messages."""
    truncate: int | None = None
    """Only this number of the prompt's last tokens is kept, and the beginning-of-text token if it begins with one.
    -1: as many as leave room for the answer. None: all."""
    limits: TokenLimits | None = None
    """Limits that are checked when the prompt is tokenized; None means that only the model's context length limits."""
    parse_special: bool = False
    """Whether the name of a special token in a text prompt, such as ``</s>``, becomes that token."""
    add_bos: bool = True
    """Whether the beginning-of-text token is added to a text prompt that does not begin with it."""
    skip_special: bool = True
    """Whether the text of an answer leaves out special tokens."""
    include_stop: bool = False
    """Whether the text of an answer includes the stop string that ended it."""
    resume: tuple[tuple[int, ...], ...] = ()
    """For each of the n answers, the ids of the tokens that a worker generated before it was lost.

    Only a gateway sets this field. The answer continues behind these tokens, which count as generated. The stream first
    sends ``PromptDone`` without the prompt's tokens. It then repeats the known tokens as deltas, one by one and without
    log-probabilities. The text up to a token depends only on the tokens up to it. A caller that has already passed on k
    tokens therefore drops the first k tokens and their text. With a seed, the continuation is the one that the lost
    worker would have generated."""
    priority: int = 0
    """Requests with a lower number run first."""
    tenant: str = ""
    """The name of the client's API key. Different tenants share no cached prefixes. Only the server sets this field."""
    idempotency_key: str = ""
    """A tenant that sends this key again gets the same answers, if the backend keeps jobs; "" means no key."""


class TopToken(msgspec.Struct, frozen=True, array_like=True):
    """One of the most likely tokens at a position of the prompt or the answer."""

    id: int
    text: str
    logprob: float
    data: bytes = b""
    """The bytes that this token would have added to the text."""


class TokenInfo(msgspec.Struct, frozen=True, array_like=True):
    """A token of the prompt or the answer, and its text."""

    id: int
    text: str
    """The text of the token alone, for display. U+FFFD replaces bytes that are not a complete character."""
    special: bool = False
    logprob: float | None = None
    top: tuple[TopToken, ...] = ()
    data: bytes = b""
    """The bytes that the token adds to the text of the answer or the prompt; set only if ``logprob`` is set.

    The joined bytes of all tokens are the text in UTF-8, followed by the tokens of the stop string that ended the
    answer, if any. A special token that the text leaves out adds no bytes. In a prompt, it adds its name."""
    offset: int = 0
    """Number of complete characters of the answer's text before this token; set only if ``logprob`` is set."""


class PromptDone(msgspec.Struct, frozen=True, array_like=True, tag="b"):
    """Event: the prompt has been processed. Each answer has one, before its first ``Delta``."""

    index: AnswerIndex
    prompt: tuple[TokenInfo, ...] = ()
    """The prompt's tokens with their log-probabilities; empty unless the request asks for them."""
    prompt_tokens: int = 0
    """Number of tokens of the prompt."""


class ToolCall(msgspec.Struct, frozen=True, array_like=True):
    """A part of a tool call. The first part has the id and the name; later parts have only more of the arguments."""

    index: int
    """Index of the call among the answer's calls."""
    id: str = ""
    name: str = ""
    arguments: str = ""
    """Text to append to the call's arguments, which are JSON."""


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """Event: the next part of an answer: text that can be shown, tokens, and parts of tool calls. Each may be empty.

    In the model's output, parts that continue a call of an earlier event precede ``text``, and new calls follow it.
    """

    index: AnswerIndex
    text: str = ""
    tokens: tuple[TokenInfo, ...] = ()
    calls: tuple[ToolCall, ...] = ()


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="e"):
    """Event: the end of an answer, with its finish reason and its numbers of tokens."""

    index: AnswerIndex
    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0
    stop: str | None = None
    """The stop string that ended the answer; None if none did."""
    stop_id: int | None = None
    """The id of the token that ended the answer; None if none did."""
    has_tool_calls: bool = False
    """Whether the answer has tool calls and all of them are complete: their arguments are JSON objects."""


Event = PromptDone | Delta | Finished


@dataclass(frozen=True)
class ModelInfo:
    """A model that a backend offers."""

    name: str
    aliases: tuple[str, ...] = ()
    task: Literal["chat", "classify"] = "chat"
    state: Literal["loaded", "loading", "unloaded", "failed"] = "loaded"
    context: int | None = None
    """Context length: the maximum number of tokens of prompt and answer together; None if unknown."""
    labels: tuple[str, ...] = ()
    """Labels of a classifier; empty for a chat model."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Architecture, dtype, weight formats and backends of the operations, for display."""
    parent: str | None = None
    """Name of the model that a preset uses; None: this is a model, not a preset."""
    description: str = ""
    """What a preset is for, in the words of its author; "" if it has no description."""


@dataclass(frozen=True)
class ModelStats:
    """Current load of a model (``running``, ``waiting``, ``blocks``, ``free_blocks``), and counters since its start.

    ``blocks`` are those of the KV cache. ``steps`` counts the engine's forward passes. Speculation proposed
    ``draft_tokens``, and ``accepted_tokens`` of them became part of answers.
    """

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
    draft_tokens: int = 0
    accepted_tokens: int = 0
    alive: bool = True
    """Whether the model can still answer."""


class ResponseStream(Protocol):
    """The events of a running request, for all its ``n`` answers. Only one task may read them."""

    @property
    def job(self) -> tuple[str, bool] | None:
        """The id of the request's job, and whether the job existed before; None if the backend keeps no jobs."""
        ...

    def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events, or raise an error of ``moesaic.errors``."""
        ...

    def ready(self) -> list[Event]:
        """Take the events that are available now, without waiting. ``Finished`` comes together with the last token."""
        ...

    def cancel(self) -> None:
        """Cancel the request; no further events come."""
        ...


class Backend(Protocol):
    """A provider of models. If a request is refused, the method itself raises an error of ``moesaic.errors``."""

    def models(self) -> Sequence[ModelInfo]:
        """Return the models that the backend offers, the default one first."""
        ...

    def stats(self) -> Mapping[str, ModelStats]:
        """Return statistics of each loaded model."""
        ...

    async def generate(self, request: GenerationRequest) -> ResponseStream:
        """Start to generate the answers to a request; return the stream of their events."""
        ...

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        """Return all tokens of the request's prompt, or of its messages in the chat format, with ids and texts."""
        ...

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...

    async def embed(
        self, model: str, texts: Sequence[str | Sequence[int]], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        """Return one embedding vector for each text, and the total number of tokens of the texts.

        With ``truncate``, only that number of the last tokens of each text is read; -1: as many as the model supports.
        """
        ...

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """Return, for each text, the probability of each label by the label's name."""
        ...

    async def close(self) -> None:
        """Cancel all requests and release the models."""
        ...


def join(events: Sequence[Event]) -> list[Event]:
    """Return the events with adjacent deltas of one answer merged. Deltas with tool calls stay separate."""
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
