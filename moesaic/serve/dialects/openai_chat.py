"""OpenAI's ``/v1/chat/completions``, with vLLM's extras and the forms that Hugging Face's client sends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from moesaic.backend import Delta, Event, Finished, GenerationRequest, PromptDone, ToolCall
from moesaic.errors import InvalidMessages, InvalidParameter
from moesaic.serve import sse
from moesaic.serve.context import RequestContext
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Response, openai_failure


class Message(Struct):
    """One turn. ``content`` may be parts, of which only text is understood."""

    role: Annotated[str, Meta(max_length=32)]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatBody(openai.SamplingFields, kw_only=True):
    """A conversation, and how to answer it."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_tokens: openai.Positive | None = None
    max_completion_tokens: openai.Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


def ask_of(body: ChatBody, model: str) -> GenerationRequest:
    """Return what a body asks.

    Raises:
        InvalidMessages, InvalidParameter: something in it cannot be.
    """
    sampling = openai.sampling(body)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if most is not None:
        sampling["max_tokens"] = most
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise InvalidParameter("top_logprobs", "needs logprobs to be true")
    messages = tuple(_message(place, message) for place, message in enumerate(body.messages))
    goes_on = body.continue_final_message
    if goes_on is None:  # as TGI does, and vLLM where it is told not to begin an answer
        goes_on = body.add_generation_prompt is False and messages[-1]["role"] == "assistant"
    return GenerationRequest(
        model=model,
        messages=messages,
        sampling=sampling,
        continue_final=goes_on,
        tools=tuple(body.tools or ()),
        tool_choice=body.tool_choice or ("auto" if body.tools else "none"),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        grammar=openai.response_grammar(body.response_format) or openai.grammar(body),
        truncate=body.truncate_prompt_tokens,
        skip_special=body.skip_special_tokens is not False,
        priority=body.priority or 0,
    )


def _message(place: int, message: Message) -> Mapping[str, Any]:
    content = message.content
    if isinstance(content, list):
        parts = []
        for part in content:
            if part.get("type") not in ("text", "input_text") or not isinstance(part.get("text"), str):
                raise InvalidMessages(f"messages[{place}] has a part that is no text: this model reads text only")
            parts.append(part["text"])
        content = "".join(parts)
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.tool_calls:
        out |= {"tool_calls": message.tool_calls, "content": content or ""}
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.name is not None and message.role == "tool":
        out["name"] = message.name
    return out


async def chat(context: RequestContext) -> AnyResponse:
    """Answer a conversation."""
    body: ChatBody = context.body
    request = ask_of(body, openai.model_of(context, body.model))
    events = await context.generate(request)
    writer = Writer(body, request.model)
    if body.stream:
        return EventStream(writer.frames(events))
    return Response(await writer.whole(events))


class Writer:
    """Turns the events of one request into OpenAI's shapes."""

    def __init__(self, body: ChatBody, model: str) -> None:
        self._body, self._top = body, body.top_logprobs or 0
        self._head = {
            "id": openai.new_id("chatcmpl"),
            "created": openai.now(),
            "model": model,
            "system_fingerprint": openai.FINGERPRINT,
        }
        options = body.stream_options
        self._usage = bool(options and options.include_usage)

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        count = self._body.n or 1
        texts: list[list[str]] = [[] for _ in range(count)]
        marks: list[list[Any]] = [[] for _ in range(count)]
        calls: list[dict[int, dict[str, str]]] = [{} for _ in range(count)]
        ended: dict[int, Finished] = {}
        prompt: PromptDone | None = None
        async for event in events:
            if isinstance(event, Delta):
                texts[event.index].append(event.text)
                marks[event.index] += event.tokens
                for part in event.calls:
                    _add_call(calls[event.index], part)
            elif isinstance(event, Finished):
                ended[event.index] = event
            elif event.index == 0:
                prompt = event
        choices = [
            self._choice(ended[place], "".join(texts[place]), marks[place], calls[place]) for place in range(count)
        ]
        out = self._head | {"object": "chat.completion", "choices": choices, "usage": openai.usage(ended.values())}
        if self._body.prompt_logprobs is not None and prompt:
            out["prompt_logprobs"] = [
                None if mark.logprob is None else {str(mark.id): {"logprob": mark.logprob, "decoded_token": mark.text}}
                for mark in prompt.prompt
            ]
        return out

    def _choice(self, ended: Finished, text: str, marks: list[Any], calls: dict[int, dict[str, str]]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if calls:
            message["tool_calls"] = [_shown(calls[place]) for place in sorted(calls)]
        choice = {
            "index": ended.index,
            "message": message,
            "logprobs": self._logprobs(marks),
            "finish_reason": openai.finish_reason(ended),
            "stop_reason": openai.stop_reason(ended),
        }
        return choice | ({"token_ids": [mark.id for mark in marks]} if self._body.return_token_ids else {})

    def _logprobs(self, marks: Any) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [openai.logprob_entry(mark, self._top) for mark in marks]}

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        ended: list[Finished] = []
        async for event in events:
            if isinstance(event, PromptDone):
                yield self._frame(event.index, {"role": "assistant", "content": ""}, None)
            elif isinstance(event, Finished):
                ended.append(event)
                yield self._frame(event.index, {}, openai.finish_reason(event), stop_reason=openai.stop_reason(event))
            elif event.text or event.calls or (event.tokens and self._body.logprobs):
                yield self._piece(event)
        if self._usage:
            yield sse.frame(self._chunk([]) | {"usage": openai.usage(ended)})
        yield sse.DONE

    def _piece(self, piece: Delta) -> bytes:
        delta: dict[str, Any] = {"content": piece.text} if piece.text or not piece.calls else {}
        if piece.calls:
            delta["tool_calls"] = [_delta(part) for part in piece.calls]
        more: dict[str, Any] = {"logprobs": self._logprobs(piece.tokens)} if self._body.logprobs else {}
        if self._body.return_token_ids:
            more["token_ids"] = [mark.id for mark in piece.tokens]
        return self._frame(piece.index, delta, None, **more)

    def _frame(self, index: int, delta: dict[str, Any], reason: str | None, **more: Any) -> bytes:
        return sse.frame(self._chunk([{"index": index, "delta": delta, "finish_reason": reason} | more]))

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        chunk = self._head | {"object": "chat.completion.chunk", "choices": choices}
        return chunk | {"usage": None} if self._usage else chunk


def _add_call(calls: dict[int, dict[str, str]], part: ToolCall) -> None:
    known = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
    known["id"], known["name"] = known["id"] or part.id, known["name"] or part.name
    known["arguments"] += part.arguments


def _shown(call: Mapping[str, str]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}


def _delta(part: ToolCall) -> dict[str, Any]:
    if part.name:
        head = {"index": part.index, "id": part.id, "type": "function"}
        return head | {"function": {"name": part.name, "arguments": part.arguments}}
    return {"index": part.index, "function": {"arguments": part.arguments}}


ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions",
        chat,
        openai_failure,
        sse.openai_broken,
        body=ChatBody,
        summary="Answer a conversation.",
    ),
)
