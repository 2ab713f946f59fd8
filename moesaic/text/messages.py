"""What a conversation is: turns, calls of tools and their results, before any chat format sees them.

Knows which conversations make sense. Does not know how a format writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from moesaic.errors import InvalidMessages
from moesaic.text.tools import NAME, Call

ROLES = ("system", "user", "assistant", "tool")
JOIN = "\n\n"  # between texts that become one message
MAX_ID = 256


class Message(TypedDict):
    """One turn: ``role`` is system, user, assistant or tool.

    An assistant's may have ``tool_calls``; a tool's has ``tool_call_id`` and the ``name`` of what was called.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[Call]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


def validate(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the conversation with consecutive turns of one role joined by an empty line.

    Results of tools stay apart. What this returns may be given to it again.

    Raises:
        InvalidMessages: no messages, an unknown role, content that is missing or no string, or a result
            without a call, or a call without a result before the conversation goes on.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InvalidMessages("messages must be a list of objects with role and content")
    if not messages:
        raise InvalidMessages("messages is empty: at least one is needed")
    turns: list[Message] = []
    open_calls: dict[str, str] = {}  # id -> name of what has no result yet
    for place, message in enumerate(messages):
        turn = _checked(place, message)
        if turn["role"] == "tool":
            _answer(place, turn, open_calls)
        elif open_calls and not (turn["role"] == "assistant" and turns[-1]["role"] == "assistant"):
            raise InvalidMessages(f"messages[{place}] goes on before {len(open_calls)} of the calls have a result")
        for call in turn.get("tool_calls", ()):
            if call.id in open_calls:
                raise InvalidMessages(f"messages[{place}] has two calls with the id {call.id!r:.80}")
            open_calls[call.id] = call.name
        if turns and turns[-1]["role"] == turn["role"] != "tool":
            _join(turns[-1], turn)
        else:
            turns.append(turn)
    if open_calls:
        raise InvalidMessages(f"{len(open_calls)} of the calls at the end have no result")
    return turns


def _join(turn: Message, more: Message) -> None:
    calls = [*turn.get("tool_calls", ()), *more.get("tool_calls", ())]
    if not calls:
        turn["content"] += JOIN + more["content"]
        return
    turn["content"] = JOIN.join(filter(None, (turn["content"], more["content"])))
    turn["tool_calls"] = calls


def _answer(place: int, turn: Message, open_calls: dict[str, str]) -> None:
    """Give a result its call."""
    id = turn["tool_call_id"]
    if id not in open_calls:
        raise InvalidMessages(f"messages[{place}] has the result of {id!r:.80}, which was not called just before")
    turn.setdefault("name", open_calls[id])
    del open_calls[id]


def _checked(place: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidMessages(f"messages[{place}] must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InvalidMessages(f"messages[{place}] has the role {role!r:.80}; it can be {', '.join(ROLES)}")
    calls = message.get("tool_calls") if role == "assistant" else None
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        problem = "no content" if content is None else f"content of type {type(content).__name__}"
        raise InvalidMessages(f"messages[{place}] has {problem}; it must be a string")
    turn: Message = {"role": role, "content": content}
    if calls:
        turn["tool_calls"] = _calls(place, calls)
    if role == "tool":
        turn["tool_call_id"] = _id(f"messages[{place}].tool_call_id", message.get("tool_call_id"))
        if message.get("name") is not None:
            turn["name"] = _name(f"messages[{place}].name", message["name"])
    return turn


def _calls(place: int, calls: Any) -> list[Call]:
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise InvalidMessages(f"messages[{place}].tool_calls must be a list")
    return [_call(f"messages[{place}].tool_calls[{number}]", call) for number, call in enumerate(calls)]


def _call(where: str, call: Any) -> Call:
    if isinstance(call, Call):
        return call
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidMessages(f"{where} must be an object with id and function")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidMessages(f"{where}.function.arguments is no JSON") from error
    if not isinstance(arguments, str | None):
        raise InvalidMessages(f"{where}.function.arguments must be the text of a JSON object")
    return Call(
        _id(f"{where}.id", call.get("id")), _name(f"{where}.function.name", function.get("name")), arguments or "{}"
    )


def _id(where: str, id: Any) -> str:
    if not isinstance(id, str) or not 1 <= len(id) <= MAX_ID:
        raise InvalidMessages(f"{where} must be a string of 1 to {MAX_ID} characters")
    return id


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidMessages(f"{where} must be 1 to 64 letters, digits, _ or -")
    return name
