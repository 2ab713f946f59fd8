"""Llama 3's conversations, and those of 3.1 to 3.3, which know tools.

Follows the model cards and the templates that the checkpoints carry: the date in them is the one that
stands there when nobody says another. Does not know which of them a checkpoint is (``chat``).
"""

from __future__ import annotations

import json

from moesaic.text.messages import Message
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Call, Tools

DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
OFFER = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.Do not use variables.\n\n"
)


def turns(messages: list[Message], tokenizer: Tokenizer, _tools: Tools | None = None) -> list[int]:
    """Return the ids of a conversation, the assistant's last turn left open."""
    return _encoded([_said(turn) for turn in messages], tokenizer)


def turns_31(messages: list[Message], tokenizer: Tokenizer, tools: Tools | None = None) -> list[int]:
    """Return the same with the head that 3.1 expects, and the tools in the first turn, which is the user's."""
    said = [_said(turn) for turn in messages]
    known = said.pop(0)[1] if messages[0]["role"] == "system" else ""
    if tools is not None:
        listed = "".join(json.dumps(tool.described(), ensure_ascii=False, indent=4) + "\n\n" for tool in tools.offered)
        asked = said.pop(0)[1] if said and said[0][0] == "user" else ""
        said.insert(0, ("user", OFFER + listed + asked))
    head = ("" if tools is None else "Environment: ipython\n") + DATES + known
    return _encoded([("system", head), *said], tokenizer)


def _encoded(said: list[tuple[str, str]], tokenizer: Tokenizer) -> list[int]:
    control = tokenizer.control
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for role, text in said if said[-1][0] == "assistant" else [*said, ("assistant", "")]:
        ids += [control["<|start_header_id|>"], *tokenizer.encode(role), control["<|end_header_id|>"]]
        ids += [*tokenizer.encode("\n\n"), *tokenizer.encode(text), control["<|eot_id|>"]]
    return ids[:-1]  # the last turn is open


def _said(turn: Message) -> tuple[str, str]:
    if turn["role"] == "tool":
        return "ipython", json.dumps(turn["content"], ensure_ascii=False)
    calls = [_call(call) for call in turn.get("tool_calls", [])]
    return turn["role"], "\n".join(filter(None, (turn["content"].strip(), *calls)))


def _call(call: Call) -> str:
    try:
        arguments = json.dumps(json.loads(call.arguments), ensure_ascii=False)
    except (ValueError, RecursionError):
        arguments = json.dumps(call.arguments, ensure_ascii=False)
    return f'{{"name": "{call.name}", "parameters": {arguments}}}'
