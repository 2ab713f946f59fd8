"""Answers with tool calls as texts, and what a parser finds in them."""

from __future__ import annotations

import json
from typing import Any

from moesaic.text import syntax
from moesaic.text.syntax import Syntax
from moesaic.text.tool_parser import ToolCallParser
from moesaic.text.tools import CallPart, ToolCall, Tools, join_calls

OFFERED = Tools.from_request([{"type": "function", "function": {"name": name}} for name in ("f", "get_weather")])
assert OFFERED is not None
SYNTAXES = {
    "plain": syntax.PLAIN,
    "llama": syntax.LLAMA,
    "mistral": syntax.MISTRAL,
    "mistral-11": syntax.MISTRAL_11,
    "mistral-13": syntax.MISTRAL_13,
}
Script = list[tuple[str, bool]]  # (text, whether it is a control token)


def script(text: str, form: Syntax) -> Script:
    """Split a text at the names of the control tokens of a syntax."""
    parts: Script = [(text, False)]
    for token in form.control_tokens:
        split: Script = []
        for part, special in parts:
            pieces = [part] if special else part.split(token)
            for index, piece in enumerate(pieces):
                split += [(token, True)] if index else []
                split.append((piece, special))
        parts = split
    return [part for part in parts if part[0]]


def parse(form: Syntax, parts: Script, offered: Tools = OFFERED, *, cut: bool = False) -> list[str | ToolCall]:
    """Return the texts and the calls with all their parts joined."""
    parser = ToolCallParser(form, offered)
    pieces = [parser.add_control_token(text) if special else parser.add_text(text) for text, special in parts]
    said = [part for piece in [*pieces, parser.finish(cut=cut)] for part in piece]
    calls = join_calls(part for part in said if isinstance(part, CallPart))
    out: list[str | ToolCall] = []
    for part in said:
        if isinstance(part, CallPart):
            out += [calls[part.index]] if part.name else []
            assert out[-1] is calls[part.index], "the parts of a call are not adjacent"
        elif out and isinstance(out[-1], str):
            out[-1] += part
        else:
            out.append(part)
    return out


def without_ids(parts: list[str | ToolCall]) -> list[Any]:
    """Return the parts without the call ids, which may be random; arguments that are no JSON remain a text."""
    return [
        part if isinstance(part, str) else (part.name, json.loads(part.arguments) if part.whole else part.arguments)
        for part in parts
    ]
