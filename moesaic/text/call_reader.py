"""Incremental reader of one tool call that a model writes as a JSON object.

The object has the name and the arguments of the call, or the arguments only. The reader decides as early as possible
whether the object is a call, and returns the arguments' text while the model writes it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

from moesaic.text.lenient_json import LenientJson

CALL_KEYS = ("name", "type", "function", "id", "arguments", "parameters")
"""Keys that may come first in an object that is a call."""
ARGUMENT_KEYS = ('"arguments"', '"parameters"')

MAX_BLANKS = 256
"""Maximum number of characters before the first key of an object. More than that is only white space, and the object is
then not a call."""


class NotACallError(Exception):
    """The object is not a call of an allowed tool, or a character after the arguments does not belong to it."""


class CallReader:
    """Reads, character by character, the JSON object in which a model writes one tool call.

    The object is certainly a call as soon as an allowed name is known and the arguments have begun. From then on,
    ``begun`` is true, even if the arguments turn out not to be JSON. Text that was returned cannot be taken back, so
    the rest of invalid arguments is returned as the model wrote it. Arguments before the name are held back until the
    name is known. Arguments that are written as a JSON string are held back until the string ends.

    An object whose arguments are not an object is not a call. Neither is one with a description: that is the definition
    of a tool, which the model repeats.
    """

    def __init__(self, allowed: Collection[str], name: str | None = None) -> None:
        """Prepare to read one object.

        Args:
            allowed: the names of the tools that may be called.
            name: the name of the tool if the object has only the arguments; None if the object has the name.
        """
        self.begun = False
        self.name = name if name in allowed else None
        """Name of the tool; None while it is not known."""
        self.id: Any = None
        """Value of "id" as the model wrote it; None while it is not known."""
        self._allowed, self._bare = allowed, name is not None
        self._json, self._length = LenientJson(), 0
        self._first_key = not self._bare  # whether the first key is not complete
        self._member: str | None = None  # the key of the current member, if its value is needed
        self._string: list[str] = []  # the text of that value, if it is a string
        self._held: list[str] = []  # text of the arguments that was not returned
        self._arguments: Literal["none", "object", "string", "ended"] = "none"

    @property
    def complete(self) -> bool:
        """Whether the end of the object was read."""
        return self._json.complete

    def plain_run(self, text: str, start: int) -> int:
        """Return how many characters of ``text`` from ``start`` on are arguments that ``add`` would return unchanged.

        The caller may return these characters itself and skip them.
        """
        return self._json.plain_run(text, start) if self.begun and self._arguments == "object" else 0

    def add(self, char: str) -> str:
        """Read the next character of the object; return the new text of the arguments, which may be empty.

        The text is strict JSON if the model writes JSON.

        Raises:
            NotACallError: the object is not a call, or the call ended before this character.
        """
        reader, self._length = self._json, self._length + 1
        state, depth = reader.state, reader.depth
        text = reader.add(char)
        level = self._level()
        if reader.invalid:
            self._tolerate(level)
        if self._first_key and self._length > MAX_BLANKS and reader.state in ("value", "first key"):
            raise NotACallError
        if reader.depth == level > 0:
            self._check_key(reader.keys[level - 1])
        if state == "value" != reader.state and depth == level and not self.begun:
            self._begin_value(reader.keys[level - 1] if level else ARGUMENT_KEYS[0], char)
        if self._member is not None:
            self._add_to_value(text, ended=reader.depth == level and reader.state in ("next", "end"))
        return self._new_arguments()

    def flush(self) -> str:
        """Return the rest of the arguments' text; call it if the answer ends within this object."""
        return self._json.flush() if self.begun and self._arguments == "object" else ""

    def _level(self) -> int:
        """Return how many brackets are open around the name and the arguments; 0 if there is no name."""
        if self._bare:
            return 0
        reader = self._json
        return 2 if reader.depth > 1 and reader.keys[0] == '"function"' and reader.bracket(2) == "{" else 1

    def _tolerate(self, level: int) -> None:
        """Accept an invalid character in the arguments of a call that has begun, or else raise NotACallError.

        ``level`` is the result of ``_level``.
        """
        if not self.begun or self._arguments != "object":
            raise NotACallError
        if self._json.depth <= level:
            self._json.recover()

    def _check_key(self, key: str) -> None:
        state = self._json.state
        if self._first_key and state == "in key" and not any(name.startswith(key[1:]) for name in CALL_KEYS):
            raise NotACallError
        if state == "colon" and not self.begun:
            if key == '"description"' or (self._first_key and key[1:-1] not in CALL_KEYS):
                raise NotACallError
            self._first_key = False

    def _begin_value(self, key: str, char: str) -> None:
        string = char in "\"'"
        if key in ARGUMENT_KEYS and self._arguments == "none":
            if not string and char != "{":
                raise NotACallError
            self._member, self._arguments = key, "string" if string else "object"
        elif key == '"name"' and not string:
            raise NotACallError
        elif key in ('"name"', '"id"') and string:
            self._member = key

    def _add_to_value(self, text: str, *, ended: bool) -> None:
        if self._member in ARGUMENT_KEYS and self._arguments == "object":
            self._held.append(text)
            if ended:
                self._member, self._arguments = None, "ended"
            return
        self._string.append(text)
        if ended:
            self._end_string(json.loads("".join(self._string)))
        elif self._member == '"name"':
            written = "".join(self._string)[1:]
            if not any(name.startswith(written) for name in self._allowed):
                raise NotACallError

    def _end_string(self, value: str) -> None:
        member, self._member, self._string = self._member, None, []
        if member == '"name"':
            if value not in self._allowed:
                raise NotACallError
            self.name = value
        elif member == '"id"':
            self.id = value
        else:
            self._held, self._arguments = [_object_text(value)], "ended"

    def _new_arguments(self) -> str:
        if not self.begun and self.complete:
            if self.name is None:
                raise NotACallError
            if self._arguments == "none":
                self._held, self._arguments = ["{}"], "ended"
        self.begun = self.begun or bool(self.name is not None and self._held)
        if not self.begun:
            return ""
        text, self._held = "".join(self._held), []
        return text


def _object_text(text: str) -> str:
    """Return the JSON object in ``text`` as strict JSON; an empty text, as some models write, becomes ``{}``.

    Raises:
        NotACallError: ``text`` is not one JSON object.
    """
    reader, out = LenientJson(), list[str]()
    for char in text.strip() or "{}":
        if reader.complete or reader.invalid:
            raise NotACallError
        out.append(reader.add(char))
    if not reader.complete:
        raise NotACallError
    return "".join(out)
