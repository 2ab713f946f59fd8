"""Anthropic's ``/v1/messages``, whole and streamed, and ``/v1/messages/count_tokens``.

Follows https://platform.claude.com/docs/en/api/messages. Text and tools are understood. What a model of text cannot
read (images, documents), and Anthropic's own tools, are refused by name; thinking in earlier turns is passed over,
as are fields that mean nothing here (``thinking``, ``metadata``, ``cache_control``, ``service_tier``, ...).
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
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Failure, Response

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
BETWEEN = "\n\n"
"""What stands between blocks of text that become one."""


class Message(Struct):
    """One turn. ``content`` may be blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class Tool(Struct):
    """A function that the model may call."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class ToolChoice(Struct):
    """Whether tools may be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class OutputConfig(Struct):
    """What form the answer is to have."""

    format: dict[str, Any] | None = None


class CountBody(Struct, kw_only=True):
    """A conversation."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    model: Annotated[str, Meta(max_length=256)] | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountBody, kw_only=True):
    """A conversation, and how to answer it."""

    max_tokens: openai.Positive
    stop_sequences: Annotated[list[str], Meta(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: openai.Whole | None = None
    top_p: openai.Probability | None = None


# What is asked


def ask_of(body: CountBody, model: str) -> GenerationRequest:
    """Return what a body asks.

    Raises:
        InvalidMessages, InvalidParameter: something in it cannot be.
    """
    messages = [turn for place, message in enumerate(body.messages) for turn in turns(place, message)]
    system = _joined(body.system, "system") if body.system else ""
    if system:
        messages.insert(0, {"role": "system", "content": system})
    last = messages[-1]
    return GenerationRequest(
        model=model,
        messages=tuple(messages),
        sampling=_sampling(body) if isinstance(body, MessagesBody) else {},
        continue_final=last["role"] == "assistant" and not last.get("tool_calls"),
        tools=tuple(_tool(place, tool) for place, tool in enumerate(body.tools or ())),
        tool_choice=_choice(body),
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        grammar=_grammar(body.output_config),
    )


def _sampling(body: MessagesBody) -> dict[str, Any]:
    out: dict[str, Any] = {"max_tokens": body.max_tokens}
    for name in ("temperature", "top_k"):
        if (value := getattr(body, name)) is not None:
            out[name] = value
    if body.top_p is not None:
        out["top_p"] = body.top_p or 1e-9  # a mass of nothing leaves the likeliest token
    if body.stop_sequences:
        out["stop"] = tuple(each for each in body.stop_sequences if each)
    return out


def turns(place: int, message: Message) -> Iterator[dict[str, Any]]:
    """Yield what becomes of one message: a turn, and before it one for each tool's result in it.

    Raises:
        InvalidMessages: a block is of a kind that cannot be read, or not what its kind says.
    """
    role, where = message.role, f"messages[{place}]"
    if isinstance(message.content, str):
        yield {"role": role, "content": message.content}
        return
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    answered = False
    for block in message.content:
        kind = block.get("type")
        if kind == "tool_use" and role == "assistant":
            calls.append(_earlier_call(block, where))
        elif kind == "tool_result" and role == "user":
            if texts:
                yield {"role": role, "content": BETWEEN.join(texts)}
                texts = []
            answered = True
            yield {
                "role": "tool",
                "tool_call_id": _string(block, "tool_use_id", where),
                "content": _result(block, where),
            }
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(_text(block, where))
    if texts or calls or not answered:
        turn: dict[str, Any] = {"role": role, "content": BETWEEN.join(texts)}
        yield turn | ({"tool_calls": calls} if calls else {})


def _text(block: Mapping[str, Any], where: str) -> str:
    if block.get("type") != "text":
        raise InvalidMessages(f"{where} has a block of type {block.get('type')!r:.40}, which this model cannot read")
    return _string(block, "text", where)


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidMessages(f"{where} has a block without {name}, or one that is no text")
    return value


def _joined(content: str | list[Any], where: str) -> str:
    if isinstance(content, str):
        return content
    if not all(isinstance(block, dict) for block in content):
        raise InvalidMessages(f"{where} has a block that is no object")
    return BETWEEN.join(_text(block, where) for block in content)


def _result(block: Mapping[str, Any], where: str) -> str:
    content = block.get("content") or ""
    if not isinstance(content, str | list):
        raise InvalidMessages(f"{where} has a tool's result that is neither text nor blocks")
    return _joined(content, where)


def _earlier_call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise InvalidMessages(f"{where} has a tool_use whose input is no object")
    function = {"name": _string(block, "name", where), "arguments": msgspec.json.encode(given).decode()}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _tool(place: int, tool: Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InvalidParameter("tools", f"tools[{place}] is of type {tool.type!r:.40}, which is not here")
    if tool.input_schema is None:
        raise InvalidParameter("tools", f"tools[{place}] has no input_schema")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _choice(body: CountBody) -> str | dict[str, Any]:
    choice, names = body.tool_choice, [tool.name for tool in body.tools or ()]
    if choice is None or choice.type in ("auto", "none"):
        return "auto" if names and (choice is None or choice.type == "auto") else "none"
    if not names:
        raise InvalidParameter("tool_choice", f"is {choice.type}, but there are no tools")
    if choice.type == "any":
        return "required"
    if choice.name not in names:
        raise InvalidParameter("tool_choice", f"names {choice.name!r:.60}, which is not among the tools")
    return {"type": "function", "function": {"name": choice.name}}


def _grammar(config: OutputConfig | None) -> tuple[str, Any] | None:
    if config is None or config.format is None:
        return None
    schema = config.format.get("schema")
    if config.format.get("type") != "json_schema" or not isinstance(schema, dict):
        raise InvalidParameter("output_config", "expected a format of type json_schema, with a schema")
    return "json_schema", schema


# What is answered


async def messages(context: RequestContext) -> AnyResponse:
    """Answer a conversation."""
    body: MessagesBody = context.body
    request = ask_of(body, openai.model_of(context, body.model))
    events = await context.generate(request)
    writer = Writer(request.model)
    headers = {"request-id": context.http.id}
    if body.stream:
        return EventStream(writer.frames(events), headers)
    return Response(await writer.whole(events), headers=headers)


async def count(context: RequestContext) -> AnyResponse:
    """Tell how many tokens a conversation has."""
    request = ask_of(context.body, openai.model_of(context, context.body.model))
    return Response({"input_tokens": len(await context.backend.tokenize(request))})


class Content:
    """The blocks of an answer as they come. ``add`` and ``close`` yield what a stream says of it."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._calls: dict[int, int] = {}  # a call's place among the calls, and among the blocks
        self._open = False  # whether the last block is

    def add(self, piece: Delta) -> Iterator[bytes]:
        if piece.text:
            if not self._open or self.blocks[-1]["type"] != "text":
                yield from self._begin({"type": "text", "text": ""})
            self.blocks[-1]["text"] += piece.text
            yield self._delta(len(self.blocks) - 1, {"type": "text_delta", "text": piece.text})
        for part in piece.calls:
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
        """Return the blocks as an answer in one piece shows them."""
        return [block | {"input": _object(block["input"])} if "input" in block else block for block in self.blocks]


def _object(arguments: str) -> dict[str, Any]:
    """Return a call's arguments; none of them if ``max_tokens`` cut them off."""
    try:
        found = msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        found = None
    return found if isinstance(found, dict) else {}


class Writer:
    """Turns the events of one request into Anthropic's shapes."""

    def __init__(self, model: str) -> None:
        self._head = {"id": openai.new_id("msg", "_"), "type": "message", "role": "assistant", "model": model}

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        content = Content()
        ended: Finished | None = None
        async for event in events:
            if isinstance(event, Delta):
                for _ in content.add(event):
                    pass
            elif isinstance(event, Finished):
                ended = event
        assert ended is not None, "an answer ended with neither Ended nor an error"
        return self._head | {"content": content.whole(), **why(ended), "usage": usage(ended)}

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        content = Content()
        async for event in events:
            if isinstance(event, PromptDone):
                cost = _cost(event.prompt_tokens, 0, 0)
                unsaid = {"stop_reason": None, "stop_sequence": None, "usage": cost}
                yield frame("message_start", message={**self._head, "content": [], **unsaid})
            elif isinstance(event, Delta):
                for each in content.add(event):
                    yield each
            else:
                for each in content.close():
                    yield each
                yield frame("message_delta", delta=why(event), usage=usage(event))
        yield frame("message_stop")


def why(ended: Finished) -> dict[str, Any]:
    """Return why an answer ended, in Anthropic's words."""
    reason = "max_tokens" if ended.reason == "length" else "end_turn"
    if ended.has_tool_calls:
        reason = "tool_use"
    elif ended.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": ended.stop}


def usage(ended: Finished) -> dict[str, int]:
    """Return what an answer cost; ``input_tokens`` are those that were not in the cache."""
    return _cost(ended.prompt_tokens - ended.cached_tokens, ended.cached_tokens, ended.generated_tokens)


def _cost(read: int, cached: int, written: int) -> dict[str, int]:
    return {
        "input_tokens": read,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": written,
    }


def frame(kind: str, **fields: Any) -> bytes:
    """Return an event of a stream."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


def failure(failure: Failure) -> Any:
    """Return an error as Anthropic's clients read it."""
    kind = KINDS.get(failure.status, "api_error" if failure.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}}


def broken(reason: Failure) -> bytes:
    """Return an error as an event in a stream; nothing follows."""
    return frame("error", error=failure(reason)["error"])


ENDPOINTS = (
    Endpoint("/v1/messages", messages, failure, broken, body=MessagesBody, summary="Answer a conversation."),
    Endpoint("/v1/messages/count_tokens", count, failure, body=CountBody, summary="Count a conversation's tokens."),
)
