"""Incremental reader of a JSON object as language models write it.

The reader gets an object character by character and returns strict JSON, also character by character, so that the
arguments of a tool call can be sent while the model writes them. Text that is strict JSON is returned as it is. The
reader also accepts what Python's ``repr`` of a dictionary looks like (single quotes, ``True``, ``False``, ``None``),
control characters in strings, and backslashes that escape nothing.
"""

from __future__ import annotations

import json
import math
import re
from typing import Literal

MAX_DEPTH = 512
"""Maximum number of nested objects and lists; parsers of JSON have limits of this order."""
MAX_SCALAR = 4300
"""Maximum number of characters of a number; Python's ``int`` has the same limit."""
MAX_KEY = 80
"""Number of characters after which the rest of a key is not recorded; the keys that a caller compares are shorter."""

NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
PLAIN = re.compile(r"""[^"'\\\x00-\x1f]+""")
"""Characters inside a string that neither end it nor are changed."""
LITERALS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
WHITE_SPACE = " \t\r\n"
AFTER_SCALAR = frozenset(WHITE_SPACE + ",}]")
CLOSING = {"{": "}", "[": "]"}
ESCAPE_LENGTHS = {"u": 6, "x": 4, "U": 10}
"""Lengths of the escape sequences that have hexadecimal digits, with the backslash. In JSON only the first one exists.
"""

State = Literal["value", "first value", "first key", "key", "in key", "colon", "in string", "in scalar", "next", "end"]


class LenientJson:
    """Reads one JSON object character by character and returns it as strict JSON.

    Attributes:
        state: what the reader expects next, such as a key or a value.
        keys: for each open bracket, the key of the member that is being read, with its quotes; "" in a list.
        invalid: whether a character was read that cannot be part of the object. From that character on, text is
            returned as it is, and only brackets are counted.
    """

    def __init__(self) -> None:
        self.state: State = "value"
        self.keys: list[str] = []
        self.invalid = False
        self._open: list[str] = []  # the open brackets
        self._held = ""  # a scalar or an escape sequence that is incomplete
        self._quote = ""  # the quote that ends the current string
        self._surrogate = ""  # the escape sequence of a high surrogate, which waits for the low one

    @property
    def depth(self) -> int:
        """Number of objects and lists that are open."""
        return len(self._open)

    def bracket(self, depth: int) -> str:
        """Return the open bracket, { or [, at ``depth``; depth 1 is the outermost object."""
        return self._open[depth - 1]

    @property
    def complete(self) -> bool:
        """Whether the whole object was read and is valid."""
        return self.state == "end" and not self.invalid

    def plain_run(self, text: str, start: int) -> int:
        """Return how many characters from ``start`` on are inside a string and would be returned unchanged."""
        if self.state != "in string" or self.invalid or self._held or self._surrogate:
            return 0
        match = PLAIN.match(text, start)
        return match.end() - start if match else 0

    def add(self, char: str) -> str:
        """Read the next character; return the strict JSON that it completes, often none. Not allowed after the end."""
        if self.invalid:
            return self._add_invalid(char)
        if self.state in ("in string", "in key"):
            return self._add_to_string(char)
        if self.state == "in scalar" and char not in AFTER_SCALAR and len(self._held) < MAX_SCALAR:
            self._held += char
            return ""
        try:
            text = self._end_scalar() if self.state == "in scalar" else ""
            text += char if char in WHITE_SPACE else self._add_structure(char)
        except _InvalidError:
            self.invalid = True
            return self._add_invalid(char)
        if self.state != "in scalar":
            self._held = ""
        return text

    def flush(self) -> str:
        """Return a held-back part of a number, true, false or null; call it if the text ends within the object."""
        if self.invalid or self.state != "in scalar":
            return ""
        held, self._held = self._held, ""
        return next((value[: len(held)] for word, value in LITERALS.items() if word.startswith(held)), held)

    def recover(self) -> None:
        """Leave the state ``invalid``: read on as if the value that was closed last had been valid."""
        self.invalid = False
        self.state = "next" if self._open else "end"

    def _add_invalid(self, char: str) -> str:
        if char in CLOSING:
            self._open_bracket(char)
        elif char in CLOSING.values() and self._open:
            self._close_bracket()
        text, self._held = self._held + char, ""
        return text

    def _add_structure(self, char: str) -> str:
        """Read a character outside strings, numbers and literals; return the text for it.

        Raises:
            _InvalidError: the character is not allowed at this position; nothing was changed.
        """
        value = self.state in ("value", "first value")
        if char in CLOSING and value and (char == "{" or self._open) and self.depth < MAX_DEPTH:
            self._open_bracket(char)
            self.state = "first key" if char == "{" else "first value"
        elif char in "\"'" and ((value and self._open) or self.state in ("key", "first key")):
            return self._begin_string(char)
        elif char in CLOSING.values() and self._may_close(char):
            self._close_bracket()
            self.state = "next" if self._open else "end"
        elif char == ":" and self.state == "colon":
            self.state = "value"
        elif char == "," and self.state == "next":
            self.state = "key" if self._open[-1] == "{" else "value"
        elif value and self._open and char in "-0123456789tfnTFN":
            self.state, self._held = "in scalar", char
            return ""
        else:
            raise _InvalidError
        return char

    def _may_close(self, char: str) -> bool:
        first = "first key" if char == "}" else "first value"
        return bool(self._open) and CLOSING[self._open[-1]] == char and self.state in ("next", first)

    def _open_bracket(self, char: str) -> None:
        self._open.append(char)
        self.keys.append("")

    def _close_bracket(self) -> None:
        self._open.pop()
        self.keys.pop()

    def _end_scalar(self) -> str:
        """Return the number or literal that was held back, as strict JSON.

        It stays in ``_held`` until the character behind it is found to be valid.

        Raises:
            _InvalidError: it is neither a literal nor a number that float64 can express.
        """
        text = self._held
        if text in LITERALS:
            self.state = "next"
            return LITERALS[text]
        whole = set(text) <= set("-0123456789")
        if len(text) >= MAX_SCALAR or not NUMBER.fullmatch(text) or not (whole or math.isfinite(float(text))):
            raise _InvalidError
        self.state = "next"
        return text

    # Strings

    def _begin_string(self, quote: str) -> str:
        self.state = "in key" if self.state in ("key", "first key") else "in string"
        self._quote = quote
        if self.state == "in key":
            self.keys[-1] = '"'
        return '"'

    def _add_to_string(self, char: str) -> str:
        in_key = self.state == "in key"
        text = self._string_text(char)
        if in_key and len(self.keys[-1]) < MAX_KEY:
            self.keys[-1] += text
        return text

    def _string_text(self, char: str) -> str:
        if self._held:
            return self._add_to_escape(char)
        if char == "\\":
            self._held = char
            return ""
        if char != self._quote:
            return self._paired(_escaped(char))
        self.state = "colon" if self.state == "in key" else "next"
        return self._paired("") + '"'

    def _add_to_escape(self, char: str) -> str:
        self._held += char
        held, kind = self._held, self._held[1]
        length = ESCAPE_LENGTHS.get(kind, 2)
        if length > 2 < len(held) and char not in "0123456789abcdefABCDEF":
            self._held = ""
            return self._paired("\\\\" + held[1:-1]) + self._string_text(char)
        if len(held) < length:
            return ""
        self._held = ""
        if length == 2:
            known = kind in '"\\/bfnrt'
            return self._paired(held if known else "'" if kind == "'" else "\\\\" + _escaped(kind))
        code = int(held[2:], 16)
        if code > 0x10FFFF:
            return self._paired("\\\\" + held[1:])
        return self._paired(held if kind == "u" else json.dumps(chr(code))[1:-1], code)

    def _paired(self, text: str, code: int = 0) -> str:
        """Return ``text`` of a string, with the high surrogate that was held back in front of it.

        ``code`` is the character's code if ``text`` is an escape sequence, otherwise 0. A high surrogate is held back
        until its other half comes. A surrogate without its other half becomes U+FFFD, because it could not be encoded.
        """
        if not (self._surrogate or 0xD800 <= code < 0xE000):
            return text
        waiting, self._surrogate = self._surrogate, ""
        if 0xDC00 <= code < 0xE000:
            return waiting + text if waiting else "\\ufffd"
        if 0xD800 <= code < 0xDC00:
            self._surrogate, text = text, ""
        return "\\ufffd" + text if waiting else text


def _escaped(char: str) -> str:
    """Return ``char`` as JSON writes it inside a string."""
    return json.dumps(char)[1:-1] if char < " " or char == '"' else char


class _InvalidError(ValueError):
    """A character cannot be part of a JSON object at its position."""
