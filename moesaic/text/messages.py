"""Validation of conversations: messages, tool calls and tool results.

This module does not depend on chat formats, which turn a validated conversation into token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from moesaic.errors import InvalidMessages
from moesaic.text.tools import NAME, ToolCall

ROLES = ("system", "user", "assistant", "tool")
JOIN = "\n\n"  # separates texts that are joined into one message
MAX_ID_CHARS = 256


class Message(TypedDict):
    """Message of a conversation; ``role`` is system, user, assistant or tool.

    A message of the assistant may have ``tool_calls``. A message of a tool has ``tool_call_id`` and the ``name`` of
    the tool that was called.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


def validate(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Check a conversation; return it with consecutive messages of the same role joined by an empty line.

    Tool results are not joined. Validating the returned conversation again does not change it.

    Raises:
        InvalidMessages: there are no messages, a role is unknown, content is missing or not a string, a tool result
            refers to no call, or a call has no result before the next question.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InvalidMessages("messages must be a list of objects with role and content")
    if not messages:
        raise InvalidMessages("messages is empty: add at least one message")
    turns: list[Message] = []
    open_calls: dict[str, str] = {}  # names of the calls without a result, by id
    for index, message in enumerate(messages):
        turn = _check(index, message)
        if turn["role"] == "tool":
            _match_result(index, turn, open_calls)
        elif open_calls and not (turn["role"] == "assistant" and turns[-1]["role"] == "assistant"):
            raise InvalidMessages(
                f"messages[{index}] must come after the results of all tool calls; {len(open_calls)} missing"
            )
        for call in turn.get("tool_calls", ()):
            if call.id in open_calls:
                raise InvalidMessages(f"messages[{index}] has two tool calls with the id {call.id!r:.80}")
            open_calls[call.id] = call.name
        if turns and turns[-1]["role"] == turn["role"] != "tool":
            _join(turns[-1], turn)
        else:
            turns.append(turn)
    if open_calls:
        raise InvalidMessages(f"tool results are missing at the end: add {len(open_calls)} tool messages")
    return turns


def _join(turn: Message, more: Message) -> None:
    calls = [*turn.get("tool_calls", ()), *more.get("tool_calls", ())]
    if not calls:
        turn["content"] += JOIN + more["content"]
        return
    turn["content"] = JOIN.join(filter(None, (turn["content"], more["content"])))
    turn["tool_calls"] = calls


def _match_result(index: int, turn: Message, open_calls: dict[str, str]) -> None:
    """Remove the call that the tool result ``turn`` answers from ``open_calls``, which maps call ids to tool names.

    A result without a ``name`` gets the name of the tool.
    """
    call_id = turn["tool_call_id"]
    if call_id not in open_calls:
        raise InvalidMessages(f"messages[{index}] is the result of {call_id!r:.80}, but no open tool call has this id")
    turn.setdefault("name", open_calls[call_id])
    del open_calls[call_id]


def _check(index: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidMessages(f"messages[{index}] must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InvalidMessages(
            f"messages[{index}] has the unknown role {role!r:.80}; available roles: {', '.join(ROLES)}"
        )
    calls = message.get("tool_calls") if role == "assistant" else None
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        problem = "no content" if content is None else f"content of type {type(content).__name__}"
        raise InvalidMessages(f"messages[{index}] has {problem}; it must be a string")
    turn: Message = {"role": role, "content": content}
    if calls:
        turn["tool_calls"] = _calls(index, calls)
    if role == "tool":
        turn["tool_call_id"] = _id(f"messages[{index}].tool_call_id", message.get("tool_call_id"))
        if message.get("name") is not None:
            turn["name"] = _name(f"messages[{index}].name", message["name"])
    return turn


def _calls(index: int, calls: Any) -> list[ToolCall]:
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise InvalidMessages(f"messages[{index}].tool_calls must be a list")
    return [_call(f"messages[{index}].tool_calls[{number}]", call) for number, call in enumerate(calls)]


def _call(where: str, call: Any) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidMessages(f"{where} must be an object with id and function")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidMessages(f"{where}.function.arguments cannot be written as JSON") from error
    if not isinstance(arguments, str | None):
        raise InvalidMessages(f"{where}.function.arguments must be the text of a JSON object")
    return ToolCall(
        _id(f"{where}.id", call.get("id")), _name(f"{where}.function.name", function.get("name")), arguments or "{}"
    )


def _id(where: str, call_id: Any) -> str:
    if not isinstance(call_id, str) or not 1 <= len(call_id) <= MAX_ID_CHARS:
        raise InvalidMessages(f"{where} must be a string of 1 to {MAX_ID_CHARS} characters")
    return call_id


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidMessages(f"{where} must be 1 to 64 letters, digits, _ or -")
    return name
