"""Incremental parser that splits a model's answer into text and tool calls.

The parser reads the forms in which models write calls (``syntax``). It does not depend on tokens: it gets text, cut
at any position, and the names of control tokens. Text that cannot start a call is returned at once. Text that
looked like a call, but is not a call, is returned as text, without loss.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from moesaic.text.syntax import Syntax
from moesaic.text.tools import NAME, ToolCall, Tools

CALL_KEYS = ("name", "type", "function", "id", "arguments", "parameters")
"""Keys with which the JSON object of a call may begin."""

MAX_BLANKS = 256
"""Maximum length of an object before its first key; a longer one, which is all white space, is not a call."""

Part = str | ToolCall


class ToolCallParser:
    """Splits one answer into text and tool calls.

    ``control_tokens`` are the names of the control tokens that the caller must report with ``add_control_token``.
    """

    def __init__(self, syntax: Syntax, tools: Tools) -> None:
        self.control_tokens = syntax.control_tokens
        self._syntax, self._parallel = syntax, tools.parallel
        self._names = {tool.name for tool in tools.allowed}
        self._calls: list[ToolCall] = []
        self._has_text = False  # whether there was text since the last call
        # open: an object may begin here. list, items: before and in a list of objects. value: within an object.
        self._state: Literal["text", "open", "list", "items", "name", "id", "value"] = self._outside
        self._after_value: Literal["text", "open", "items"] = "text"  # the state after an object
        self._held: list[str] = []  # text that may still become a call, from its first control token on
        self._name = self._id = ""  # of a call whose name, id and arguments come separately
        self._value = _ObjectScanner()

    @property
    def satisfied(self) -> bool:
        """Whether the answer has a call and may not have more."""
        return bool(self._calls) and not self._parallel

    def add_text(self, text: str) -> list[Part]:
        """Return the text and the calls that ``text`` completes."""
        out: list[Part] = []
        for char in text:
            self._add_char(char, out)
        return _join_texts(out)

    def add_control_token(self, name: str) -> list[Part]:
        """Return the text and the calls that a control token completes."""
        out: list[Part] = []
        syntax = self._syntax
        if name == syntax.id_token and self._state == "name":
            self._held.append(name)
            self._state = "id"
        elif name == syntax.arguments_token and self._state in ("name", "id"):
            self._held.append(name)
            self._begin_value("text")
        else:
            self._release(out)
            if name != syntax.start_token:
                self._emit(name, out)
            else:
                self._held, self._name, self._id = [name], "", ""
                self._state = "open" if syntax.form == "objects" else "list" if syntax.form == "list" else "name"
        return _join_texts(out)

    def finish(self) -> list[Part]:
        """Return the text that was held back; call it once, at the end of the answer."""
        out: list[Part] = []
        if not (self._calls and self._state in ("open", "items") and not set("".join(self._held)) - set(" \t\r\n,;")):
            self._release(out)
        self._held = []
        return _join_texts(out)

    @property
    def _outside(self) -> Literal["text", "open"]:
        return "open" if self._syntax.form == "objects" else "text"

    def _add_char(self, char: str, out: list[Part]) -> None:
        if self._state == "text":
            self._emit(char, out)
            return
        self._held.append(char)
        match self._state:
            case "name":
                self._name += char
                if not NAME.fullmatch(self._name.strip() or "_"):
                    self._release(out)
            case "id":
                self._id += char
            case "value":
                self._add_to_value(char, out)
            case _:
                self._add_between(char, out)

    def _add_between(self, char: str, out: list[Part]) -> None:
        if char == "{":
            self._begin_value("items" if self._state == "items" else self._outside)
            self._value.add(char)
        elif char == "[" and self._state in ("open", "list"):
            self._state = "items"
        elif char == "]" and self._state == "items" and self._calls:
            self._held, self._state = [], self._outside
        elif not char.isspace() and not (char in ",;" and self._calls):
            self._release(out)
        elif self._state == "open" and self._has_text:  # between lines of text, not between calls
            self._release(out)
            self._state = "open" if char.isspace() else "text"

    def _begin_value(self, after: Literal["text", "open", "items"]) -> None:
        self._state, self._after_value, self._value = "value", after, _ObjectScanner()

    def _add_to_value(self, char: str, out: list[Part]) -> None:
        value = self._value
        if char.isspace() and not value.length:
            return
        value.add(char)
        if value.complete:
            call = self._parse_call("".join(self._held[-value.length :]))
            if call is None:
                self._release(out)
                return
            self._calls.append(call)
            out.append(call)
            self._held, self._state, self._has_text = [], self._after_value, False
        elif value.head[0] != "{" or not (self._name or value.may_be_call):
            self._release(out)

    def _emit(self, text: str, out: list[Part]) -> None:
        """Append text to ``out``; an object may begin on the next line."""
        if text:
            out.append(text)
            self._has_text = True
            self._state = self._outside if text.endswith("\n") else "text"

    def _release(self, out: list[Part]) -> None:
        """Append the held text to ``out``: it is not a call."""
        held, self._held, self._state = "".join(self._held), [], "text"
        self._emit(held, out)

    def _parse_call(self, text: str) -> ToolCall | None:
        """Return the call that a JSON object represents; None if it is not a call of an allowed tool."""
        try:
            tree = json.loads(text, parse_constant=_reject_constant)
            if self._name:
                tree = {"name": self._name.strip(), "arguments": tree, "id": self._id.strip()}
            elif isinstance(tree.get("function"), dict):
                tree |= tree["function"]
            arguments = _arguments_text(tree.get("arguments", tree.get("parameters", {})))
        except (ValueError, RecursionError):
            return None
        name = tree.get("name")
        # An object with a description is the definition of a tool, which the model repeats, and not a call.
        if not isinstance(name, str) or name not in self._names or "description" in tree:
            return None
        return ToolCall(self._call_id(tree.get("id")), name, arguments)

    def _call_id(self, written: Any) -> str:
        """Return the id that the model wrote, if it is valid and unused; otherwise a new id."""
        pattern = r"[a-zA-Z0-9]{9}" if self._syntax.short_ids else r"[\w-]{1,64}"
        used = {call.id for call in self._calls}
        if isinstance(written, str) and re.fullmatch(pattern, written) and written not in used:
            return written
        return self._syntax.new_id()


class _ObjectScanner:
    """Finds the end of a JSON object that comes character by character."""

    def __init__(self) -> None:
        self.length, self.complete = 0, False
        self.head = ""  # the text up to the end of the first key
        self._head_complete = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def add(self, char: str) -> None:
        self.length += 1
        if not self._head_complete:
            self.head += char
            self._head_complete = self.head.count('"') == 2
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.complete = self._depth == 0

    @property
    def may_be_call(self) -> bool:
        """Whether an object with this head may be a call."""
        rest = self.head[1:].lstrip()
        if not rest:
            return len(self.head) < MAX_BLANKS
        key, closed, _ = rest[1:].partition('"')
        return rest[0] == '"' and (key in CALL_KEYS if closed else any(name.startswith(key) for name in CALL_KEYS))


def _arguments_text(arguments: Any) -> str:
    """Return the arguments of a call as the text of a JSON object; models may write that text instead of an object.

    Raises:
        ValueError, RecursionError: the arguments are not a JSON object.
    """
    if isinstance(arguments, str):
        _arguments_text(json.loads(arguments, parse_constant=_reject_constant) if arguments else {})
        return arguments or "{}"
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not an object")
    return json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not valid JSON")


def _join_texts(parts: list[Part]) -> list[Part]:
    """Return the parts with adjacent texts joined and empty texts removed."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        elif part:
            out.append(part)
    return out
