"""OpenAI's ``/v1/responses``: answers that are kept for a while, so that a conversation can continue from one.

Responses are kept in memory, separately for each key (``serve.response_store``). Background responses, hosted tools and
stored conversations are refused. ``include`` of hosted tools, ``service_tier`` and ``prompt_cache_key`` are ignored.
Unknown fields, such as ``reasoning``, are named in a header of the response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from moesaic.backend import GenerationRequest
from moesaic.errors import InvalidParameter, InvalidRequest, NotFound, PromptTooLong
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
    """The field ``text`` of a request: the format of the answer's text."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseBody(openai.SamplingFields, kw_only=True):
    """The body of a response request, with vLLM's extensions as in chat completions."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: openai.PositiveInt | None = None
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
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def form(self) -> dict[str, Any] | None:
        """Return ``text.format``, the format that the answer must have; None: the body sets none."""
        return self.text.format if self.text else None

    @property
    def top(self) -> int | None:
        """Return the requested number of alternatives for each token; None: log-probabilities are not requested."""
        return self.top_logprobs or (0 if LOGPROBS in (self.include or ()) else None)


def to_request(body: ResponseBody, model: str, earlier: Sequence[Mapping[str, Any]]) -> GenerationRequest:
    """Convert a body to a generation request for the model named ``model``.

    ``earlier`` has the messages of the conversation that the body continues.

    Raises:
        InvalidMessages, InvalidParameter: an item or a parameter is invalid.
    """
    for name, why in (
        ("background", "background responses are not supported; use a stream"),
        ("conversation", "stored conversations are not supported; use previous_response_id"),
        ("prompt", "stored prompts are not supported; send the text itself"),
    ):
        if getattr(body, name):
            raise InvalidParameter(name, why)
    if body.n not in (None, 1):
        raise InvalidParameter("n", "must be 1 for a response")
    sampling = openai.sampling(body)
    sampling.pop("prompt_logprobs", None)
    if body.max_output_tokens is not None:
        sampling["max_tokens"] = body.max_output_tokens
    if body.top is not None:
        sampling["logprobs"] = body.top
    instructions = ({"role": "system", "content": body.instructions},) if body.instructions else ()
    tools = items.tools(body.tools or ())
    return GenerationRequest(
        model=model,
        messages=(*instructions, *earlier, *items.turns(items.as_items(body.input))),
        sampling=sampling,
        tools=tools,
        tool_choice=items.tool_choice(body.tool_choice, any_tools=bool(tools)),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        chat_template_kwargs=body.chat_template_kwargs or {},
        truncate=openai.truncation(body.truncate_prompt_tokens),
        skip_special=body.skip_special_tokens is not False,
        include_stop=bool(body.include_stop_str_in_output),
        priority=body.priority or 0,
        **openai.grammar_fields(body, "text.format", items.grammar(body.form)),
    )


async def create(context: RequestContext) -> AnyResponse:
    """Handle ``/v1/responses``: answer the input items, and keep the response unless ``store`` is false."""
    body: ResponseBody = context.body
    kept, owner = context.services.responses, context.key.sha256
    earlier = _earlier(context, body.previous_response_id)
    request = to_request(body, openai.model_name(context, body.model), earlier)
    if body.truncation == "auto":
        request = await fitted(context, request)
    head = shown(body, request.model)

    def keep(done: dict[str, Any]) -> None:
        if body.store is not False:
            said = items.turns(done["output"])
            asked = (request.messages or ())[bool(body.instructions) :]  # instructions apply to one response only
            kept.put(owner, done["id"], StoredResponse(done, items.listed(body.input), (*asked, *said)))

    writer = response.Writer(head, body.top, keep, as_ids=bool(body.return_tokens_as_token_ids))
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
    """Return the request, without its oldest messages if it would not fit the model's context.

    As few messages as possible are removed. Leading system messages stay, and the first message after them is a
    user's.
    """
    window = openai.find_model(context.backend, request.model).context
    turns = request.messages or ()
    if window is None:
        return request
    room = window - request.sampling.get("max_tokens", 1)
    head = next((index for index, turn in enumerate(turns) if turn["role"] != "system"), 0)
    starts = [index for index, turn in enumerate(turns) if index >= head and turn["role"] == "user"] or [head]
    sizes: dict[int, int] = {}

    def without(start: int) -> GenerationRequest:
        return replace(request, messages=(*turns[:head], *turns[start:]))

    async def size(start: int) -> int:
        if start not in sizes:
            try:
                sizes[start] = len(await context.backend.tokenize(without(start)))
            except PromptTooLong:  # too long to be tokenized at all
                sizes[start] = window + 1
        return sizes[start]

    if await size(head) <= room:
        return request
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await size(starts[middle]) <= room else (middle + 1, high)
    return without(starts[low])


def shown(body: ResponseBody, model: str) -> dict[str, Any]:
    """Return the response object as it is before the generation: with the fields that the request decides."""
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


# Kept responses


def _entry(context: RequestContext) -> StoredResponse:
    return context.services.responses.get(context.key.sha256, context.path_parameters["id"])


async def retrieve(context: RequestContext) -> AnyResponse:
    """Handle GET ``/v1/responses/{id}``: return a kept response."""
    if context.query.get("stream") == "true":
        raise InvalidParameter("stream", "a kept response cannot be streamed again")
    return Response(_entry(context).shown)


async def delete(context: RequestContext) -> AnyResponse:
    """Handle DELETE ``/v1/responses/{id}``: delete a kept response."""
    name = context.path_parameters["id"]
    context.services.responses.drop(context.key.sha256, name)
    return Response({"id": name, "object": "response", "deleted": True})


async def cancel(context: RequestContext) -> AnyResponse:
    """Refuse to cancel: a kept response has ended, and a running one is cancelled by closing its connection."""
    _entry(context)
    raise InvalidRequest("this response has ended; a running one is cancelled by closing its connection")


async def input_items(context: RequestContext) -> AnyResponse:
    """List the input items of a kept response, the last first unless the query has ``order=asc``."""
    values, query = list(_entry(context).input_items), context.query
    order, limit = query.get("order", "desc"), query.get("limit", "20")
    if order not in ("asc", "desc"):
        raise InvalidParameter("order", "expected asc or desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= 100):
        raise InvalidParameter("limit", "expected 1 to 100")
    if order == "desc":
        values.reverse()
    if (after := query.get("after")) is not None:
        names = [item["id"] for item in values]
        if after not in names:
            raise InvalidParameter("after", "is not the id of an item")
        values = values[names.index(after) + 1 :]
    data, more = values[: int(limit)], len(values) > int(limit)
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": "", "last_id": ""}
    return Response({"object": "list", "data": data, "has_more": more} | ends)


def failure(reason: Failure) -> Any:
    """Return the body of an error response in OpenAI's form. With status 404, its ``code`` is null.

    The usual code, ``model_not_found``, would be wrong for a response that does not exist.
    """
    error = openai_failure(reason)["error"]
    return {"error": error | ({"code": None} if reason.status == 404 else {})}


ONE = "/v1/responses/{id}"
LISTING = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
    "order": {"enum": ["asc", "desc"], "default": "desc"},
    "after": {"type": "string"},
}

ENDPOINTS = (
    Endpoint(
        "/v1/responses",
        create,
        openai_failure,
        response.stream_error,
        body=ResponseBody,
        summary="Answer items (OpenAI responses).",
    ),
    Endpoint(ONE, retrieve, failure, method="GET", summary="Return a kept response."),
    Endpoint(ONE, delete, failure, method="DELETE", summary="Delete a kept response."),
    Endpoint(f"{ONE}/cancel", cancel, failure, summary="Always refused: kept responses have ended."),
    Endpoint(
        f"{ONE}/input_items",
        input_items,
        failure,
        method="GET",
        query=LISTING,
        summary="List the input items of a response.",
    ),
)
