"""Forms in which models write tool calls, and grammars that force an answer to be a tool call.

The grammars are in Lark. ``tool_parser`` finds the calls in an answer, and ``chat`` writes the tools into a prompt.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moesaic.errors import InvalidParameter
from moesaic.text.grammar import STYLE, Grammar
from moesaic.text.tools import Tool, Tools

MAX_CALLS = 16
"""Maximum number of calls in a forced answer; without a limit, a model could generate calls without end."""


@dataclass(frozen=True)
class Syntax:
    """Form in which a family of models writes tool calls.

    ``form`` is "list" (the start token, then a JSON list of objects), "each" (for each call the start token, the
    name, and a JSON object with the arguments), or "objects" (JSON objects at the beginning of the answer).
    """

    form: Literal["list", "each", "objects"]
    start_token: str | None = None
    """Control token before a call, or before the list of calls; None if there is none."""
    arguments_key: str = "arguments"
    """Key of the arguments in the JSON object of a call."""
    id_token: str | None = None
    """Control token before the id of a call; None if there is none."""
    arguments_token: str | None = None
    """Control token before the arguments of a call; None if there is none."""
    separator: str | None = "\n"
    """Text between the JSON objects of two calls; None if an answer can have only one call."""
    short_ids: bool = False
    """Whether call ids have exactly nine letters and digits."""
    opening: str = ""
    """Text in front of each JSON object, such as a tag. If it is a control token, it is not shown."""
    closing: str = ""
    """Text behind each JSON object."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Control tokens that this form uses in an answer."""
        return tuple(filter(None, (self.start_token, self.id_token, self.arguments_token)))

    def new_id(self) -> str:
        """Return a new random call id in the form that the model family uses."""
        letters = string.ascii_letters + string.digits
        return ("" if self.short_ids else "call_") + "".join(
            secrets.choice(letters) for _ in range(9 if self.short_ids else 24)
        )


PLAIN = Syntax("objects")
HERMES = Syntax("objects", opening="<tool_call>\n", closing="\n</tool_call>")
LLAMA = Syntax("objects", start_token="<|python_tag|>", arguments_key="parameters", separator=None)
MISTRAL = Syntax("list", start_token="[TOOL_CALLS]", short_ids=True)
MISTRAL_11 = Syntax("each", start_token="[TOOL_CALLS]", id_token="[CALL_ID]", arguments_token="[ARGS]", short_ids=True)
MISTRAL_13 = Syntax("each", start_token="[TOOL_CALLS]", arguments_token="[ARGS]", short_ids=True)


def forced_grammar(syntax: Syntax, tools: Tools, control: Mapping[str, int]) -> Grammar:
    """Return the grammar of an answer that must call an allowed tool, or several if parallel calls are allowed.

    ``control`` maps the names of the tokenizer's control tokens to their ids.

    Raises:
        InvalidParameter: the schemas of the tools are too long for one grammar.
    """
    allowed = {index: tool for index, tool in enumerate(tools.offered) if tool in tools.allowed}
    calls = {f"call_{n}": _call_rule(syntax, tool, f"arguments_{n}", control) for n, tool in allowed.items()}
    schemas = {f"arguments_{n}": _json_rule(tool) for n, tool in allowed.items()}
    rules = {"start": _start_rule(syntax, tools, control), "call": " | ".join(calls)} | calls | schemas
    text = "\n".join(f"{name}: {rule}" for name, rule in rules.items()) + "\n"
    parts = [Grammar("json_schema", tool.schema, f"tools[{n}].function.parameters") for n, tool in allowed.items()]
    try:
        return Grammar("lark", text, "tools", tuple(parts))
    except InvalidParameter as error:
        raise InvalidParameter(
            "tools", "have schemas that are too long to require a call: name one function in tool_choice"
        ) from error


def _start_rule(syntax: Syntax, tools: Tools, control: Mapping[str, int]) -> str:
    max_more = MAX_CALLS - 1 if tools.parallel and syntax.separator is not None else 0
    if syntax.form == "list":
        repeated = f' (", " call){{0,{max_more}}}' if max_more else ""
        return f'<[{control[str(syntax.start_token)]}]> "[" call{repeated} "]"'
    separator = f"{_quoted(syntax.separator or '')} " if syntax.form == "objects" else ""
    return "call" + (f" ({separator}call){{0,{max_more}}}" if max_more else "")


def _call_rule(syntax: Syntax, tool: Tool, arguments: str, control: Mapping[str, int]) -> str:
    """Return the Lark rule for a call of ``tool``; ``arguments`` is the name of the rule for its arguments."""
    if syntax.form != "each":
        head = f'{{"name": "{tool.name}", "{syntax.arguments_key}": '
        opening, closing = _tagged(syntax.opening, control), _tagged(syntax.closing, control)
        return f"{opening}{_quoted(head)} {arguments} {_quoted('}')}{closing}"
    start, arguments_start = f"<[{control[str(syntax.start_token)]}]>", f"<[{control[str(syntax.arguments_token)]}]>"
    call_id = f"<[{control[syntax.id_token]}]> /[a-zA-Z0-9]{{9}}/" if syntax.id_token else ""
    return f"{start} {_quoted(tool.name)} {call_id} {arguments_start} {arguments}"


def _tagged(text: str, control: Mapping[str, int]) -> str:
    """Return the Lark terms for the text before or after a call's object; its tag may be a control token."""
    if not text:
        return ""
    tag = text.strip()
    terms = [
        f"<[{control[tag]}]>" if part == tag and tag in control else _quoted(part)
        for part in text.partition(tag)
        if part
    ]
    return " " + " ".join(terms) + " "


def _json_rule(tool: Tool) -> str:
    return "%json " + json.dumps({**tool.schema, "x-guidance": STYLE})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
