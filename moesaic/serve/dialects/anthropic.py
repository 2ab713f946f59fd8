"""Anthropic's ``/v1/messages``, complete and streamed, and ``/v1/messages/count_tokens``.

Follows https://platform.claude.com/docs/en/api/messages. Text and tools are supported. Images, documents and
Anthropic's own tools are refused with an error that names them. Thinking blocks in earlier messages are ignored, as are
``metadata``, ``service_tier`` and ``cache_control``. Unknown fields, such as ``thinking``, are named in a
header of the response.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from moesaic.backend import Delta, Event, Finished, GenerationRequest, PromptDone, ToolCall
from moesaic.errors import InvalidMessages, InvalidParameter
from moesaic.serve.context import RequestContext
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.dialects._arguments import parse_partial
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Failure, Response

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
BLOCK_SEPARATOR = "\n\n"
"""Separator between the texts of text blocks that are joined."""


class Message(Struct):
    """One message of a conversation. ``content`` is a text or a list of content blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class Tool(Struct):
    """A function that the model may call."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    cache_control: Any = None
    """Accepted without an effect: prefixes of prompts are always cached."""


class ToolChoice(Struct):
    """Whether the model may or must call tools, and which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(Struct):
    """The format that the answer must have, such as a JSON schema."""

    format: dict[str, Any] | None = None


class CountBody(Struct, kw_only=True):
    """The body of a token count request."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    model: Annotated[str, Meta(max_length=256)] | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    """Accepted without an effect: prefixes of prompts are always cached."""
    chat_template_kwargs: dict[str, Any] | None = None  # as vLLM's route takes it


class MessagesBody(CountBody, kw_only=True):
    """The body of a messages request."""

    max_tokens: openai.PositiveInt
    stop_sequences: Annotated[list[str], Meta(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: openai.NonNegativeInt | None = None
    top_p: openai.Probability | None = None
    # Accepted without an effect: they concern the statistics and the price of Anthropic's service.
    metadata: Any = None
    service_tier: Any = None


# Requests


def to_request(body: CountBody, model: str) -> GenerationRequest:
    """Convert a body to a generation request for the model named ``model``.

    Raises:
        InvalidMessages, InvalidParameter: a message or a parameter is invalid.
    """
    messages = [turn for index, message in enumerate(body.messages) for turn in turns(index, message)]
    system = _joined(body.system, "system") if body.system else ""
    if system:
        messages.insert(0, {"role": "system", "content": system})
    last = messages[-1]
    return GenerationRequest(
        model=model,
        messages=tuple(messages),
        sampling=_sampling(body) if isinstance(body, MessagesBody) else {},
        continue_final=last["role"] == "assistant" and not last.get("tool_calls"),
        tools=tuple(_tool(index, tool) for index, tool in enumerate(body.tools or ())),
        tool_choice=_choice(body),
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        chat_template_kwargs=body.chat_template_kwargs or {},
        grammar=_grammar(body.output_config),
        grammar_param="output_config",
    )


def _sampling(body: MessagesBody) -> dict[str, Any]:
    out: dict[str, Any] = {"max_tokens": body.max_tokens}
    for name in ("temperature", "top_k"):
        if (value := getattr(body, name)) is not None:
            out[name] = value
    if body.top_p is not None:
        out["top_p"] = body.top_p or 1e-9  # 0 means greedy: only the likeliest token is left
    if body.stop_sequences:
        out["stop"] = tuple(item for item in body.stop_sequences if item)
    return out


def turns(index: int, message: Message) -> Iterator[dict[str, Any]]:
    """Convert one message of Anthropic's API to messages as chat completions have them.

    There is one for each tool result in it, and one for its text and tool calls. ``index`` is the message's place in
    the request, for error messages.

    Raises:
        InvalidMessages: a block has an unsupported type, or lacks a field of its type.
    """
    role, where = message.role, f"messages[{index}]"
    if isinstance(message.content, str):
        yield {"role": role, "content": message.content}
        return
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    has_results = False
    for block in message.content:
        kind = block.get("type")
        if kind == "tool_use" and role == "assistant":
            calls.append(_earlier_call(block, where))
        elif kind == "tool_result" and role == "user":
            if texts:
                yield {"role": role, "content": BLOCK_SEPARATOR.join(texts)}
                texts = []
            has_results = True
            yield {
                "role": "tool",
                "tool_call_id": _string(block, "tool_use_id", where),
                "content": _result(block, where),
            }
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(_text(block, where))
    if texts or calls or not has_results:
        turn: dict[str, Any] = {"role": role, "content": BLOCK_SEPARATOR.join(texts)}
        yield turn | ({"tool_calls": calls} if calls else {})


def _text(block: Mapping[str, Any], where: str) -> str:
    if block.get("type") != "text":
        raise InvalidMessages(f"{where} has a block of type {block.get('type')!r:.40}, which is not supported")
    return _string(block, "text", where)


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidMessages(f"{where} has a block whose {name} is missing or not a string")
    return value


def _joined(content: str | list[Any], where: str) -> str:
    if isinstance(content, str):
        return content
    if not all(isinstance(block, dict) for block in content):
        raise InvalidMessages(f"{where} has a block that is not an object")
    return BLOCK_SEPARATOR.join(_text(block, where) for block in content)


def _result(block: Mapping[str, Any], where: str) -> str:
    content = block.get("content") or ""
    if not isinstance(content, str | list):
        raise InvalidMessages(f"{where} has a tool result that is neither text nor a list of blocks")
    return _joined(content, where)


def _earlier_call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise InvalidMessages(f"{where} has a tool_use whose input is not an object")
    function = {"name": _string(block, "name", where), "arguments": msgspec.json.encode(arguments).decode()}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _tool(index: int, tool: Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InvalidParameter("tools", f"tools[{index}] has the unsupported type {tool.type!r:.40}")
    if tool.input_schema is None:
        raise InvalidParameter("tools", f"tools[{index}] has no input_schema")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _choice(body: CountBody) -> str | dict[str, Any]:
    choice, names = body.tool_choice, [tool.name for tool in body.tools or ()]
    if choice is None or choice.type in ("auto", "none"):
        return "auto" if names and (choice is None or choice.type == "auto") else "none"
    if not names:
        raise InvalidParameter("tool_choice", f"is {choice.type}, but the request has no tools")
    if choice.type == "any":
        return "required"
    if choice.name not in names:
        raise InvalidParameter("tool_choice", f"names {choice.name!r:.60}, which is not one of the tools")
    return {"type": "function", "function": {"name": choice.name}}


def _grammar(config: OutputConfig | None) -> tuple[str, Any] | None:
    if config is None or config.format is None:
        return None
    schema = config.format.get("schema")
    if config.format.get("type") != "json_schema" or not isinstance(schema, dict):
        raise InvalidParameter("output_config", "expected a format of type json_schema with a schema")
    return "json_schema", schema


# Responses


async def messages(context: RequestContext) -> AnyResponse:
    """Handle ``/v1/messages``: answer a conversation, as a complete response or as a stream."""
    body: MessagesBody = context.body
    request = to_request(body, openai.model_name(context, body.model))
    events = await context.generate(request)
    writer = Writer(request.model)
    headers = {"request-id": context.http.id}
    if body.stream:
        return EventStream(writer.frames(events), headers)
    return Response(await writer.whole(events), headers=headers)


async def count(context: RequestContext) -> AnyResponse:
    """Handle ``/v1/messages/count_tokens``: return the number of tokens of a conversation's prompt."""
    request = to_request(context.body, openai.model_name(context, context.body.model))
    return Response({"input_tokens": len(await context.backend.tokenize(request))})


class ContentBlocks:
    """The content blocks of an answer so far.

    ``add`` and ``close`` change the blocks and yield the encoded stream events for the change.
    """

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._calls: dict[int, int] = {}  # index of a tool call -> index of its block
        self._open = False  # whether the last block is open

    def add(self, piece: Delta) -> Iterator[bytes]:
        known = len(self._calls)
        for part in piece.calls:
            if part.index < known:  # the text after it closes its block
                yield from self._part(part)
        if piece.text:
            if not self._open or self.blocks[-1]["type"] != "text":
                yield from self._begin({"type": "text", "text": ""})
            self.blocks[-1]["text"] += piece.text
            yield self._delta(len(self.blocks) - 1, {"type": "text_delta", "text": piece.text})
        for part in piece.calls:
            if part.index >= known:
                yield from self._part(part)

    def _part(self, part: ToolCall) -> Iterator[bytes]:
        if part.index not in self._calls:
            self._calls[part.index] = len(self.blocks)
            name = part.id or openai.new_id("toolu", "_")
            yield from self._begin({"type": "tool_use", "id": name, "name": part.name, "input": ""})
        index = self._calls[part.index]
        self.blocks[index]["input"] += part.arguments
        yield self._delta(index, {"type": "input_json_delta", "partial_json": part.arguments})

    def _begin(self, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self.close()
        shown = dict(block) | ({"input": {}} if block["type"] == "tool_use" else {})
        self.blocks.append(block)
        self._open = True
        yield frame("content_block_start", index=len(self.blocks) - 1, content_block=shown)
        if len(self.blocks) == 1:
            yield frame("ping")

    def _delta(self, index: int, delta: dict[str, Any]) -> bytes:
        return frame("content_block_delta", index=index, delta=delta)

    def close(self) -> Iterator[bytes]:
        if self._open:
            self._open = False
            yield frame("content_block_stop", index=len(self.blocks) - 1)

    def whole(self) -> list[dict[str, Any]]:
        """Return the content blocks for a complete response, with the arguments of tool calls as objects."""
        return [
            block | {"input": parse_partial(block["input"])} if "input" in block else block for block in self.blocks
        ]


class Writer:
    """Turns the events of one generation into Anthropic's response: an object (``whole``) or a stream (``frames``)."""

    def __init__(self, model: str) -> None:
        self._head = {"id": openai.new_id("msg", "_"), "type": "message", "role": "assistant", "model": model}

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        content = ContentBlocks()
        finished: Finished | None = None
        async for event in events:
            if isinstance(event, Delta):
                for _ in content.add(event):
                    pass
            elif isinstance(event, Finished):
                finished = event
        assert finished is not None, "a stream ended with neither Finished nor an error"
        return self._head | {"content": content.whole(), **stop_fields(finished), "usage": usage(finished)}

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        content = ContentBlocks()
        async for event in events:
            if isinstance(event, PromptDone):
                cost = _usage(event.prompt_tokens, 0, 0)
                unknown = {"stop_reason": None, "stop_sequence": None, "usage": cost}
                yield frame("message_start", message={**self._head, "content": [], **unknown})
            elif isinstance(event, Delta):
                for item in content.add(event):
                    yield item
            else:
                for item in content.close():
                    yield item
                yield frame("message_delta", delta=stop_fields(event), usage=usage(event))
        yield frame("message_stop")


def stop_fields(finished: Finished) -> dict[str, Any]:
    """Return the fields ``stop_reason`` and ``stop_sequence`` of Anthropic's response for an answer that has ended."""
    reason = "end_turn"
    if finished.reason == "length":
        reason = "max_tokens"
    elif finished.has_tool_calls:
        reason = "tool_use"
    elif finished.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": finished.stop}


def usage(finished: Finished) -> dict[str, int]:
    """Return Anthropic's ``usage`` object. ``input_tokens`` counts the prompt tokens that were not in the cache."""
    return _usage(finished.prompt_tokens - finished.cached_tokens, finished.cached_tokens, finished.generated_tokens)


def _usage(read: int, cached: int, written: int) -> dict[str, int]:
    return {
        "input_tokens": read,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": written,
    }


def frame(kind: str, **fields: Any) -> bytes:
    """Return an encoded stream event of the type ``kind``, in Anthropic's form. ``fields`` are its other data."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


def failure(failure: Failure) -> Any:
    """Return the body of an error response in Anthropic's form."""
    kind = ERROR_TYPES.get(failure.status, "api_error" if failure.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": _message_of(failure)}}


def _message_of(failure: Failure) -> str:
    """Return the message of an error.

    If the prompt is too long, it begins with Anthropic's own words, because clients look for them.
    """
    if failure.tokens is None or failure.limit is None:
        return failure.message
    return f"prompt is too long: {failure.tokens} tokens > {failure.limit} maximum. {failure.message}"


def broken(reason: Failure) -> bytes:
    """Return an error, encoded as the last event of a stream in Anthropic's form."""
    return frame("error", error=failure(reason)["error"])


ENDPOINTS = (
    Endpoint("/v1/messages", messages, failure, broken, body=MessagesBody, summary="Answer a conversation."),
    Endpoint("/v1/messages/count_tokens", count, failure, body=CountBody, summary="Count a conversation's tokens."),
)
