"""Parses the JSON arguments of tool calls into objects, also if ``max_tokens`` cut them off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec


def parse(text: str) -> dict[str, Any] | None:
    """Return the JSON object in ``text`` as a dictionary; None if ``text`` is not a complete JSON object."""
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        value = msgspec.json.decode(text)
        return value if isinstance(value, dict) else None
    return None


def parse_partial(text: str) -> dict[str, Any]:
    """Return the complete members of a JSON object that may be cut off; {} if there are none.

    An incomplete string, number or literal at the end is left out, as it is by the client library of Anthropic.
    """
    return next((value for closed in (text, *_closed(text)) if (value := parse(closed)) is not None), {})


def _closed(text: str) -> Iterator[str]:
    """Yield a cut-off JSON object with its brackets closed: first with its last value, then without this value."""
    end, brackets = 0, ""  # after the last value that is certainly complete
    open_brackets, quoted, escaped = "", False, False
    for index, char in enumerate(text):
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "{[":
            open_brackets = ("}" if char == "{" else "]") + open_brackets
            end, brackets = index + 1, open_brackets
        elif char in "}]":
            open_brackets = open_brackets[1:]
        elif char == ",":
            end, brackets = index, open_brackets
    yield text + open_brackets
    yield text[:end] + brackets
