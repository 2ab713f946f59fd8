"""OpenAI's ``/v1/chat/completions``, with vLLM's extensions and the forms that Hugging Face's client sends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from msgspec import Meta

from moesaic.backend import Delta, Event, Finished, GenerationRequest, PromptDone, ToolCall
from moesaic.errors import InvalidParameter
from moesaic.serve import sse
from moesaic.serve.context import RequestContext
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.dialects._messages import Messages, ToolDefinitions, conversation
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Response, openai_failure


class ChatBody(openai.SamplingFields, kw_only=True):
    """The body of a chat completion."""

    messages: Messages
    max_tokens: openai.PositiveInt | None = None
    max_completion_tokens: openai.PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: ToolDefinitions | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def to_request(body: ChatBody, model: str) -> GenerationRequest:
    """Convert a body to a generation request for the model named ``model``.

    Raises:
        InvalidMessages, InvalidParameter: a message or a parameter is invalid.
    """
    sampling = openai.sampling(body)
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise InvalidParameter("top_logprobs", "requires logprobs to be true")
    return GenerationRequest(
        model=model,
        sampling=sampling,
        truncate=openai.truncation(body.truncate_prompt_tokens),
        skip_special=body.skip_special_tokens is not False,
        include_stop=bool(body.include_stop_str_in_output),
        priority=body.priority or 0,
        **conversation(body.messages, body),
        **openai.grammar_fields(body, "response_format", openai.response_grammar(body.response_format)),
    )


async def chat(context: RequestContext) -> AnyResponse:
    """Handle ``/v1/chat/completions``: answer a conversation, as a complete response or as a stream."""
    body: ChatBody = context.body
    request = to_request(body, openai.model_name(context, body.model))
    events = await context.generate(request)
    writer = Writer(body, request.model)
    if body.stream:
        return EventStream(writer.frames(events))
    return Response(await writer.whole(events))


class Writer:
    """Turns the events of one generation into OpenAI's response: an object (``whole``) or a stream (``frames``)."""

    def __init__(self, body: ChatBody, model: str) -> None:
        self._body, self._top = body, body.top_logprobs or 0
        self._head = {
            "id": openai.new_id("chatcmpl"),
            "created": openai.now(),
            "model": model,
            "system_fingerprint": openai.FINGERPRINT,
        }
        self._running_usage = openai.RunningUsage(body.stream_options)
        self._usage = self._running_usage.included

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """Read all events of the generation and return the complete response object."""
        count = self._body.n or 1
        texts: list[list[str]] = [[] for _ in range(count)]
        tokens: list[list[Any]] = [[] for _ in range(count)]
        calls: list[dict[int, dict[str, str]]] = [{} for _ in range(count)]
        finished: dict[int, Finished] = {}
        prompt: PromptDone | None = None
        async for event in events:
            if isinstance(event, Delta):
                texts[event.index].append(event.text)
                tokens[event.index] += event.tokens
                for part in event.calls:
                    _add_call(calls[event.index], part)
            elif isinstance(event, Finished):
                finished[event.index] = event
            elif event.index == 0:
                prompt = event
        choices = [
            self._choice(finished[index], "".join(texts[index]), tokens[index], calls[index]) for index in range(count)
        ]
        out = self._head | {"object": "chat.completion", "choices": choices, "usage": openai.usage(finished.values())}
        if self._body.prompt_logprobs is not None and prompt:
            out["prompt_logprobs"] = [
                None
                if token.logprob is None
                else {str(token.id): {"logprob": token.logprob, "decoded_token": token.text}}
                for token in prompt.prompt
            ]
        return out

    def _choice(
        self, finished: Finished, text: str, tokens: list[Any], calls: dict[int, dict[str, str]]
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if calls:
            message["tool_calls"] = [_tool_call(calls[index]) for index in sorted(calls)]
        choice = {
            "index": finished.index,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": openai.finish_reason(finished),
            "stop_reason": openai.stop_reason(finished),
        }
        return choice | ({"token_ids": [token.id for token in tokens]} if self._body.return_token_ids else {})

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return {"content": [openai.token_logprob(token, self._top, as_ids=as_ids) for token in tokens]}

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """Yield the encoded events of the streamed response, from the events of the generation."""
        finished: list[Finished] = []
        async for event in events:
            self._running_usage.add(event)
            if isinstance(event, PromptDone):
                yield self._frame(event.index, {"role": "assistant", "content": ""}, None)
            elif isinstance(event, Finished):
                finished.append(event)
                yield self._frame(event.index, {}, openai.finish_reason(event), stop_reason=openai.stop_reason(event))
            elif event.text or event.calls or (event.tokens and self._body.logprobs):
                yield self._delta_frame(event)
        if self._usage:
            yield sse.frame(self._chunk([]) | {"usage": openai.usage(finished)})
        yield sse.DONE

    def _delta_frame(self, event: Delta) -> bytes:
        delta: dict[str, Any] = {"content": event.text} if event.text or not event.calls else {}
        if event.calls:
            delta["tool_calls"] = [_tool_call_delta(part) for part in event.calls]
        more: dict[str, Any] = {"logprobs": self._logprobs(event.tokens)} if self._body.logprobs else {}
        if self._body.return_token_ids:
            more["token_ids"] = [token.id for token in event.tokens]
        return self._frame(event.index, delta, None, **more)

    def _frame(self, index: int, delta: dict[str, Any], reason: str | None, **more: Any) -> bytes:
        return sse.frame(self._chunk([{"index": index, "delta": delta, "finish_reason": reason} | more]))

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        chunk = self._head | {"object": "chat.completion.chunk", "choices": choices}
        return chunk | {"usage": self._running_usage.shown()} if self._usage else chunk


def _add_call(calls: dict[int, dict[str, str]], part: ToolCall) -> None:
    call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
    call["id"], call["name"] = call["id"] or part.id, call["name"] or part.name
    call["arguments"] += part.arguments


def _tool_call(call: Mapping[str, str]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}


def _tool_call_delta(part: ToolCall) -> dict[str, Any]:
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
        summary="Answer a conversation (OpenAI).",
    ),
)
