"""Text Generation Inference's own routes: go on from a text, whole or token by token.

A stream has one event for each token; the texts of all of them, joined, are ``generated_text``. Before the first
byte an error is a status, in a stream it is an event and no end follows. Follows TGI 3.3's router; docs/tgi.md has
what differs. Its OpenAI routes are OpenAI's here.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from msgspec import Meta, Struct

from moesaic.backend import Backend, Event, Finished, GenerationRequest, PromptDone, TokenInfo, TokenLimits
from moesaic.errors import InvalidParameter, InvalidRequest
from moesaic.serve import sse
from moesaic.serve.concurrency import gather_all
from moesaic.serve.context import RequestContext
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.dialects import _tgi as tgi
from moesaic.serve.dialects._tgi import GenerateBody, Wanted
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Response
from moesaic.serve.json_body import fit


@dataclass
class Times:
    """When a request came, was taken in, and began to be read; seconds of one clock."""

    came: float = field(default_factory=time.monotonic)
    queued: float = 0.0
    began: float = 0.0

    def headers(self, prompt_tokens: int, generated: int) -> dict[str, str]:
        """Return how long everything took, as TGI tells it."""
        now = time.monotonic()
        began = self.began or now
        spans = {
            "x-total-time": now - self.came,
            "x-validation-time": self.queued - self.came,
            "x-queue-time": began - self.queued,
            "x-inference-time": now - began,
            "x-time-per-token": (now - began) / max(1, generated),
        }
        shown = {name: str(max(0, round(1000 * value))) for name, value in spans.items()}
        counted = {"x-prompt-tokens": str(prompt_tokens), "x-generated-tokens": str(generated)}
        return {"x-compute-time": f"{now - self.came:.6f}"} | shown | counted


@dataclass
class Job:
    """A request that was found good: what is asked for, and of whom."""

    inputs: str
    wanted: Wanted
    request: GenerationRequest
    times: Times

    def asks(self) -> list[GenerationRequest]:
        """Return one request for each answer to choose from, each with its own seed."""
        sampling = self.request.sampling
        return [replace(self.request, sampling={**sampling, "seed": seed}) for seed in self.wanted.seeds]

    def headers(self, backend: Backend) -> dict[str, str]:
        """Return the headers that are known before the answer. The model is loaded by then."""
        kind = openai.card_of(backend, self.request.model).about.get("device") or "unknown"
        return {"x-compute-type": str(kind), "x-compute-characters": str(len(self.inputs))}

    def shown(self, text: str) -> str:
        """Return an answer's text, with the prompt in front if that was asked for."""
        return self.inputs + text if self.wanted.full_text else text

    def seed(self, place: int) -> int | None:
        """Return the seed of an answer; None where nothing was drawn."""
        return None if self.wanted.greedy else self.wanted.seeds[place]


def job_of(context: RequestContext, body: GenerateBody, *, stream: bool = False, full_text: bool = False) -> Job:
    """Return what a body asks for, checked as far as it can be before a model has it.

    Raises:
        InvalidRequest: something in it cannot be.
    """
    times, bounds = Times(), context.settings.tgi
    wanted = tgi.checked(body.parameters, bounds, stream=stream, full_text=full_text)
    if not body.inputs:
        raise InvalidRequest("`inputs` cannot be empty")
    card = openai.card_of(context.backend, None)
    truncate = body.parameters.truncate if body.parameters else None
    tgi.check_truncate(bounds, card.context, truncate)
    request = GenerationRequest(
        model=card.name,
        prompt=body.inputs,
        parse_special=True,
        truncate=truncate,
        limits=TokenLimits(bounds.max_input_tokens, bounds.max_total_tokens),
        sampling=wanted.sampling,
        grammar=wanted.grammar,
    )
    return Job(body.inputs, wanted, request, times)


# Answers


class Tokens:
    """Tokens of an answer as they come, each with the text that it shows.

    Text that was held back until it was complete belongs to the token that completed it; a stop string, which
    belongs to the answer in TGI, to the last one.
    """

    def __init__(self, top: int) -> None:
        self._top, self._carry = top, ""
        self._texts: list[str] = []
        self._last: TokenInfo | None = None
        self.ended: Finished | None = None
        self.prompt: tuple[TokenInfo, ...] = ()

    def add(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Return the tokens in these events, each as ``{"token", "top_tokens"?}``; at the end there is at least one."""
        found: list[tuple[TokenInfo, str]] = []
        for event in events:
            if isinstance(event, PromptDone):
                self.prompt = event.prompt
            elif isinstance(event, Finished):
                self.ended = event
                self._carry += event.stop or ""
            else:
                found += [(mark, "") for mark in event.tokens]
                self._carry += event.text
                if event.tokens:
                    found[-1] = found[-1][0], self._taken()
        if found:
            self._last = found[-1][0]
            found[-1] = self._last, found[-1][1] + self._taken()
        elif self.ended:  # a door that sends the end apart from the last token: that one is named once more
            found = [(self._last or TokenInfo(0, ""), self._taken())]
        self._texts += [text for _, text in found]
        return [self._shown(mark, text) for mark, text in found]

    def _taken(self) -> str:
        text, self._carry = self._carry, ""
        return text

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def _shown(self, mark: TokenInfo, text: str) -> dict[str, Any]:
        out: dict[str, Any] = {"token": _token(mark.id, text, mark.logprob, mark.special)}
        if self._top:
            top = mark.top[: self._top]
            out["top_tokens"] = [_token(id, piece, value, mark.special and id == mark.id) for id, piece, value in top]
        return out


def _token(id: int, text: str, logprob: float | None, special: bool) -> dict[str, Any]:
    return {"id": id, "text": text, "logprob": logprob, "special": special}


def _reason(ended: Finished) -> str:
    if ended.stop is not None:
        return "stop_sequence"
    return "eos_token" if ended.reason == "stop" else "length"


@dataclass
class One:
    """A whole answer, and its seed."""

    tokens: Tokens
    shown: list[dict[str, Any]]
    seed: int | None

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens, by which the best of several is chosen."""
        values = [value for each in self.shown if (value := each["token"]["logprob"]) is not None]
        return sum(values) / len(values) if values else float("-inf")

    def details(self) -> dict[str, Any]:
        """Return all that is known of it."""
        ended = self.tokens.ended
        assert ended is not None, "an answer ended with neither its end nor an error"
        prefill = [{"id": m.id, "text": m.text, "logprob": m.logprob} for m in self.tokens.prompt]
        out = {
            "finish_reason": _reason(ended),
            "generated_tokens": ended.generated_tokens,
            "seed": self.seed,
            "prefill": prefill,
            "tokens": [each["token"] for each in self.shown],
        }
        tops = [each["top_tokens"] for each in self.shown if "top_tokens" in each]
        return out | ({"top_tokens": tops} if tops else {})


async def answered(context: RequestContext, job: Job) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the whole answer, of several the best, and its headers."""
    running = [await context.generate_in_batches(request) for request in job.asks()]
    job.times.queued = time.monotonic()
    answers = await gather_all([_read(job, place, batches) for place, batches in enumerate(running)])
    best = max(answers, key=lambda one: one.likelihood)
    out: dict[str, Any] = {"generated_text": job.shown(best.tokens.text)}
    if job.wanted.details:
        details = best.details()
        if len(answers) > 1:
            others = [one for one in answers if one is not best]
            details["best_of_sequences"] = [
                {"generated_text": job.shown(one.tokens.text)} | one.details() for one in others
            ]
        out["details"] = details
    ended = best.tokens.ended
    assert ended is not None
    return out, job.headers(context.backend) | job.times.headers(ended.prompt_tokens, ended.generated_tokens)


async def _read(job: Job, place: int, batches: AsyncIterator[list[Event]]) -> One:
    one = One(Tokens(job.wanted.sampling["logprobs"]), [], job.seed(place))
    async for batch in batches:
        job.times.began = job.times.began or time.monotonic()
        one.shown += one.tokens.add(batch)
    return one


async def frames(job: Job, batches: AsyncIterator[list[Event]]) -> AsyncIterator[bytes]:
    """Yield an event for each token; the last has the text and the details."""
    tokens, index = Tokens(job.wanted.sampling["logprobs"]), 0
    async for batch in batches:
        shown = tokens.add(batch)
        for place, each in enumerate(shown):
            index += 1
            last = tokens.ended is not None and place == len(shown) - 1
            end = _end(job, tokens) if last else {"generated_text": None, "details": None}
            yield sse.frame({"index": index} | each | end)


def _end(job: Job, tokens: Tokens) -> dict[str, Any]:
    ended = tokens.ended
    assert ended is not None
    details = {
        "finish_reason": _reason(ended),
        "generated_tokens": ended.generated_tokens,
        "seed": job.seed(0),
        "input_length": ended.prompt_tokens,
    }
    return {"generated_text": job.shown(tokens.text), "details": details if job.wanted.details else None}


# Routes


async def generate(context: RequestContext) -> AnyResponse:
    """Go on from a text."""
    content, headers = await answered(context, job_of(context, context.body))
    return Response(content, headers=headers)


async def generate_stream(context: RequestContext) -> AnyResponse:
    """Go on from a text, token by token."""
    return await _streamed(context, job_of(context, context.body, stream=True))


async def _streamed(context: RequestContext, job: Job) -> EventStream:
    [request] = job.asks()
    return EventStream(frames(job, await context.generate_in_batches(request)), job.headers(context.backend))


async def compat(context: RequestContext) -> AnyResponse:
    """Go on from a text as Hugging Face's clients ask for it: a list of one answer, or a stream."""
    return await compatible(context, context.body)


async def compatible(context: RequestContext, body: GenerateBody) -> AnyResponse:
    if body.stream:
        return await _streamed(context, job_of(context, body, stream=True, full_text=True))
    content, headers = await answered(context, job_of(context, body, full_text=True))
    return Response([content], headers=headers)


OTHERS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
"""By which key of a body SageMaker's route knows that it is for another one."""


async def invocations(context: RequestContext) -> AnyResponse:
    """Answer as SageMaker asks: a body of ``/``, of the chat or of the completions."""
    for key, path in OTHERS.items():
        if key in context.body:
            endpoint = next(each for each in context.services.endpoints if each.path == path)
            return await endpoint.run(replace(context, body=fit(context.body, endpoint.body)))
    return await compatible(context, fit(context.body, GenerateBody))


class VertexBody(Struct):
    """Texts to go on from, as Google's Vertex AI sends them."""

    instances: Annotated[list[GenerateBody], Meta(min_length=1)]


async def vertex(context: RequestContext) -> AnyResponse:
    """Go on from several texts at once."""
    instances = context.body.instances
    if len(instances) > context.settings.prompts:
        raise InvalidParameter("instances", f"holds {len(instances)}, at most {context.settings.prompts} are taken")
    jobs = [job_of(context, each) for each in instances]
    found = await gather_all([answered(context, job) for job in jobs])
    return Response({"predictions": [content["generated_text"] for content, _ in found]})


ENDPOINTS = (
    *(
        Endpoint(path, compat, tgi.failure, tgi.broken, body=GenerateBody, summary="Go on from a text (TGI).")
        for path in ("/", "/v1", "/v1/")
    ),
    Endpoint("/generate", generate, tgi.failure, body=GenerateBody, summary="Go on from a text (TGI)."),
    Endpoint(
        "/generate_stream",
        generate_stream,
        tgi.failure,
        tgi.broken,
        body=GenerateBody,
        summary="Go on from a text, token by token (TGI).",
    ),
    Endpoint(
        "/invocations",
        invocations,
        tgi.failure,
        tgi.broken,
        body=dict[str, Any],
        summary="Answer any of these bodies (SageMaker).",
    ),
    Endpoint("/vertex", vertex, tgi.failure, body=VertexBody, summary="Go on from several texts (Vertex AI)."),
)
