"""Incremental parser for server-sent events (HTML standard, section 9.2.6).

The parser returns the field ``data`` and ignores all others: the API does not use event names or ids. It does not
interpret the data.
"""

from __future__ import annotations

import re

from moesaic.errors import BadReply

MAX_EVENT_BYTES = 16 << 20
"""Maximum size of one event. A longer event raises ``BadReply``, because no API sends one."""
LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Parser for the bytes of one connection. It splits them into events and returns the data of each event."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[str]:
        """Parse the next bytes of the connection; return the data of each event that they complete.

        Raises:
            BadReply: an event is too long, or is not valid UTF-8.
        """
        text = self._rest + chunk
        if b"\r" in text:
            # A carriage return at the end may be the first half of "\r\n", so it waits for the next chunk.
            usable = text[:-1] if text.endswith(b"\r") else text
            *lines, rest = LINE_END.split(usable)
            rest += text[len(usable) :]
        else:
            *lines, rest = text.split(b"\n")  # faster than the regular expression
        self._rest = rest
        if len(rest) + self._size > MAX_EVENT_BYTES:
            raise BadReply(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes; check base_url")
        return [self._take_event() for line in lines if self._ends_event(line)]

    def _ends_event(self, line: bytes) -> bool:
        """Add a line to the current event; return whether the line ends an event that has data."""
        if not line:
            return bool(self._data)
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value)
        return False

    def _take_event(self) -> str:
        event, self._data, self._size = b"\n".join(self._data), [], 0
        try:
            return event.decode()
        except UnicodeDecodeError:
            raise BadReply("the server sent an event that is not valid UTF-8; check base_url") from None
