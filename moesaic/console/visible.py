"""Escaping of characters that control a terminal or change the reading direction."""

from __future__ import annotations

import re

# C0 except tab and newline, DEL, and C1 (0x9B alone begins an escape sequence); then the bidirectional overrides and
# isolates, which can make a line read as another one (CVE-2021-42574); then surrogates, which cannot be encoded.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return ``text`` with control characters as escapes such as ``\\x1b`` or ``\\u202e``; tab and newline stay."""
    return CONTROL_CHARACTERS.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """Return ``text`` in one line: white space becomes single spaces, and control characters are escaped."""
    return visible(" ".join(text.split()))
