"""Routes of Text Generation Inference: continue a text, as one response or token by token.

A stream has one event for each token, and their texts joined are ``generated_text``. Follows the router of TGI 3.3;
docs/how-to/migrate-from-tgi.md lists the differences. TGI's OpenAI routes are those of the OpenAI dialects.
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
from moesaic.serve.dialects._tgi import CheckedParameters, GenerateBody
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Response


@dataclass
class Timing:
    """Times of a request on the monotonic clock, in seconds: when it was received, accepted and started; 0: not yet."""

    received: float = field(default_factory=time.monotonic)
    accepted: float = 0.0
    started: float = 0.0
    """When the first events of the generation came; 0: none came yet."""

    def headers(self, prompt_tokens: int, generated: int) -> dict[str, str]:
        """Return TGI's response headers with times and token counts. ``generated`` counts generated tokens."""
        now = time.monotonic()
        started = self.started or now
        spans = {
            "x-total-time": now - self.received,
            "x-validation-time": self.accepted - self.received,
            "x-queue-time": started - self.accepted,
            "x-inference-time": now - started,
            "x-time-per-token": (now - started) / max(1, generated),
        }
        shown = {name: str(max(0, round(1000 * value))) for name, value in spans.items()}
        counted = {"x-prompt-tokens": str(prompt_tokens), "x-generated-tokens": str(generated)}
        return {"x-compute-time": f"{now - self.received:.6f}"} | shown | counted


@dataclass
class GenerateJob:
    """A request whose parameters were checked, with what is needed to answer it."""

    inputs: str
    parameters: CheckedParameters
    request: GenerationRequest
    timing: Timing

    def requests(self) -> list[GenerationRequest]:
        """Return one generation request for each candidate answer, each with its own seed."""
        sampling = self.request.sampling
        return [replace(self.request, sampling={**sampling, "seed": seed}) for seed in self.parameters.seeds]

    def headers(self, backend: Backend) -> dict[str, str]:
        """Return the response headers that are known before the answer.

        They name the device of the model, so they are made after the model was loaded.
        """
        kind = openai.find_model(backend, self.request.model).about.get("device") or "unknown"
        return {"x-compute-type": str(kind), "x-compute-characters": str(len(self.inputs))}

    def shown(self, text: str) -> str:
        """Return ``text``, the text of an answer, with the prompt before it if ``return_full_text`` was requested."""
        return self.inputs + text if self.parameters.full_text else text

    def seed(self, index: int) -> int | None:
        """Return the seed of the candidate answer with this index; None if answers are greedy."""
        return None if self.parameters.greedy else self.parameters.seeds[index]


def make_job(
    context: RequestContext, body: GenerateBody, *, stream: bool = False, full_text: bool = False
) -> GenerateJob:
    """Check the parameters of a body and return the request. The backend checks the length of the prompt later.

    ``stream`` and ``full_text`` are as for ``check_parameters``.

    Raises:
        InvalidRequest: a parameter is invalid.
    """
    timing, bounds = Timing(), context.settings.tgi
    parameters = tgi.check_parameters(body.parameters, bounds, stream=stream, full_text=full_text)
    if not body.inputs:
        raise InvalidRequest("`inputs` cannot be empty")
    model = openai.find_model(context.backend, None)
    truncate = body.parameters.truncate if body.parameters else None
    tgi.check_truncate(bounds, model.context, truncate)
    request = GenerationRequest(
        model=model.name,
        prompt=body.inputs,
        parse_special=True,
        truncate=truncate,
        limits=TokenLimits(bounds.max_input_tokens, bounds.max_total_tokens),
        sampling=parameters.sampling,
        grammar=parameters.grammar,
    )
    return GenerateJob(body.inputs, parameters, request, timing)


# Answers


class TokenWriter:
    """Turns events of a generation into tokens in TGI's form, each with its text.

    A text of several tokens, such as the parts of one character, is given to the token that completes it. A stop
    string, which TGI counts as part of the answer, belongs to the last token.
    """

    def __init__(self, top: int) -> None:
        self._top, self._pending_text = top, ""
        self._texts: list[str] = []
        self._last: TokenInfo | None = None
        self.ended: Finished | None = None
        self.prompt: tuple[TokenInfo, ...] = ()

    def add(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Return the tokens of these events in TGI's form: objects with ``token``, and ``top_tokens`` if requested.

        If the end of the answer is among the events, at least one token is returned.
        """
        match: list[tuple[TokenInfo, str]] = []
        for event in events:
            if isinstance(event, PromptDone):
                self.prompt = event.prompt
            elif isinstance(event, Finished):
                self.ended = event
                self._pending_text += event.stop or ""
            else:
                match += [(token, "") for token in event.tokens]
                self._pending_text += event.text
                if event.tokens:
                    match[-1] = match[-1][0], self._take_text()
        if match:
            self._last = match[-1][0]
            match[-1] = self._last, match[-1][1] + self._take_text()
        elif self.ended:  # the backend sent the end after the last token, which is repeated
            match = [(self._last or TokenInfo(0, ""), self._take_text())]
        self._texts += [text for _, text in match]
        return [self._entry(token, text) for token, text in match]

    def _take_text(self) -> str:
        text, self._pending_text = self._pending_text, ""
        return text

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def _entry(self, token: TokenInfo, text: str) -> dict[str, Any]:
        out: dict[str, Any] = {"token": _token(token.id, text, token.logprob, token.special)}
        if self._top:
            top = token.top[: self._top]
            out["top_tokens"] = [
                _token(item.id, item.text, item.logprob, token.special and item.id == token.id) for item in top
            ]
        return out


def _token(token_id: int, text: str, logprob: float | None, special: bool) -> dict[str, Any]:
    return {"id": token_id, "text": text, "logprob": logprob, "special": special}


def _finish_reason(finished: Finished) -> str:
    if finished.stop is not None:
        return "stop_sequence"
    return "eos_token" if finished.reason == "stop" else "length"


@dataclass
class Candidate:
    """One candidate answer to a prompt (``best_of``). ``seed`` is None if the answer is greedy."""

    tokens: TokenWriter
    entries: list[dict[str, Any]]
    seed: int | None

    @property
    def likelihood(self) -> float:
        """Return the mean log-probability of the answer's tokens. The candidate with the highest is the best answer."""
        values = [value for item in self.entries if (value := item["token"]["logprob"]) is not None]
        return sum(values) / len(values) if values else float("-inf")

    def details(self) -> dict[str, Any]:
        """Return the object ``details`` of TGI's response for this answer."""
        finished = self.tokens.ended
        assert finished is not None, "a stream ended with neither Finished nor an error"
        prefill = [{"id": m.id, "text": m.text, "logprob": m.logprob} for m in self.tokens.prompt]
        out = {
            "finish_reason": _finish_reason(finished),
            "generated_tokens": finished.generated_tokens,
            "seed": self.seed,
            "prefill": prefill,
            "tokens": [item["token"] for item in self.entries],
        }
        tops = [item["top_tokens"] for item in self.entries if "top_tokens" in item]
        return out | ({"top_tokens": tops} if tops else {})


async def best_answer(context: RequestContext, job: GenerateJob) -> tuple[dict[str, Any], dict[str, str]]:
    """Generate all candidate answers. Return the response body with the most likely one, and the response headers."""
    running = [await context.generate_in_batches(request) for request in job.requests()]
    job.timing.accepted = time.monotonic()
    answers = await gather_all([_read(job, index, batches) for index, batches in enumerate(running)])
    best = max(answers, key=lambda one: one.likelihood)
    out: dict[str, Any] = {"generated_text": job.shown(best.tokens.text)}
    if job.parameters.details:
        details = best.details()
        if len(answers) > 1:
            others = [one for one in answers if one is not best]
            details["best_of_sequences"] = [
                {"generated_text": job.shown(one.tokens.text)} | one.details() for one in others
            ]
        out["details"] = details
    finished = best.tokens.ended
    assert finished is not None
    return out, job.headers(context.backend) | job.timing.headers(finished.prompt_tokens, finished.generated_tokens)


async def _read(job: GenerateJob, index: int, batches: AsyncIterator[list[Event]]) -> Candidate:
    one = Candidate(TokenWriter(job.parameters.sampling["logprobs"]), [], job.seed(index))
    async for batch in batches:
        job.timing.started = job.timing.started or time.monotonic()
        one.entries += one.tokens.add(batch)
    return one


async def frames(job: GenerateJob, batches: AsyncIterator[list[Event]]) -> AsyncIterator[bytes]:
    """Yield an encoded event for each token. The last one also has the answer's whole text and the details."""
    tokens, index = TokenWriter(job.parameters.sampling["logprobs"]), 0
    async for batch in batches:
        shown = tokens.add(batch)
        for number, item in enumerate(shown):
            index += 1
            last = tokens.ended is not None and number == len(shown) - 1
            end = _end(job, tokens) if last else {"generated_text": None, "details": None}
            yield sse.frame({"index": index} | item | end)


def _end(job: GenerateJob, tokens: TokenWriter) -> dict[str, Any]:
    finished = tokens.ended
    assert finished is not None
    details = {
        "finish_reason": _finish_reason(finished),
        "generated_tokens": finished.generated_tokens,
        "seed": job.seed(0),
        "input_length": finished.prompt_tokens,
    }
    return {"generated_text": job.shown(tokens.text), "details": details if job.parameters.details else None}


# Routes


async def generate(context: RequestContext) -> AnyResponse:
    """Handle ``/generate``: continue a text."""
    content, headers = await best_answer(context, make_job(context, context.body))
    return Response(content, headers=headers)


async def generate_stream(context: RequestContext) -> AnyResponse:
    """Handle ``/generate_stream``: continue a text, with one event for each token."""
    return await _streamed(context, make_job(context, context.body, stream=True))


async def _streamed(context: RequestContext, job: GenerateJob) -> EventStream:
    [request] = job.requests()
    return EventStream(frames(job, await context.generate_in_batches(request)), job.headers(context.backend))


async def compat(context: RequestContext) -> AnyResponse:
    """Handle ``/``: continue a text as Hugging Face's inference API does, with a list of one answer or a stream."""
    return await compatible(context, context.body)


async def compatible(context: RequestContext, body: GenerateBody) -> AnyResponse:
    if body.stream:
        return await _streamed(context, make_job(context, body, stream=True, full_text=True))
    content, headers = await best_answer(context, make_job(context, body, full_text=True))
    return Response([content], headers=headers)


OTHER_ROUTES = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
"""Routes that ``/invocations`` (SageMaker) selects for a body, by the field that such a body has."""


async def invocations(context: RequestContext) -> AnyResponse:
    """Handle ``/invocations`` (SageMaker): answer a body of TGI's ``/``, of chat completions or of completions."""
    for key, path in OTHER_ROUTES.items():
        if key in context.body:
            endpoint = next(item for item in context.services.endpoints if item.path == path)
            return await endpoint.run(replace(context, body=context.fit(context.body, endpoint.body)))
    return await compatible(context, context.fit(context.body, GenerateBody))


class VertexBody(Struct):
    """The body of a request of Google's Vertex AI."""

    instances: Annotated[list[GenerateBody], Meta(min_length=1)]


async def vertex(context: RequestContext) -> AnyResponse:
    """Handle ``/vertex`` (Google's Vertex AI): continue several texts."""
    instances = context.body.instances
    if len(instances) > context.settings.prompts:
        raise InvalidParameter("instances", f"has {len(instances)} entries; the limit is {context.settings.prompts}")
    jobs = [make_job(context, item) for item in instances]
    match = await gather_all([best_answer(context, job) for job in jobs])
    return Response({"predictions": [content["generated_text"] for content, _ in match]})


ENDPOINTS = (
    *(
        Endpoint(path, compat, tgi.failure, tgi.broken, body=GenerateBody, summary="Continue a text (TGI).")
        for path in ("/", "/v1", "/v1/")
    ),
    Endpoint("/generate", generate, tgi.failure, body=GenerateBody, summary="Continue a text (TGI)."),
    Endpoint(
        "/generate_stream",
        generate_stream,
        tgi.failure,
        tgi.broken,
        body=GenerateBody,
        summary="Continue a text, token by token (TGI).",
    ),
    Endpoint(
        "/invocations",
        invocations,
        tgi.failure,
        tgi.broken,
        body=dict[str, Any],
        summary="Answer a body of TGI's, chat or completions routes (SageMaker).",
    ),
    Endpoint("/vertex", vertex, tgi.failure, body=VertexBody, summary="Go on from several texts (Vertex AI)."),
)
