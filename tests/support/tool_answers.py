"""Answers with tool calls over HTTP: each API, whole and streamed, read into one form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "enum": [1]}, "b": {"enum": ["Łódź", 'a "b"']}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Hi"}]
CHAT = {
    "messages": QUESTION,
    "temperature": 0,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
    "tool_choice": "required",
}
RESPONSES = {
    "input": "Hi",
    "temperature": 0,
    "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
    "tool_choice": "required",
}
ANTHROPIC = {
    "messages": QUESTION,
    "temperature": 0,
    "tools": [{"name": "f", "input_schema": SCHEMA}],
    "tool_choice": {"type": "any"},
}
APIS: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": ("/v1/chat/completions", CHAT, "max_tokens"),
    "invocations": ("/invocations", CHAT, "max_tokens"),
    "responses": ("/v1/responses", RESPONSES, "max_output_tokens"),
    "anthropic": ("/v1/messages", ANTHROPIC, "max_tokens"),
}
"""Path, body without a limit, and the name of the limit of each API; each model must call the tool."""
CUT = {"length", "incomplete", "max_tokens"}
"""What the APIs call the end of an answer that ``max_tokens`` cut."""


@dataclass
class ToolAnswer:
    """An answer: why it ended, its text, and the name and the arguments of each call."""

    reason: str = ""
    text: str = ""
    calls: list[list[str]] = field(default_factory=list)
    parts: int = 0
    """Number of events with arguments."""

    def add_arguments(self, text: str) -> None:
        self.calls[-1][1] += text
        self.parts += bool(text)


def ask(client: httpx.Client, api: str, max_tokens: int, **more: Any) -> ToolAnswer:
    """Return the answer of an API; with ``stream``, it is joined from the events."""
    path, body, limit = APIS[api]
    response = client.post(path, json={"model": "tales", **body, limit: max_tokens, **more}, timeout=120)
    assert response.status_code == 200, response.text
    kind = "chat" if api == "invocations" else api
    if more.get("stream"):
        return STREAMED[kind](read(response.text))
    return WHOLE[kind](response.json())


def read(text: str) -> Iterator[Any]:
    """Return the events of a stream as JSON values."""
    return (json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {"))


def _chat(reply: Any) -> ToolAnswer:
    [choice] = reply["choices"]
    functions = [call["function"] for call in choice["message"].get("tool_calls", ())]
    calls = [[function["name"], function["arguments"]] for function in functions]
    return ToolAnswer(choice["finish_reason"], choice["message"]["content"] or "", calls)


def _streamed_chat(events: Iterator[Any]) -> ToolAnswer:
    out = ToolAnswer()
    for choice in (choice for event in events for choice in event["choices"]):
        out.reason = choice["finish_reason"] or out.reason
        out.text += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls", ()):
            if "name" in part["function"]:
                assert (part["index"], bool(part["id"])) == (len(out.calls), True)
                out.calls.append([part["function"]["name"], ""])
            assert part["index"] == len(out.calls) - 1
            out.add_arguments(part["function"]["arguments"])
    return out


def _responses(reply: Any) -> ToolAnswer:
    out = ToolAnswer(reply["status"])
    for item in reply["output"]:
        if item["type"] == "message":
            out.text += "".join(part["text"] for part in item["content"])
        else:
            out.calls.append([item["name"], item["arguments"]])
            assert item["status"] == ("completed" if _is_json(item["arguments"]) else "incomplete")
    return out


def _streamed_responses(events: Iterator[Any]) -> ToolAnswer:
    out = ToolAnswer()
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_text.delta":
                out.text += event["delta"]
            case "output_item.added" if event["item"]["type"] == "function_call":
                out.calls.append([event["item"]["name"], event["item"]["arguments"]])
            case "function_call_arguments.delta":
                assert event["output_index"] == len(out.calls) - 1
                out.add_arguments(event["delta"])
            case "completed" | "incomplete" | "failed":
                out.reason = event["response"]["status"]
                assert _responses(event["response"]).calls == out.calls
    return out


def _anthropic(reply: Any) -> ToolAnswer:
    out = ToolAnswer(reply["stop_reason"])
    for block in reply["content"]:
        if block["type"] == "text":
            out.text += block["text"]
        else:
            out.calls.append([block["name"], json.dumps(block["input"], ensure_ascii=False)])
    return out


def _streamed_anthropic(events: Iterator[Any]) -> ToolAnswer:
    out, opened, closed = ToolAnswer(), -1, -1
    for event in events:
        match event["type"]:
            case "content_block_start":
                opened = event["index"]
                if event["content_block"]["type"] == "tool_use":
                    out.calls.append([event["content_block"]["name"], ""])
            case "content_block_delta":
                assert event["index"] == opened == closed + 1, "the block is not open"
                if event["delta"]["type"] == "text_delta":
                    out.text += event["delta"]["text"]
                else:
                    out.add_arguments(event["delta"]["partial_json"])
            case "content_block_stop":
                closed = event["index"]
            case "message_delta":
                out.reason = event["delta"]["stop_reason"]
    return out


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


WHOLE = {"chat": _chat, "responses": _responses, "anthropic": _anthropic}
STREAMED = {"chat": _streamed_chat, "responses": _streamed_responses, "anthropic": _streamed_anthropic}
