"""OpenAI's ``/v1/completions``: continues texts or token ids. With ``echo``, prompts are scored, as lm-eval needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from msgspec import Meta

from moesaic.backend import Delta, Event, Finished, GenerationRequest, PromptDone, TokenInfo
from moesaic.errors import InvalidParameter
from moesaic.serve import sse
from moesaic.serve.concurrency import gather_all
from moesaic.serve.context import RequestContext
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Response, openai_failure

TokenIds = Annotated[list[openai.NonNegativeInt], Meta(min_length=1)]
DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of ``max_tokens``."""


class CompletionBody(openai.SamplingFields, kw_only=True):
    """The body of a completion request."""

    prompt: str | list[Any]
    """A text, token ids, or a list of either; ``parse_prompts`` distinguishes them."""
    max_tokens: openai.NonNegativeInt | None = None
    max_completion_tokens: openai.NonNegativeInt | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: openai.AnswerCount | None = None
    suffix: str | None = None
    response_format: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    """Whether names of special tokens in a text prompt are read as these tokens. Default: true, as on TGI's routes."""

    @property
    def limit(self) -> int | None:
        """Return the largest number of tokens of an answer that the body sets; None: it sets none."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse_prompts(body: CompletionBody, limit: int) -> list[str | tuple[int, ...]]:
    """Return the prompts of a body, each as a text or as token ids.

    Raises:
        InvalidParameter: the prompts are neither texts nor token ids, or there are more than ``limit``.
    """
    prompts = body.prompt
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [_token_ids(prompts)]
    if not prompts or len(prompts) > limit:
        raise InvalidParameter("prompt", f"has {len(prompts)} prompts, expected 1 to {limit}")
    return [item if isinstance(item, str) else _token_ids(item) for item in prompts]


def _token_ids(values: Any) -> tuple[int, ...]:
    wrong = not isinstance(values, list) or not values
    if wrong or any(
        isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31 for token_id in values
    ):
        raise InvalidParameter("prompt", "expected a text, token ids, or a list of either")
    return tuple(values)


def to_request(body: CompletionBody, model: str) -> GenerationRequest:
    """Convert a body, without its prompt, to a generation request for the model named ``model``.

    Raises:
        InvalidParameter: a parameter is invalid.
    """
    if body.suffix:
        raise InvalidParameter("suffix", "is not supported: this model was not trained to fill in the middle")
    limit = DEFAULT_MAX_TOKENS if body.limit is None else body.limit
    sampling = openai.sampling(body) | {"max_tokens": limit or 1}
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None:
        sampling["prompt_logprobs"] = body.logprobs
    if body.best_of is not None:
        if body.best_of < (body.n or 1) or (body.stream and body.best_of > (body.n or 1)):
            raise InvalidParameter("best_of", "must be at least n, and equal to n in a stream")
        if body.best_of > (body.n or 1):
            sampling |= {"n": body.best_of, "logprobs": sampling.get("logprobs", 0)}
    return GenerationRequest(
        model=model,
        sampling=sampling,
        truncate=openai.truncation(body.truncate_prompt_tokens),
        add_bos=body.add_special_tokens is not False,
        parse_special=body.parse_special is not False,
        skip_special=body.skip_special_tokens is not False,
        include_stop=bool(body.include_stop_str_in_output),
        priority=body.priority or 0,
        **openai.grammar_fields(body, "response_format", openai.response_grammar(body.response_format)),
    )


async def complete(context: RequestContext) -> AnyResponse:
    """Handle ``/v1/completions``: continue one or more prompts, as a complete response or as a stream."""
    body: CompletionBody = context.body
    request = to_request(body, openai.model_name(context, body.model))
    prompts = parse_prompts(body, context.settings.prompts)
    requests = [replace(request, prompt=prompt) for prompt in prompts]
    running = [await context.generate(item) for item in requests]
    echoed = [await _prompt_text(context, item) if body.echo else "" for item in requests]
    writer = Writer(body, request, echoed)
    if body.stream:
        return EventStream(writer.frames(running))
    return Response(await writer.whole(running))


async def _prompt_text(context: RequestContext, request: GenerationRequest) -> str:
    """Return the text of a request's prompt as the model reads it: after truncation, if the request sets one."""
    prompt, backend = request.prompt or (), context.backend
    if request.truncate is None:
        return prompt if isinstance(prompt, str) else await backend.detokenize(request.model, prompt)
    tokens = await backend.tokenize(request)
    if isinstance(prompt, str):
        if len(tokens) < request.truncate:  # nothing was cut off
            return prompt
        if request.add_bos and tokens and tokens[0].special and not prompt.startswith(tokens[0].text):
            tokens = tokens[1:]  # the beginning-of-text token is not part of the text
    return await backend.detokenize(request.model, [token.id for token in tokens])


@dataclass
class Choice:
    """One answer so far: its text, its tokens, and how it ended. ``ended`` is None while it is running."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    ended: Finished | None = None

    @property
    def likelihood(self) -> float:
        """Return the mean log-probability of the answer's tokens; -inf if none is known."""
        values = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(values) / len(values) if values else float("-inf")


class Writer:
    """Turns the events of generations, one per prompt, into one OpenAI response, complete or streamed.

    Answer i of prompt p is the choice with the index p * n + i.
    """

    def __init__(self, body: CompletionBody, request: GenerationRequest, echoed: Sequence[str]) -> None:
        self._body, self._echoed = body, echoed
        self._n, self._candidates = body.n or 1, request.sampling.get("n", 1)
        self._running_usage = openai.RunningUsage(body.stream_options)
        self._hidden = body.limit == 0  # the engine generates at least one token, which is not shown
        self._head = {
            "id": openai.new_id("cmpl"),
            "object": "text_completion",
            "created": openai.now(),
            "model": request.model,
            "system_fingerprint": openai.FINGERPRINT,
        }

    async def whole(self, running: Sequence[AsyncIterator[Event]]) -> dict[str, Any]:
        """Read all events of the generations and return the complete response object."""
        choices, finished = [], []
        for number, match in enumerate(await gather_all([self._read(events) for events in running])):
            prompt, answers = match
            best = (
                sorted(answers, key=lambda one: -one.likelihood)[: self._n] if self._candidates > self._n else answers
            )
            for index, one in enumerate(best):
                choices.append(self._choice(number * self._n + index, self._echoed[number], prompt, one))
            finished += [one.ended for one in answers if one.ended]
        return self._head | {"choices": choices, "usage": self._usage(finished)}

    async def _read(self, events: AsyncIterator[Event]) -> tuple[tuple[TokenInfo, ...], list[Choice]]:
        answers = [Choice() for _ in range(self._candidates)]
        prompt: tuple[TokenInfo, ...] = ()
        async for event in events:
            one = answers[event.index]
            if isinstance(event, Delta):
                if not self._hidden:
                    one.text += event.text
                    one.tokens += event.tokens
            elif isinstance(event, Finished):
                one.ended = event
            elif event.index == 0:
                prompt = event.prompt
        return prompt, answers

    def _choice(self, index: int, echoed: str, prompt: tuple[TokenInfo, ...], one: Choice) -> dict[str, Any]:
        assert one.ended is not None
        logprobs = None
        if self._body.logprobs is not None:
            shown_prompt = prompt if self._body.echo else ()
            offsets = [*prompt_offsets(shown_prompt, echoed), *answer_offsets(one.tokens, echoed)]
            logprobs = self._logprobs([*shown_prompt, *one.tokens], offsets)
        choice = {
            "index": index,
            "text": echoed + one.text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._hidden else openai.finish_reason(one.ended),
            "stop_reason": openai.stop_reason(one.ended),
        }
        return choice | ({"token_ids": [token.id for token in one.tokens]} if self._body.return_token_ids else {})

    def _logprobs(self, tokens: Sequence[TokenInfo], offsets: Sequence[int]) -> dict[str, Any]:
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return {
            "text_offset": offsets,
            "token_logprobs": [token.logprob for token in tokens],
            "tokens": [openai.token_text(token, as_id=as_ids) for token in tokens],
            "top_logprobs": [top_logprobs(token, as_ids=as_ids) for token in tokens],
        }

    def _usage(self, finished: Sequence[Finished]) -> dict[str, Any]:
        used = openai.usage(finished)
        if self._hidden:
            used |= {"completion_tokens": 0, "total_tokens": used["prompt_tokens"]}
        return used

    async def frames(self, running: Sequence[AsyncIterator[Event]]) -> AsyncIterator[bytes]:
        """Yield the encoded events of the streamed response, from the events of the generations."""
        finished: list[Finished] = []
        async for number, event in _merged(running):
            self._running_usage.add(event, number)
            index, echoed = number * self._n + event.index, self._echoed[number]
            if isinstance(event, PromptDone):
                if self._body.echo:
                    yield self._frame(index, echoed, event.prompt, prompt_offsets(event.prompt, echoed))
            elif isinstance(event, Finished):
                finished.append(event)
                yield self._frame(index, "", (), (), event)
            elif not self._hidden and (event.text or self._body.logprobs is not None):
                yield self._frame(index, event.text, event.tokens, answer_offsets(event.tokens, echoed))
        if self._running_usage.included:
            yield sse.frame(self._head | {"choices": [], "usage": self._usage(finished)})
        yield sse.DONE

    def _frame(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenInfo],
        offsets: Sequence[int],
        finished: Finished | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        if self._body.logprobs is not None and tokens:
            choice["logprobs"] = self._logprobs(tokens, offsets)
        choice["finish_reason"] = openai.finish_reason(finished) if finished else None
        if finished:
            choice["stop_reason"] = openai.stop_reason(finished)
        if self._body.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        more = {"usage": self._shown_usage()} if self._running_usage.continuous else {}
        return sse.frame(self._head | {"choices": [choice]} | more)

    def _shown_usage(self) -> dict[str, int] | None:
        used = self._running_usage.shown()
        return used | {"completion_tokens": 0, "total_tokens": used["prompt_tokens"]} if used and self._hidden else used


def prompt_offsets(tokens: Sequence[TokenInfo], text: str) -> list[int]:
    """Return, for each token of a prompt, the index in ``text``, the prompt's text, at which the token begins.

    A special token has a length only if the text contains its name, and SentencePiece's leading space only if the text
    contains this space. A token that is a part of a character has the index of the character.
    """
    data, position, offsets = text.encode(), 0, []
    for token in tokens:
        offsets.append(len(data[:position].decode(errors="ignore")))
        parts = [token.data] if token.special else [token.data, token.data.removeprefix(b" ")]
        position += next((len(part) for part in parts if data.startswith(part, position)), 0)
    return offsets


def answer_offsets(tokens: Sequence[TokenInfo], echoed: str) -> list[int]:
    """Return, for each token of an answer, the index at which it begins in the text of echoed prompt and answer."""
    return [len(echoed) + token.offset for token in tokens]


def top_logprobs(token: TokenInfo, *, as_ids: bool) -> dict[str, float | None] | None:
    """Return the log-probabilities of a token and of its likeliest alternatives, the highest first.

    The keys are the texts of the tokens. If two tokens have the same text, the second has the key ``token_id:...``;
    with ``as_ids``, every token has such a key. The result is None if the token has no log-probability or no
    alternatives.
    """
    if token.logprob is None or not token.top:
        return None
    shown: dict[str, float | None] = {openai.token_text(token, as_id=as_ids): token.logprob}
    for item in token.top:
        if item.id != token.id:
            text = openai.token_text(item, as_id=as_ids)
            shown[f"token_id:{item.id}" if text in shown else text] = item.logprob
    return dict(sorted(shown.items(), key=lambda pair: -(pair[1] or 0.0)))


async def _merged(running: Sequence[AsyncIterator[Event]]) -> AsyncIterator[tuple[int, Event]]:
    """Yield the events of several generations as they come, each with the index of its generation in ``running``."""
    if len(running) == 1:
        async for event in running[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(256)

    async def forward(index: int, events: AsyncIterator[Event]) -> None:
        last: BaseException | None = None
        try:
            async for event in events:
                await queue.put((index, event))
        except Exception as error:
            last = error
        await queue.put((index, last))

    tasks = [asyncio.ensure_future(forward(index, events)) for index, events in enumerate(running)]
    try:
        left = len(tasks)
        while left:
            index, match = await queue.get()
            if isinstance(match, BaseException):
                raise match
            if match is None:
                left -= 1
            else:
                yield index, match
    finally:
        for task in tasks:
            task.cancel()


ENDPOINTS = (
    Endpoint(
        "/v1/completions",
        complete,
        openai_failure,
        sse.openai_broken,
        body=CompletionBody,
        summary="Continue texts or token ids (OpenAI).",
    ),
)
