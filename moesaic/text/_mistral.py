"""Mistral's conversations from the version on in which instructions have control tokens (v2).

Follows mistral-common, version by version: which texts become one block, in which order the keys of a
call stand, and where tools are listed. Does not know which version a checkpoint has (``chat``).
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from moesaic.text.messages import Message
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Call, Tools

MARKS = {"user": ("[INST]", "[/INST]"), "system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")}


def turns(messages: list[Message], tokenizer: Tokenizer, tools: Tools | None, version: int) -> list[int]:
    """Return the ids of a conversation, an assistant's last turn left open."""
    writer = _Writer(tokenizer, version)
    users = [place for place, turn in enumerate(messages) if turn["role"] == "user"]
    last = users[-1] if users else -1
    listed = (users[0] if version >= 13 else last) if users else -1
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for place, turn in enumerate(_sorted(messages) if version >= 11 else messages):
        if version == 2 and place < last and (turn["role"] == "tool" or turn.get("tool_calls")):
            continue  # what was called for an earlier question is forgotten
        if place == listed and tools is not None:
            ids += writer.listing(tools)
        if turn["role"] == "assistant":
            ids += writer.answer(turn, closed=place < len(messages) - 1)
        else:
            ids += (
                writer.result(turn) if turn["role"] == "tool" else writer.between(*MARKS[turn["role"]], turn["content"])
            )
    return ids


def _sorted(messages: list[Message]) -> list[Message]:
    """Return the conversation with results in the order of their calls."""
    order: dict[str, int] = {}
    out: list[Message] = []
    for turn in messages:
        at = len(out)
        if turn["role"] != "tool":
            order = {call.id: number for number, call in enumerate(turn.get("tool_calls", ()))}
        else:
            while out[at - 1]["role"] == "tool" and order[out[at - 1]["tool_call_id"]] > order[turn["tool_call_id"]]:
                at -= 1
        out.insert(at, turn)
    return out


class _Writer:
    def __init__(self, tokenizer: Tokenizer, version: int) -> None:
        self._tokenizer, self._control, self._version = tokenizer, tokenizer.control, version

    def between(self, begin: str, end: str, text: str) -> list[int]:
        return [self._control[begin], *self._tokenizer.encode(text), self._control[end]]

    def listing(self, tools: Tools) -> list[int]:
        listed = [tool.described(always=True) for tool in tools.offered]
        return self.between("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", _json(listed))

    def answer(self, turn: Message, *, closed: bool) -> list[int]:
        ids = self._tokenizer.encode(turn["content"].rstrip(" "))
        ids += self._calls(turn.get("tool_calls", []))
        return ids + (sorted(self._tokenizer.eos_ids)[:1] if closed else [])

    def _calls(self, calls: list[Call]) -> list[int]:
        if not calls:
            return []
        if self._version >= 11:
            return [id for call in calls for id in self._each(call)]
        return [self._control["[TOOL_CALLS]"], *self._tokenizer.encode(_json([self._as_json(call) for call in calls]))]

    def _each(self, call: Call) -> list[int]:
        encode, control = self._tokenizer.encode, self._control
        id = [control["[CALL_ID]"], *encode(nine(call.id))] if self._version < 13 else []
        arguments = encode(_json(_parsed(call.arguments)))
        return [control["[TOOL_CALLS]"], *encode(call.name), *id, control["[ARGS]"], *arguments]

    def _as_json(self, call: Call) -> dict[str, Any]:
        known = {"name": call.name, "arguments": _parsed(call.arguments)}
        return known if self._version < 3 else known | {"id": nine(call.id)}

    def result(self, turn: Message) -> list[int]:
        id, content = nine(turn["tool_call_id"]), turn["content"]
        if self._version == 2:
            text = _json([{"name": turn["name"], "content": _parsed(content or "{}")}])
        elif self._version == 3:
            text = _json({"content": _parsed(content or "{}"), "call_id": id})
        else:
            text = content
        ids = self.between("[TOOL_RESULTS]", "[/TOOL_RESULTS]", text)
        if 7 <= self._version < 13:
            ids[1:1] = [*self._tokenizer.encode(id), self._control["[TOOL_CONTENT]"]]
        return ids


def nine(id: str) -> str:
    """Return an id as Mistral's models know them, nine letters and digits; the same each time it stands somewhere."""
    return id if re.fullmatch(r"[a-zA-Z0-9]{9}", id) else hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:9]


def _parsed(text: str) -> Any:
    """Return what JSON text says, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
