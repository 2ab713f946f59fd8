"""Tools that a model may call, tool calls, and the tool choice of a request.

This module parses and limits tool definitions in OpenAI's form. Chat formats write them into a prompt (``chat``), and
``tool_parser`` finds the calls in an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.errors import InvalidParameter
from moesaic.text.grammar import MAX_BYTES, MAX_DEPTH, too_deep

MAX_TOOLS = 128
MAX_ALL_BYTES = 256 << 10  # all tool definitions of a request together
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class ToolCall:
    """Call of a tool. ``arguments`` is the text of a JSON object; the message with the result refers to ``id``.

    The arguments are incomplete if the answer was cut, and invalid JSON if the model wrote invalid JSON.
    """

    id: str
    name: str
    arguments: str

    @property
    def whole(self) -> bool:
        """Whether ``arguments`` is the complete text of a JSON object."""
        try:
            return isinstance(json.loads(self.arguments, parse_constant=_reject_constant), dict)
        except (ValueError, RecursionError):
            return False


@dataclass(frozen=True)
class CallPart:
    """Part of a tool call that a model is writing.

    The first part of a call has its id and its name. Each part may have some text of the arguments.
    """

    index: int
    """Index of the call among the calls of the answer, from 0 on."""
    arguments: str = ""
    id: str = ""
    name: str = ""


def join_calls(parts: Iterable[CallPart]) -> tuple[ToolCall, ...]:
    """Return the tool calls that ``parts`` form when joined, in the order of the answer."""
    heads: dict[int, CallPart] = {}
    arguments: dict[int, list[str]] = {}
    for part in parts:
        heads.setdefault(part.index, part)
        arguments.setdefault(part.index, []).append(part.arguments)
    return tuple(ToolCall(head.id, head.name, "".join(arguments[index])) for index, head in sorted(heads.items()))


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not valid JSON")


@dataclass(frozen=True)
class Tool:
    """Definition of a function that the model may call.

    ``parameters`` is the JSON schema of the arguments as the request states it; None if the request states none.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON schema that the arguments must satisfy.

        If the schema lists properties, others are forbidden even if the schema does not say so. A model that may add
        any property could generate without end.
        """
        # "x-guidance" is not part of JSON Schema: it would let a request relax the checks of the compiler.
        schema = {key: value for key, value in (self.parameters or {}).items() if key != "x-guidance"}
        schema.setdefault("type", "object")
        open_ended = {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf", "minProperties"}
        properties = schema.get("properties") or {}
        closed = schema["type"] == "object" and not open_ended & schema.keys()
        if closed and set(schema.get("required") or ()) <= set(properties):
            schema["additionalProperties"] = False
        return schema

    def to_openai(self, *, always: bool = False) -> dict[str, Any]:
        """Return the definition in OpenAI's form; with ``always``, fields that the request omits are empty."""
        function: dict[str, Any] = {"name": self.name}
        if always or self.description is not None:
            function["description"] = self.description or ""
        if always or self.parameters is not None:
            function["parameters"] = dict(self.parameters or {})
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Tools:
    """Tools of a request and the tool choice; create it with ``Tools.from_request``."""

    offered: tuple[Tool, ...]
    choice: Choice = "auto"
    only: str | None = None
    """Name of the only tool that may be called, and must be; ``choice`` is then "required". None: any tool."""
    parallel: bool = True
    """Whether one answer may have several calls."""

    @classmethod
    def from_request(cls, tools: Any, choice: Any = None, parallel: bool = True) -> Tools | None:
        """Parse the tools and tool choice of a request in OpenAI's form; None if the model should see no tools.

        Args:
            tools: [{"type": "function", "function": {"name", "description", "parameters"}}, ...] or None.
            choice: "none", "auto", "required", {"type": "function", "function": {"name": ...}}, or None (auto).
            parallel: whether one answer may have several calls.

        Raises:
            InvalidParameter: there are too many tools, a name or a schema is invalid, or ``choice`` names no tool.
        """
        offered = _offered(tools)
        if isinstance(choice, Mapping):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
            if name not in [tool.name for tool in offered]:
                raise InvalidParameter("tool_choice", f"names {name!r:.80}, which is not in tools")
            return cls(offered, "required", str(name), False)
        if choice not in (None, "none", "auto", "required"):
            raise InvalidParameter("tool_choice", f"is {choice!r:.80}; expected none, auto, required or a function")
        if choice == "required" and not offered:
            raise InvalidParameter("tool_choice", "is required, but the request has no tools: add tools")
        if not offered or choice == "none":
            return None
        return cls(offered, choice or "auto", None, bool(parallel))

    @property
    def allowed(self) -> tuple[Tool, ...]:
        """The tools that the answer may call; a subset of ``offered``."""
        return tuple(tool for tool in self.offered if self.only in (None, tool.name))

    @property
    def call_required(self) -> bool:
        """Whether the answer must be a tool call."""
        return self.choice == "required"


def _offered(tools: Any) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise InvalidParameter("tools", "must be a list of functions")
    if len(tools) > MAX_TOOLS:
        raise InvalidParameter("tools", f"has {len(tools)} functions, more than the maximum of {MAX_TOOLS}")
    offered = tuple(_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools))
    names = [tool.name for tool in offered]
    duplicate = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if duplicate is not None:
        raise InvalidParameter("tools", f"has two functions with the name {duplicate}")
    if sum(len(json.dumps(tool.to_openai())) for tool in offered) > MAX_ALL_BYTES:
        raise InvalidParameter("tools", f"are longer than {MAX_ALL_BYTES >> 10} KiB in total")
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
        _check_schema(f"{where}.function.parameters", parameters)
    return Tool(name, description, parameters)


def _check_schema(where: str, parameters: Any) -> None:
    if not isinstance(parameters, Mapping):
        raise InvalidParameter(where, "must be a JSON schema (an object)")
    if (pointer := too_deep(parameters, MAX_DEPTH)) is not None:
        raise InvalidParameter(where, f"has more than {MAX_DEPTH} nested levels at {pointer}")
    try:
        text = json.dumps(parameters, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise InvalidParameter(where, f"is not valid JSON: {error}") from error
    if len(text) > MAX_BYTES:
        raise InvalidParameter(where, f"is longer than {MAX_BYTES >> 10} KiB")
