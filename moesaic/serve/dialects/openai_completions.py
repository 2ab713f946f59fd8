"""OpenAI's ``/v1/completions``: plain texts, or token ids, gone on from; with what lm-eval needs to score them."""

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

Ids = Annotated[list[openai.Whole], Meta(min_length=1)]
DEFAULT_TOKENS = 16
"""OpenAI's own default of ``max_tokens``."""


class CompletionBody(openai.SamplingFields, kw_only=True):
    """Prompts, and how to go on from them."""

    prompt: str | list[Any]
    """A text, token ids, or a list of either; told apart in ``prompts_of``."""
    max_tokens: openai.Whole | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=8)] | None = None
    suffix: str | None = None
    response_format: dict[str, Any] | None = None
    add_special_tokens: bool | None = None


def prompts_of(body: CompletionBody, most: int) -> list[str | tuple[int, ...]]:
    """Return the prompts.

    Raises:
        InvalidParameter: they are no texts and no token ids, or too many.
    """
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(each, int) for each in given):
        return [_ids(given)]
    if not given or len(given) > most:
        raise InvalidParameter("prompt", f"holds {len(given)} prompts, expected 1 to {most}")
    return [each if isinstance(each, str) else _ids(each) for each in given]


def _ids(given: Any) -> tuple[int, ...]:
    wrong = not isinstance(given, list) or not given
    if wrong or any(isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 2**31 for id in given):
        raise InvalidParameter("prompt", "expected a text, token ids, or a list of either")
    return tuple(given)


def ask_of(body: CompletionBody, model: str) -> GenerationRequest:
    """Return what a body asks of each prompt, which is not in it yet."""
    if body.suffix:
        raise InvalidParameter("suffix", "is not possible with this model: it was not trained to fill gaps")
    sampling = openai.sampling(body) | {"max_tokens": body.max_tokens or (DEFAULT_TOKENS, 1)[body.max_tokens == 0]}
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None:
        sampling["prompt_logprobs"] = body.logprobs
    if body.best_of is not None:
        if body.best_of < (body.n or 1) or (body.stream and body.best_of > (body.n or 1)):
            raise InvalidParameter("best_of", "must be at least n, and n itself in a stream")
        if body.best_of > (body.n or 1):
            sampling |= {"n": body.best_of, "logprobs": sampling.get("logprobs", 0)}
    return GenerationRequest(
        model=model,
        sampling=sampling,
        grammar=openai.response_grammar(body.response_format) or openai.grammar(body),
        truncate=body.truncate_prompt_tokens,
        add_bos=body.add_special_tokens is not False,
        skip_special=body.skip_special_tokens is not False,
        priority=body.priority or 0,
    )


async def complete(context: RequestContext) -> AnyResponse:
    """Go on from one or more prompts."""
    body: CompletionBody = context.body
    request = ask_of(body, openai.model_of(context, body.model))
    prompts = prompts_of(body, context.settings.prompts)
    asked = [replace(request, prompt=prompt) for prompt in prompts]
    running = [await context.generate(each) for each in asked]
    echoed = [await _text(context, each) if body.echo else "" for each in asked]
    writer = Writer(body, request, echoed)
    if body.stream:
        return EventStream(writer.frames(running))
    return Response(await writer.whole(running))


async def _text(context: RequestContext, request: GenerationRequest) -> str:
    return (
        request.prompt
        if isinstance(request.prompt, str)
        else await context.backend.detokenize(request.model, request.prompt or ())
    )


@dataclass
class One:
    """One answer as far as it has come."""

    text: str = ""
    marks: list[TokenInfo] = field(default_factory=list)
    ended: Finished | None = None

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens."""
        values = [mark.logprob for mark in self.marks if mark.logprob is not None]
        return sum(values) / len(values) if values else float("-inf")


class Writer:
    """Turns the events of requests into OpenAI's shapes; answer i to prompt p is choice p * n + i."""

    def __init__(self, body: CompletionBody, request: GenerationRequest, echoed: Sequence[str]) -> None:
        self._body, self._echoed = body, echoed
        self._n, self._tried = body.n or 1, request.sampling.get("n", 1)
        self._silent = body.max_tokens == 0  # the engine makes one token at least; it is not shown
        self._head = {
            "id": openai.new_id("cmpl"),
            "object": "text_completion",
            "created": openai.now(),
            "model": request.model,
            "system_fingerprint": openai.FINGERPRINT,
        }

    async def whole(self, running: Sequence[AsyncIterator[Event]]) -> dict[str, Any]:
        choices, ended = [], []
        for place, found in enumerate(await gather_all([self._read(events) for events in running])):
            prompt, answers = found
            best = sorted(answers, key=lambda one: -one.likelihood)[: self._n] if self._tried > self._n else answers
            for index, one in enumerate(best):
                choices.append(self._choice(place * self._n + index, self._echoed[place], prompt, one))
            ended += [one.ended for one in answers if one.ended]
        return self._head | {"choices": choices, "usage": self._cost(ended)}

    async def _read(self, events: AsyncIterator[Event]) -> tuple[tuple[TokenInfo, ...], list[One]]:
        answers = [One() for _ in range(self._tried)]
        prompt: tuple[TokenInfo, ...] = ()
        async for event in events:
            one = answers[event.index]
            if isinstance(event, Delta):
                if not self._silent:
                    one.text += event.text
                    one.marks += event.tokens
            elif isinstance(event, Finished):
                one.ended = event
            elif event.index == 0:
                prompt = event.prompt
        return prompt, answers

    def _choice(self, index: int, echoed: str, prompt: tuple[TokenInfo, ...], one: One) -> dict[str, Any]:
        assert one.ended is not None
        logprobs = None
        if self._body.logprobs is not None:
            marks = [*prompt, *one.marks] if self._body.echo else one.marks
            logprobs = self._logprobs(marks, 0)
        choice = {
            "index": index,
            "text": echoed + one.text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._silent else openai.finish_reason(one.ended),
            "stop_reason": openai.stop_reason(one.ended),
        }
        return choice | ({"token_ids": [mark.id for mark in one.marks]} if self._body.return_token_ids else {})

    def _logprobs(self, marks: Sequence[TokenInfo], offset: int) -> dict[str, Any]:
        offsets = []
        for mark in marks:
            offsets.append(offset)
            offset += len(mark.text)
        top = [
            {text: value for _, text, value in mark.top} if mark.logprob is not None and mark.top else None
            for mark in marks
        ]
        return {
            "text_offset": offsets,
            "token_logprobs": [mark.logprob for mark in marks],
            "tokens": [mark.text for mark in marks],
            "top_logprobs": top,
        }

    def _cost(self, ended: Sequence[Finished]) -> dict[str, Any]:
        used = openai.usage(ended)
        if self._silent:
            used |= {"completion_tokens": 0, "total_tokens": used["prompt_tokens"]}
        return used

    async def frames(self, running: Sequence[AsyncIterator[Event]]) -> AsyncIterator[bytes]:
        ended: list[Finished] = []
        offsets: dict[int, int] = {}
        async for place, event in _merged(running):
            index = place * self._n + event.index
            if isinstance(event, PromptDone):
                if self._body.echo:
                    yield self._frame(index, self._echoed[place], event.prompt, None, offsets)
            elif isinstance(event, Finished):
                ended.append(event)
                yield self._frame(index, "", (), event, offsets)
            elif not self._silent and (event.text or self._body.logprobs is not None):
                yield self._frame(index, event.text, event.tokens, None, offsets)
        options = self._body.stream_options
        if options and options.include_usage:
            yield sse.frame(self._head | {"choices": [], "usage": self._cost(ended)})
        yield sse.DONE

    def _frame(
        self, index: int, text: str, marks: Sequence[TokenInfo], ended: Finished | None, offsets: dict[int, int]
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        if self._body.logprobs is not None and marks:
            choice["logprobs"] = self._logprobs(marks, offsets.get(index, 0))
            offsets[index] = offsets.get(index, 0) + sum(len(mark.text) for mark in marks)
        choice["finish_reason"] = openai.finish_reason(ended) if ended else None
        if ended:
            choice["stop_reason"] = openai.stop_reason(ended)
        if self._body.return_token_ids:
            choice["token_ids"] = [mark.id for mark in marks]
        return sse.frame(self._head | {"choices": [choice]})


async def _merged(running: Sequence[AsyncIterator[Event]]) -> AsyncIterator[tuple[int, Event]]:
    """Yield events of several requests as they come, each with its request's place."""
    if len(running) == 1:
        async for event in running[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(256)

    async def pass_on(place: int, events: AsyncIterator[Event]) -> None:
        last: BaseException | None = None
        try:
            async for event in events:
                await queue.put((place, event))
        except Exception as error:
            last = error
        await queue.put((place, last))

    tasks = [asyncio.ensure_future(pass_on(place, events)) for place, events in enumerate(running)]
    try:
        left = len(tasks)
        while left:
            place, found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield place, found
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
        summary="Go on from texts or token ids.",
    ),
)
