"""Tools that a model may call: what is offered, what was called, and which calls must come.

Knows the bounds of a tool and the forms that requests write them in (OpenAI's). Does not know how a
chat format writes them into a prompt (``chat``) nor how calls are found in an answer (``calls``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.errors import InvalidParameter
from moesaic.text.grammar import MAX_BYTES, MAX_DEPTH, too_deep

MAX_TOOLS = 128
MAX_ALL_BYTES = 256 << 10  # of all tools together
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Call:
    """A call of a tool: ``arguments`` is the text of a JSON object, ``id`` what its result will refer to."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Tool:
    """A function that may be called.

    ``parameters`` is the JSON schema of its arguments, as the request has it; None: it says nothing of them.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None

    @property
    def schema(self) -> Mapping[str, Any]:
        """What arguments have to be.

        An object that names its properties has no others: the schema need not say so, but to hold an
        answer to "anything else too" would let a model go on for ever.
        """
        # What is no word of JSON Schema, but tells the compiler to take it less seriously, is left out.
        schema = {key: value for key, value in (self.parameters or {}).items() if key != "x-guidance"}
        schema.setdefault("type", "object")
        open_ended = {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf", "minProperties"}
        named = schema.get("properties") or {}
        closed = schema["type"] == "object" and not open_ended & schema.keys()
        if closed and set(schema.get("required") or ()) <= set(named):
            schema["additionalProperties"] = False
        return schema

    def described(self, *, always: bool = False) -> dict[str, Any]:
        """Return it in OpenAI's form; with ``always``, with what was left out as empty."""
        function: dict[str, Any] = {"name": self.name}
        if always or self.description is not None:
            function["description"] = self.description or ""
        if always or self.parameters is not None:
            function["parameters"] = dict(self.parameters or {})
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Tools:
    """The tools that a request offers, and what it wants called; made by ``Tools.of``."""

    offered: tuple[Tool, ...]
    choice: Choice = "auto"
    only: str | None = None
    """The one that has to be called; then ``choice`` is required."""
    parallel: bool = True
    """Whether one answer may call several."""

    @classmethod
    def of(cls, tools: Any, choice: Any = None, parallel: bool = True) -> Tools | None:
        """Return the tools of a request, in OpenAI's form, or None if it has none for the model to see.

        Args:
            tools: [{"type": "function", "function": {"name", "description", "parameters"}}, ...] or None.
            choice: "none", "auto", "required", {"type": "function", "function": {"name": ...}}, or None for auto.
            parallel: whether one answer may call several.

        Raises:
            InvalidParameter: too many, a name or a schema that cannot be, or a choice of what is not offered.
        """
        offered = _offered(tools)
        if isinstance(choice, Mapping):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
            if name not in [tool.name for tool in offered]:
                raise InvalidParameter("tool_choice", f"names {name!r:.80}, which is not among the tools")
            return cls(offered, "required", str(name), False)
        if choice not in (None, "none", "auto", "required"):
            raise InvalidParameter("tool_choice", f"is {choice!r:.80}, expected none, auto, required or a function")
        if choice == "required" and not offered:
            raise InvalidParameter("tool_choice", "is required, but there are no tools")
        if not offered or choice == "none":
            return None
        return cls(offered, choice or "auto", None, bool(parallel))

    @property
    def wanted(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        return tuple(tool for tool in self.offered if self.only in (None, tool.name))

    @property
    def enforced(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice == "required"


def _offered(tools: Any) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise InvalidParameter("tools", "must be a list of functions")
    if len(tools) > MAX_TOOLS:
        raise InvalidParameter("tools", f"has {len(tools)} functions, at most {MAX_TOOLS} can be offered")
    offered = tuple(_tool(f"tools[{place}]", tool) for place, tool in enumerate(tools))
    names = [tool.name for tool in offered]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise InvalidParameter("tools", f"has {twice} twice")
    if sum(len(json.dumps(tool.described())) for tool in offered) > MAX_ALL_BYTES:
        raise InvalidParameter("tools", f"are longer than {MAX_ALL_BYTES >> 10} KiB together")
    return offered


def _tool(where: str, tool: Any) -> Tool:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise InvalidParameter(where, 'must be {"type": "function", "function": {...}}')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InvalidParameter(f"{where}.function", "must be an object with name, description and parameters")
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidParameter(f"{where}.function.name", "must be 1 to 64 letters, digits, _ or -")
    if not isinstance(description, str | None):
        raise InvalidParameter(f"{where}.function.description", "must be a string")
    if parameters is not None:
        _bounded(f"{where}.function.parameters", parameters)
    return Tool(name, description, parameters)


def _bounded(where: str, parameters: Any) -> None:
    if not isinstance(parameters, Mapping):
        raise InvalidParameter(where, "must be a JSON schema, an object")
    if (deep := too_deep(parameters, MAX_DEPTH)) is not None:
        raise InvalidParameter(where, f"is nested deeper than {MAX_DEPTH}, at {deep}")
    try:
        text = json.dumps(parameters, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise InvalidParameter(where, f"is no JSON: {error}") from error
    if len(text) > MAX_BYTES:
        raise InvalidParameter(where, f"is longer than {MAX_BYTES >> 10} KiB")
