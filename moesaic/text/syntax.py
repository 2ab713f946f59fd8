"""The forms in which models write calls of tools, and the grammars that hold an answer to one.

Knows what stands around a name and its arguments, and Lark. Does not know how calls are found in a
stream (``calls``), nor how the tools are told to the model (``chat``).
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
"""The most calls that a forced answer may have: a model that cannot stop would call for ever."""


@dataclass(frozen=True)
class Syntax:
    """How a family of models writes calls.

    ``form``: "list" is a mark and a JSON list of objects; "each" a mark, a name, and a JSON object for
    each call; "objects" are JSON objects at the beginning of the answer.
    """

    form: Literal["list", "each", "objects"]
    mark: str | None = None
    """The control token in front."""
    arguments: str = "arguments"
    """What an object calls the arguments."""
    id_mark: str | None = None
    arguments_mark: str | None = None
    several: str | None = "\n"
    """What stands between objects; None: there is only one."""
    short_ids: bool = False
    """Whether ids are nine letters and digits."""

    @property
    def marks(self) -> tuple[str, ...]:
        """The control tokens that mean something in an answer."""
        return tuple(filter(None, (self.mark, self.id_mark, self.arguments_mark)))

    def new_id(self) -> str:
        """Return an id for a call that has none."""
        letters = string.ascii_letters + string.digits
        return ("" if self.short_ids else "call_") + "".join(
            secrets.choice(letters) for _ in range(9 if self.short_ids else 24)
        )


PLAIN = Syntax("objects")
LLAMA = Syntax("objects", mark="<|python_tag|>", arguments="parameters", several=None)
MISTRAL = Syntax("list", mark="[TOOL_CALLS]", short_ids=True)
MISTRAL_11 = Syntax("each", mark="[TOOL_CALLS]", id_mark="[CALL_ID]", arguments_mark="[ARGS]", short_ids=True)
MISTRAL_13 = Syntax("each", mark="[TOOL_CALLS]", arguments_mark="[ARGS]", short_ids=True)


def forced(syntax: Syntax, tools: Tools, control: Mapping[str, int]) -> Grammar:
    """Return the grammar of an answer that calls one of the wanted tools, or several where that may be.

    Raises:
        InvalidParameter: the schemas are too long together to hold an answer to all of them.
    """
    wanted = {place: tool for place, tool in enumerate(tools.offered) if tool in tools.wanted}
    calls = {f"call_{n}": _written(syntax, tool, f"arguments_{n}", control) for n, tool in wanted.items()}
    schemas = {f"arguments_{n}": _json_rule(tool) for n, tool in wanted.items()}
    rules = {"start": _start(syntax, tools, control), "call": " | ".join(calls)} | calls | schemas
    text = "\n".join(f"{name}: {rule}" for name, rule in rules.items()) + "\n"
    parts = [Grammar("json_schema", tool.schema, f"tools[{n}].function.parameters") for n, tool in wanted.items()]
    try:
        return Grammar("lark", text, "tools", tuple(parts))
    except InvalidParameter as error:
        raise InvalidParameter("tools", "have schemas too long to require a call: name the function") from error


def _start(syntax: Syntax, tools: Tools, control: Mapping[str, int]) -> str:
    more = MAX_CALLS - 1 if tools.parallel and syntax.several is not None else 0
    if syntax.form == "list":
        repeated = f' (", " call){{0,{more}}}' if more else ""
        return f'<[{control[str(syntax.mark)]}]> "[" call{repeated} "]"'
    between = f"{_quoted(syntax.several or '')} " if syntax.form == "objects" else ""
    return "call" + (f" ({between}call){{0,{more}}}" if more else "")


def _written(syntax: Syntax, tool: Tool, arguments: str, control: Mapping[str, int]) -> str:
    """Return the rule of a call of one tool, written as the models were taught to."""
    if syntax.form != "each":
        head = f'{{"name": "{tool.name}", "{syntax.arguments}": '
        return f"{_quoted(head)} {arguments} {_quoted('}')}"
    mark, ended = f"<[{control[str(syntax.mark)]}]>", f"<[{control[str(syntax.arguments_mark)]}]>"
    id = f"<[{control[syntax.id_mark]}]> /[a-zA-Z0-9]{{9}}/" if syntax.id_mark else ""
    return f"{mark} {_quoted(tool.name)} {id} {ended} {arguments}"


def _json_rule(tool: Tool) -> str:
    return "%json " + json.dumps({**tool.schema, "x-guidance": STYLE})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
