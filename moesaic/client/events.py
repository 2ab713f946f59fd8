"""Server-sent events out of bytes that come in arbitrary pieces (HTML standard, section 9.2.6).

Knows only the field ``data``: the API names no events. Does not know what is in them.
"""

from __future__ import annotations

import re

from moesaic.errors import BadReply

LONGEST = 16 << 20
"""Bytes of one event; more is no event of this API."""
END = re.compile(rb"\r\n|\n|\r")


class Events:
    """Collects the bytes of one connection and returns the data of each whole event."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[str]:
        """Return the data of the events that these bytes complete.

        Raises:
            BadReply: an event is too long, or no UTF-8.
        """
        text = self._rest + piece
        # A carriage return at the very end may be half of a line's end: it waits for what follows.
        usable = text[:-1] if text.endswith(b"\r") else text
        *lines, rest = END.split(usable)
        self._rest = rest + text[len(usable) :]
        if len(self._rest) + self._size > LONGEST:
            raise BadReply(f"the server sent an event of more than {LONGEST} bytes")
        return [found for line in lines if (found := self._line(line)) is not None]

    def _line(self, line: bytes) -> str | None:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._size += len(value)
            return None
        if not self._data:
            return None
        whole, self._data, self._size = b"\n".join(self._data), [], 0
        try:
            return whole.decode()
        except UnicodeDecodeError:
            raise BadReply("the server sent an event that is no UTF-8") from None
