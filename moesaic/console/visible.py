"""Text that cannot drive a terminal.

Knows which characters a terminal takes as orders or which turn the order of what is read. Does not
know where the text came from: all of it is shown, none of it is obeyed.
"""

from __future__ import annotations

import re

# C0 but for tab and newline, DEL and C1 (0x9B alone begins an escape sequence); then the bidirectional
# overrides and isolates, with which a line can be made to read as another (CVE-2021-42574).
ORDERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return ``text`` with every character that a terminal would obey written as ``\\x1b``, ``\\u202e``, ...

    Tab and newline stay.
    """
    return ORDERS.sub(_written, text)


def _written(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """Return ``text`` as one visible line."""
    return visible(" ".join(text.split()))
