"""Calls of tools in the stream of an answer.

Knows how to read the forms in which models write calls (``syntax``). Does not know tokens: text comes in
pieces cut anywhere, control tokens by their names. What cannot be the beginning of a call goes out at
once; what looked like one and is none goes out as text, whole.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from moesaic.text.syntax import Syntax
from moesaic.text.tools import NAME, Call, Tools

KEYS = ("name", "type", "function", "id", "arguments", "parameters")
"""With which of them an object begins that may be a call."""

MAX_BLANKS = 256
"""White space in an object before its first key; more is no call."""

Part = str | Call


class Calls:
    """Splits one answer into text and calls. ``marks`` are the control tokens that it wants to be told of."""

    def __init__(self, syntax: Syntax, tools: Tools) -> None:
        self.marks = syntax.marks
        self._syntax, self._parallel = syntax, tools.parallel
        self._names = {tool.name for tool in tools.wanted}
        self._found: list[Call] = []
        self._said = False  # text, since the last call
        # open: an object may begin here. list, items: before and in a list of them. value: within an object.
        self._state: Literal["text", "open", "list", "items", "name", "id", "value"] = self._outside
        self._home: Literal["text", "open", "items"] = "text"  # where an object leads back to
        self._held: list[str] = []  # what may still become a call, from its mark on
        self._name = self._id = ""  # of a call that is written in parts
        self._value = _Value()

    @property
    def satisfied(self) -> bool:
        """Whether there is a call, and no more are wanted."""
        return bool(self._found) and not self._parallel

    def add(self, text: str) -> list[Part]:
        """Return what a piece of text brings."""
        out: list[Part] = []
        for char in text:
            self._take(char, out)
        return _joined(out)

    def mark(self, name: str) -> list[Part]:
        """Return what a control token brings."""
        out: list[Part] = []
        syntax = self._syntax
        if name == syntax.id_mark and self._state == "name":
            self._held.append(name)
            self._state = "id"
        elif name == syntax.arguments_mark and self._state in ("name", "id"):
            self._held.append(name)
            self._begin("text")
        else:
            self._give_up(out)
            if name != syntax.mark:
                self._say(name, out)
            else:
                self._held, self._name, self._id = [name], "", ""
                self._state = "open" if syntax.form == "objects" else "list" if syntax.form == "list" else "name"
        return _joined(out)

    def finish(self) -> list[Part]:
        """Return what was held back: the answer has ended."""
        out: list[Part] = []
        if not (self._found and self._state in ("open", "items") and not set("".join(self._held)) - set(" \t\r\n,;")):
            self._give_up(out)
        self._held = []
        return _joined(out)

    @property
    def _outside(self) -> Literal["text", "open"]:
        return "open" if self._syntax.form == "objects" else "text"

    def _take(self, char: str, out: list[Part]) -> None:
        if self._state == "text":
            self._say(char, out)
            return
        self._held.append(char)
        match self._state:
            case "name":
                self._name += char
                if not NAME.fullmatch(self._name.strip() or "_"):
                    self._give_up(out)
            case "id":
                self._id += char
            case "value":
                self._within(char, out)
            case _:
                self._between(char, out)

    def _between(self, char: str, out: list[Part]) -> None:
        if char == "{":
            self._begin("items" if self._state == "items" else self._outside)
            self._value.add(char)
        elif char == "[" and self._state in ("open", "list"):
            self._state = "items"
        elif char == "]" and self._state == "items" and self._found:
            self._held, self._state = [], self._outside
        elif not char.isspace() and not (char in ",;" and self._found):
            self._give_up(out)
        elif self._state == "open" and self._said:  # between lines of text, not between calls
            self._give_up(out)
            self._state = "open" if char.isspace() else "text"

    def _begin(self, home: Literal["text", "open", "items"]) -> None:
        self._state, self._home, self._value = "value", home, _Value()

    def _within(self, char: str, out: list[Part]) -> None:
        value = self._value
        if char.isspace() and not value.length:
            return
        value.add(char)
        if value.whole:
            call = self._call("".join(self._held[-value.length :]))
            if call is None:
                self._give_up(out)
                return
            self._found.append(call)
            out.append(call)
            self._held, self._state, self._said = [], self._home, False
        elif value.head[0] != "{" or not (self._name or value.may_be_call):
            self._give_up(out)

    def _say(self, text: str, out: list[Part]) -> None:
        """Let text out; an object may begin on the next line."""
        if text:
            out.append(text)
            self._said = True
            self._state = self._outside if text.endswith("\n") else "text"

    def _give_up(self, out: list[Part]) -> None:
        """What was held is text after all."""
        held, self._held, self._state = "".join(self._held), [], "text"
        self._say(held, out)

    def _call(self, text: str) -> Call | None:
        """Return the call that an object is, if it is one."""
        try:
            tree = json.loads(text, parse_constant=_refuse)
            if self._name:
                tree = {"name": self._name.strip(), "arguments": tree, "id": self._id.strip()}
            elif isinstance(tree.get("function"), dict):
                tree |= tree["function"]
            arguments = _arguments(tree.get("arguments", tree.get("parameters", {})))
        except (ValueError, RecursionError):
            return None
        name = tree.get("name")
        if not isinstance(name, str) or name not in self._names or "description" in tree:  # the tool's own definition
            return None
        return Call(self._id_of(tree.get("id")), name, arguments)

    def _id_of(self, given: Any) -> str:
        """Return the id that the model gave its call, if that is one, else a new one."""
        form = r"[a-zA-Z0-9]{9}" if self._syntax.short_ids else r"[\w-]{1,64}"
        if isinstance(given, str) and re.fullmatch(form, given) and given not in {call.id for call in self._found}:
            return given
        return self._syntax.new_id()


class _Value:
    """A JSON object that comes letter by letter; ``whole`` when its last brace has come."""

    def __init__(self) -> None:
        self.length, self.whole = 0, False
        self.head = ""  # up to the end of its first key
        self._settled = False
        self._depth, self._string, self._escaped = 0, False, False

    def add(self, char: str) -> None:
        self.length += 1
        if not self._settled:
            self.head += char
            self._settled = self.head.count('"') == 2
        if self._string:
            self._string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.whole = self._depth == 0

    @property
    def may_be_call(self) -> bool:
        """Whether an object that begins like this may be a call."""
        rest = self.head[1:].lstrip()
        if not rest:
            return len(self.head) < MAX_BLANKS
        key, closed, _ = rest[1:].partition('"')
        return rest[0] == '"' and (key in KEYS if closed else any(known.startswith(key) for known in KEYS))


def _arguments(found: Any) -> str:
    """Return arguments as the text of a JSON object; models also write such a text where the object should stand.

    Raises:
        ValueError, RecursionError: they are none.
    """
    if isinstance(found, str):
        _arguments(json.loads(found, parse_constant=_refuse) if found else {})
        return found or "{}"
    if not isinstance(found, dict):
        raise ValueError("the arguments are no object")
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _joined(parts: list[Part]) -> list[Part]:
    """Return the parts, neighbouring texts as one, none of them empty."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        elif part:
            out.append(part)
    return out
