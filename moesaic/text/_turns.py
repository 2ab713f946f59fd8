"""Helpers that several chat formats use.

They move a system prompt into another message, write tools and calls as plain text, and return the tokens that begin
and end a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from moesaic.text.messages import JOIN, Message, validate
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools

TOOL_PROMPT = (
    "You can call these functions:\n{tool_list}\n\nTo call one, answer with nothing but a line of JSON of this form: "
    '{{"name": "the function\'s name", "arguments": {{"an argument": "its value"}}}}. To call several, write such a '
    "line for each. Where no function helps, answer in plain words."
)


@dataclass(frozen=True)
class Variables:
    """Values that a prompt may depend on, in addition to messages and tools."""

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The request's ``chat_template_kwargs``."""
    now: datetime = field(default_factory=datetime.now)
    """The local time, which the prompt may contain."""


def bos(tokenizer: Tokenizer) -> list[int]:
    """Return a list with the id of the beginning-of-text token; it is empty if the tokenizer has none."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def eos(tokenizer: Tokenizer) -> list[int]:
    """Return a list with the lowest id of the end-of-text tokens; it is empty if the tokenizer has none."""
    return sorted(tokenizer.eos_ids)[:1]


def without_system(messages: list[Message]) -> tuple[str, list[Message]]:
    """Return the texts of the system messages, joined, and the other messages; for formats without a system role.

    If the others do not begin with a user message, an empty user message is added in front.
    """
    system = JOIN.join(turn["content"] for turn in messages if turn["role"] == "system")
    turns = [turn for turn in messages if turn["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        turns = [{"role": "user", "content": ""}, *turns]
    return system, validate(turns)


def prepend_system(turns: Sequence[Message], index: int, system: str) -> list[Message]:
    """Return the messages ``turns``, with the text ``system`` put in front of the text of the one at ``index``."""
    if not system:
        return list(turns)
    turn = turns[index]
    return [*turns[:index], {"role": turn["role"], "content": system + JOIN + turn["content"]}, *turns[index + 1 :]]


def as_plain_text(turns: list[Message], tools: Tools | None) -> list[Message]:
    """Return the conversation with tool calls and results written as text, and the tools described in a system message.

    If ``tools`` is None, no tools are described.
    """
    out: list[Message] = []
    for turn in turns:
        if turn["role"] == "tool":
            out.append({"role": "user", "content": f"Result of {turn['name']}: {turn['content']}"})
            continue
        calls = [f'{{"name": "{call.name}", "arguments": {call.arguments}}}' for call in turn.get("tool_calls", ())]
        out.append({"role": turn["role"], "content": "\n".join((*filter(None, (turn["content"],)), *calls))})
    if tools is not None:
        tool_list = "\n".join(json.dumps(tool.to_openai()["function"], ensure_ascii=False) for tool in tools.offered)
        out.insert(turns[0]["role"] == "system", {"role": "system", "content": TOOL_PROMPT.format(tool_list=tool_list)})
    return validate(out)
