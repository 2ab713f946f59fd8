"""OpenAI's ``/v1/responses``: an answer to items, kept for a while so that a conversation can go on from it.

What is kept lies in memory, for each key alone; see ``serve.kept``. Answers in the background, hosted tools and
conversations that OpenAI keeps are refused; fields that mean nothing here (``include`` of hosted tools, ``reasoning``,
``service_tier``, ``prompt_cache_key``, ...) are accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from moesaic.backend import GenerationRequest
from moesaic.errors import InvalidParameter, InvalidRequest, NotFound
from moesaic.serve.context import RequestContext
from moesaic.serve.dialects import _items as items
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.dialects import _response as response
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Failure, Response, openai_failure
from moesaic.serve.response_store import StoredResponse

LOGPROBS = "message.output_text.logprobs"
Tag = Annotated[str, Meta(max_length=64)]
Label = Annotated[str, Meta(max_length=512)]


class TextConfig(Struct):
    """What form the text is to have."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseBody(openai.SamplingFields, kw_only=True):
    """Items, and how to answer them; vLLM's extras are understood as in chat completions."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: openai.Positive | None = None
    text: TextConfig | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    metadata: Annotated[dict[Tag, Label], Meta(max_length=16)] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None

    @property
    def form(self) -> dict[str, Any] | None:
        """What form is asked for."""
        return self.text.format if self.text else None

    @property
    def top(self) -> int | None:
        """How many alternatives to each token are asked for; None: no probabilities at all."""
        return self.top_logprobs or (0 if LOGPROBS in (self.include or ()) else None)


def ask_of(body: ResponseBody, model: str, earlier: Sequence[Mapping[str, Any]]) -> GenerationRequest:
    """Return what a body asks, as the next turn after ``earlier`` ones.

    Raises:
        InvalidMessages, InvalidParameter: something in it cannot be.
    """
    for name, why in (
        ("background", "answers are not made in the background here: ask for a stream"),
        ("conversation", "conversations are not kept here: use previous_response_id"),
        ("prompt", "prompts are not kept here: send the text itself"),
    ):
        if getattr(body, name):
            raise InvalidParameter(name, why)
    if body.n not in (None, 1):
        raise InvalidParameter("n", "a response has one answer")
    sampling = openai.sampling(body)
    sampling.pop("prompt_logprobs", None)
    if body.max_output_tokens is not None:
        sampling["max_tokens"] = body.max_output_tokens
    if body.top is not None:
        sampling["logprobs"] = body.top
    told = ({"role": "system", "content": body.instructions},) if body.instructions else ()
    tools = items.tools(body.tools or ())
    return GenerationRequest(
        model=model,
        messages=(*told, *earlier, *items.turns(items.as_items(body.input))),
        sampling=sampling,
        tools=tools,
        tool_choice=items.tool_choice(body.tool_choice, any_tools=bool(tools)),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        grammar=items.grammar(body.form) or openai.grammar(body),
        truncate=body.truncate_prompt_tokens,
        skip_special=body.skip_special_tokens is not False,
        priority=body.priority or 0,
    )


async def create(context: RequestContext) -> AnyResponse:
    """Answer items, and keep the answer."""
    body: ResponseBody = context.body
    kept, owner = context.services.responses, context.key.sha256
    earlier = _earlier(context, body.previous_response_id)
    request = ask_of(body, openai.model_of(context, body.model), earlier)
    if body.truncation == "auto":
        request = await fitted(context, request)
    head = shown(body, request.model)

    def keep(done: dict[str, Any]) -> None:
        if body.store is not False:
            said = items.turns(done["output"])
            asked = (request.messages or ())[bool(body.instructions) :]  # instructions are for one answer alone
            kept.put(owner, done["id"], StoredResponse(done, items.listed(body.input), (*asked, *said)))

    writer = response.Writer(head, body.top, keep)
    events = await context.generate(request)
    if body.stream:
        return EventStream(writer.frames(events), broken=writer.failed)
    return Response(await writer.whole(events))


def _earlier(context: RequestContext, name: str | None) -> tuple[Mapping[str, Any], ...]:
    if name is None:
        return ()
    try:
        return context.services.responses.get(context.key.sha256, name).messages
    except NotFound as error:
        raise InvalidParameter("previous_response_id", str(error)) from None


async def fitted(context: RequestContext, request: GenerationRequest) -> GenerationRequest:
    """Return the request without as many of the oldest turns as need be for the rest to be read whole.

    System messages in front stay, and what goes ends where a user's turn begins.
    """
    window = openai.card_of(context.backend, request.model).context
    turns = request.messages or ()
    if window is None:
        return request
    room = window - request.sampling.get("max_tokens", 1)
    head = next((place for place, turn in enumerate(turns) if turn["role"] != "system"), 0)
    starts = [place for place, turn in enumerate(turns) if place >= head and turn["role"] == "user"] or [head]
    sizes: dict[int, int] = {}

    def without(start: int) -> GenerationRequest:
        return replace(request, messages=(*turns[:head], *turns[start:]))

    async def size(start: int) -> int:
        if start not in sizes:
            sizes[start] = len(await context.backend.tokenize(without(start)))
        return sizes[start]

    if await size(head) <= room:
        return request
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await size(starts[middle]) <= room else (middle + 1, high)
    return without(starts[low])


def shown(body: ResponseBody, model: str) -> dict[str, Any]:
    """Return what of a response is known before it is answered."""
    return {
        "id": openai.new_id("resp", "_"),
        "object": "response",
        "created_at": openai.now(),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": body.form or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


# What is kept


def _entry(context: RequestContext) -> StoredResponse:
    return context.services.responses.get(context.key.sha256, context.path_parameters["id"])


async def retrieve(context: RequestContext) -> AnyResponse:
    """Show a response again."""
    if context.query.get("stream") == "true":
        raise InvalidParameter("stream", "what is kept is whole: it is not streamed again")
    return Response(_entry(context).shown)


async def delete(context: RequestContext) -> AnyResponse:
    """Keep a response no longer."""
    name = context.path_parameters["id"]
    context.services.responses.drop(context.key.sha256, name)
    return Response({"id": name, "object": "response", "deleted": True})


async def cancel(context: RequestContext) -> AnyResponse:
    """Refuse: a response that is kept has ended, and one that runs ends when its connection is closed."""
    _entry(context)
    raise InvalidRequest("this response has ended; one that runs is cancelled by closing its connection")


async def input_items(context: RequestContext) -> AnyResponse:
    """List what a response answers, the last first unless ``order`` is ``asc``."""
    given, query = list(_entry(context).input_items), context.query
    order, most = query.get("order", "desc"), query.get("limit", "20")
    if order not in ("asc", "desc"):
        raise InvalidParameter("order", "expected asc or desc")
    if not (most.isascii() and most.isdigit() and len(most) < 4 and 1 <= int(most) <= 100):
        raise InvalidParameter("limit", "expected 1 to 100")
    if order == "desc":
        given.reverse()
    if (after := query.get("after")) is not None:
        names = [item["id"] for item in given]
        if after not in names:
            raise InvalidParameter("after", "is the id of none of the items")
        given = given[names.index(after) + 1 :]
    data, more = given[: int(most)], len(given) > int(most)
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": "", "last_id": ""}
    return Response({"object": "list", "data": data, "has_more": more} | ends)


def failure(reason: Failure) -> Any:
    """Return an error as OpenAI does where no model is asked for."""
    error = openai_failure(reason)["error"]
    return {"error": error | ({"code": None} if reason.status == 404 else {})}


ONE = "/v1/responses/{id}"
LISTING = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
    "order": {"enum": ["asc", "desc"], "default": "desc"},
    "after": {"type": "string"},
}

ENDPOINTS = (
    Endpoint("/v1/responses", create, openai_failure, response.broken, body=ResponseBody, summary="Answer items."),
    Endpoint(ONE, retrieve, failure, method="GET", summary="Show a response again."),
    Endpoint(ONE, delete, failure, method="DELETE", summary="Keep a response no longer."),
    Endpoint(f"{ONE}/cancel", cancel, failure, summary="Refused: what is kept has ended."),
    Endpoint(
        f"{ONE}/input_items",
        input_items,
        failure,
        method="GET",
        query=LISTING,
        summary="List what a response answers.",
    ),
)
