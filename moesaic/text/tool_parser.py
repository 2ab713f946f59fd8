"""Incremental parser that splits a model's answer into text and tool calls.

The parser reads the forms in which models write calls (``syntax``). It does not depend on tokens: it gets text, cut
at any position, and the names of control tokens. Text that cannot start a call is returned at once. A call is
returned in parts: its beginning as soon as it is certain to be a call (``call_reader``), then its arguments as they
come. Text that looked like a call, but is not a call, is returned as text, without loss.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from moesaic.text.call_reader import CallReader, NotACallError
from moesaic.text.syntax import Syntax
from moesaic.text.tools import NAME, CallPart, Tools

Part = str | CallPart


class ToolCallParser:
    """Splits one answer into text and tool calls.

    ``control_tokens`` are the names of the control tokens that the caller must report with ``add_control_token``.
    """

    def __init__(self, syntax: Syntax, tools: Tools) -> None:
        self.control_tokens = syntax.control_tokens
        self.satisfied = False
        """Whether the answer has a call and may not have another; further text is then ignored."""
        self._syntax, self._parallel, self._required = syntax, tools.parallel, tools.call_required
        self._names = {tool.name for tool in tools.allowed}
        self._ids: list[str] = []  # of the calls that have begun
        self._has_text = False  # whether there was text since the last call
        # open: an object may begin here. list, items: before and in a list of objects. value: within an object.
        self._state: Literal["text", "open", "list", "items", "name", "id", "value"] = self._outside
        self._after_value: Literal["text", "open", "items"] = "text"  # the state after an object
        self._held: list[str] = []  # text that may still become a call, from its first control token on
        self._name = self._id = ""  # of a call whose name, id and arguments come separately
        self._call = CallReader(self._names)

    def add_text(self, text: str) -> list[Part]:
        """Add text of the answer; return the text and the parts of calls that can be returned now."""
        out: list[Part] = []
        position = 0
        while position < len(text) and not self.satisfied:
            run = self._call.plain_run(text, position) if self._state == "value" else 0
            if run:
                out.append(CallPart(len(self._ids) - 1, text[position : position + run]))
            else:
                self._add_char(text[position], out)
            position += run or 1
        return _join_parts(out)

    def add_control_token(self, name: str) -> list[Part]:
        """Process the control token ``name`` that the model has generated.

        Return the text, and the parts of tool calls, that are now certain.
        """
        out: list[Part] = []
        if self.satisfied:
            return out
        syntax = self._syntax
        if name == syntax.id_token and self._state == "name":
            self._held.append(name)
            self._state = "id"
        elif name == syntax.arguments_token and self._state in ("name", "id"):
            self._held.append(name)
            self._begin_value("text", self._name.strip())
        else:
            self.satisfied = self._break_off(out) and not self._parallel
            if name != syntax.start_token:
                self._emit(name, out)
            else:
                self._held, self._name, self._id = [name], "", ""
                self._state = "open" if syntax.form == "objects" else "list" if syntax.form == "list" else "name"
        return _join_parts(out)

    def finish(self, *, cut: bool = False) -> list[Part]:
        """End the answer; return the text and the parts of calls that were held back. Call it once.

        Text that may be the beginning of a call is returned as text, unless the answer was cut or had to be a call. In
        these cases it becomes a call without arguments if the name is known, and is dropped if not.

        Args:
            cut: whether the answer is incomplete, as with ``max_tokens``.
        """
        out: list[Part] = []
        held = "".join(self._held)
        if self._state == "value" and self._call.begun:
            self._break_off(out)
        elif self._required or (cut and held.strip()):
            self._show_cut_call(out)
        elif not (self._ids and self._state in ("open", "items") and not set(held) - set(" \t\r\n,;")):
            self._release(out)
        self._held = []
        return _join_parts(out)

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
            self._call.add(char)
        elif char == "[" and self._state in ("open", "list"):
            self._state = "items"
        elif char == "]" and self._state == "items" and self._ids:
            self._held, self._state = [], self._outside
        elif not char.isspace() and not (char in ",;" and self._ids):
            self._release(out)
        elif self._state == "open" and self._has_text:  # between lines of text, not between calls
            self._release(out)
            self._state = "open" if char.isspace() else "text"

    # Calls

    def _begin_value(self, after: Literal["text", "open", "items"], name: str | None = None) -> None:
        self._state, self._after_value, self._call = "value", after, CallReader(self._names, name)

    def _add_to_value(self, char: str, out: list[Part]) -> None:
        call, begun = self._call, self._call.begun
        try:
            arguments = call.add(char)
        except NotACallError:
            if not begun:
                self._release(out)
                return
            self._end_call()
            self._add_char(char, out)  # it stands behind a call whose last bracket is missing
            return
        if call.begun and not begun:
            self._begin_call(str(call.name), self._id.strip() or call.id, arguments, out)
        elif arguments:
            out.append(CallPart(len(self._ids) - 1, arguments))
        if call.begun:
            self._held = []
        if call.complete:
            self._end_call()

    def _begin_call(self, name: str, written_id: Any, arguments: str, out: list[Part]) -> None:
        call_id = self._call_id(written_id)
        self._ids.append(call_id)
        out.append(CallPart(len(self._ids) - 1, arguments, call_id, name))

    def _end_call(self) -> None:
        self._held, self._state, self._has_text = [], self._after_value, False
        self.satisfied = not self._parallel

    def _break_off(self, out: list[Part]) -> bool:
        """End the call that has begun, or else append the held text to ``out``; return whether there was a call."""
        if self._state != "value" or not self._call.begun:
            self._release(out)
            return False
        if rest := self._call.flush():
            out.append(CallPart(len(self._ids) - 1, rest))
        self._held, self._state, self._has_text = [], "text", False
        return True

    def _show_cut_call(self, out: list[Part]) -> None:
        """Drop the held text; append a call without arguments to ``out`` if the text has the name of a tool."""
        name = self._call.name if self._state == "value" else self._name.strip() if self._state == "id" else None
        if name in self._names:
            self._begin_call(str(name), None, "", out)

    def _call_id(self, written: Any) -> str:
        """Return ``written``, the id that the model wrote, if it is valid and unused; otherwise a new id."""
        pattern = r"[a-zA-Z0-9]{9}" if self._syntax.short_ids else r"[\w-]{1,64}"
        if isinstance(written, str) and re.fullmatch(pattern, written) and written not in self._ids:
            return written
        return self._syntax.new_id()

    # Text

    def _emit(self, text: str, out: list[Part]) -> None:
        """Append text to ``out`` as text of the answer; after a line break, the next character may begin a call."""
        if text:
            out.append(text)
            self._has_text = True
            self._state = self._outside if text.endswith("\n") else "text"

    def _release(self, out: list[Part]) -> None:
        """Append the held text to ``out`` as text of the answer, because it is not a call."""
        held, self._held, self._state = "".join(self._held), [], "text"
        self._emit(held, out)


def _join_parts(parts: list[Part]) -> list[Part]:
    """Return ``parts`` with adjacent texts joined into one, and adjacent parts of the same call joined into one."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, str) and isinstance(last, str):
            out[-1] = last + part
        elif isinstance(part, CallPart) and isinstance(last, CallPart) and part.index == last.index:
            out[-1] = CallPart(last.index, last.arguments + part.arguments, last.id, last.name)
        else:
            out.append(part)
    return out
