"""Mistral's chat formats.

The formats follow mistral-common for each tokenizer version: which texts are encoded together, the order of the keys in
a tool call, and where the tools are listed. The module ``chat_choice`` decides which version a checkpoint uses.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from moesaic.text._turns import Variables, bos, eos, prepend_system, without_system
from moesaic.text.messages import Message
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import ToolCall, Tools

DELIMITERS = {"user": ("[INST]", "[/INST]"), "system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")}


def encode_v1(messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None, _variables: Variables) -> list[int]:
    """Return the token ids of a conversation in version 1 of Mistral's format.

    ``[INST]`` is plain text, and the system prompt is in the first user turn. If the last message is the assistant's,
    no end-of-text token follows it, so that the model continues it.
    """
    system, turns = without_system(messages)
    ids = bos(tokenizer)
    for index, turn in enumerate(prepend_system(turns, 0, system)):
        if turn["role"] == "user":
            ids += tokenizer.encode(f"[INST] {turn['content']} [/INST]")
        else:
            ids += tokenizer.encode(turn["content"])
            ids += eos(tokenizer) if index < len(turns) - 1 else []
    return ids


def encoder(version: int) -> Callable[[list[Message], Tokenizer, Tools | None, Variables], list[int]]:
    """Return the function that encodes conversations in ``version`` 2 or later, which have control tokens.

    In versions 2 and 3, the system prompt is in the last user turn.
    """

    def build(messages: list[Message], tokenizer: Tokenizer, tools: Tools | None, _variables: Variables) -> list[int]:
        if version < 7:
            system, turns = without_system(messages)
            last = max(index for index, turn in enumerate(turns) if turn["role"] == "user")
            messages = prepend_system(turns, last, system)
        return _encode(messages, tokenizer, tools, version)

    return build


def _encode(messages: list[Message], tokenizer: Tokenizer, tools: Tools | None, version: int) -> list[int]:
    """Return the token ids of a conversation in one version.

    If the last message is the assistant's, no end-of-text token follows it, so that the model continues it.
    """
    writer = _Writer(tokenizer, version)
    users = [index for index, turn in enumerate(messages) if turn["role"] == "user"]
    last = users[-1] if users else -1
    tools_index = (users[0] if version >= 13 else last) if users else -1
    ids = bos(tokenizer)
    for index, turn in enumerate(_sort_results(messages) if version >= 11 else messages):
        if version == 2 and index < last and (turn["role"] == "tool" or turn.get("tool_calls")):
            continue  # version 2 drops the tool calls of earlier questions
        if index == tools_index and tools is not None:
            ids += writer.tool_list(tools)
        if turn["role"] == "assistant":
            ids += writer.answer(turn, closed=index < len(messages) - 1)
        elif turn["role"] == "tool":
            ids += writer.result(turn)
        else:
            ids += writer.block(*DELIMITERS[turn["role"]], turn["content"])
    return ids


def _sort_results(messages: list[Message]) -> list[Message]:
    """Return the conversation with the tool results in the order of their calls."""
    order: dict[str, int] = {}
    out: list[Message] = []
    for turn in messages:
        index = len(out)
        if turn["role"] != "tool":
            order = {call.id: number for number, call in enumerate(turn.get("tool_calls", ()))}
        else:
            call_number = order[turn["tool_call_id"]]
            while out[index - 1]["role"] == "tool" and order[out[index - 1]["tool_call_id"]] > call_number:
                index -= 1
        out.insert(index, turn)
    return out


class _Writer:
    """Encodes messages, tool calls, tool results and the list of tools in one version of the format."""

    def __init__(self, tokenizer: Tokenizer, version: int) -> None:
        self._tokenizer, self._control, self._version = tokenizer, tokenizer.control, version

    def block(self, start: str, end: str, text: str) -> list[int]:
        return [self._control[start], *self._tokenizer.encode(text), self._control[end]]

    def tool_list(self, tools: Tools) -> list[int]:
        definitions = [tool.to_openai(always=True) for tool in tools.offered]
        return self.block("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", _json(definitions))

    def answer(self, turn: Message, *, closed: bool) -> list[int]:
        ids = self._tokenizer.encode(turn["content"].rstrip(" "))
        ids += self._calls(turn.get("tool_calls", []))
        return ids + (eos(self._tokenizer) if closed else [])

    def _calls(self, calls: list[ToolCall]) -> list[int]:
        if not calls:
            return []
        if self._version >= 11:
            return [token_id for call in calls for token_id in self._call(call)]
        call_list = _json([self._call_object(call) for call in calls])
        return [self._control["[TOOL_CALLS]"], *self._tokenizer.encode(call_list)]

    def _call(self, call: ToolCall) -> list[int]:
        encode, control = self._tokenizer.encode, self._control
        call_id = [control["[CALL_ID]"], *encode(short_id(call.id))] if self._version < 13 else []
        arguments = encode(_json(_json_or_text(call.arguments)))
        return [control["[TOOL_CALLS]"], *encode(call.name), *call_id, control["[ARGS]"], *arguments]

    def _call_object(self, call: ToolCall) -> dict[str, Any]:
        fields = {"name": call.name, "arguments": _json_or_text(call.arguments)}
        return fields if self._version < 3 else fields | {"id": short_id(call.id)}

    def result(self, turn: Message) -> list[int]:
        call_id, content = short_id(turn["tool_call_id"]), turn["content"]
        if self._version == 2:
            text = _json([{"name": turn["name"], "content": _json_or_text(content or "{}")}])
        elif self._version == 3:
            text = _json({"content": _json_or_text(content or "{}"), "call_id": call_id})
        else:
            text = content
        ids = self.block("[TOOL_RESULTS]", "[/TOOL_RESULTS]", text)
        if 7 <= self._version < 13:
            ids[1:1] = [*self._tokenizer.encode(call_id), self._control["[TOOL_CONTENT]"]]
        return ids


def short_id(call_id: str) -> str:
    """Return a call id with nine letters and digits, as Mistral's formats require.

    An id that has this form already stays as it is. Otherwise the result is the beginning of its hash, so equal ids
    give equal results.
    """
    if re.fullmatch(r"[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:9]


def _json_or_text(text: str) -> Any:
    """Return the value of ``text`` if it is JSON, otherwise ``text`` itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
