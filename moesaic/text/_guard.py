"""Keeps the names of special tokens in a user's message from becoming special tokens.

Some chat formats build a prompt as one text, from markup and messages, and encode it at the end. Before that, a random
guard string is inserted into each name of a special token that a message contains. The guard string is removed after
the special tokens are found.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from moesaic.text.tokenizer import Tokenizer


class Guard:
    """Guard of one prompt. ``text`` is the guard string: 32 random hexadecimal digits, which JSON does not escape."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text = secrets.token_hex(16)
        self._tokenizer = tokenizer

    def protect(self, text: str) -> str:
        """Return ``text`` with the guard string after the first character of each name of a special token."""
        starts = [match.start() for match in self._tokenizer.find_special(text)]
        while starts:
            for start in reversed(starts):
                text = text[: start + 1] + self.text + text[start + 1 :]
            # Names can overlap: the rest of a guarded name may be part of another name.
            starts = [match.start() for match in self._tokenizer.find_special(text)]
        return text

    def protect_all(self, value: Any) -> Any:
        """Return a copy of a JSON value with all strings protected (``protect``), including the keys of objects."""
        if isinstance(value, str):
            return self.protect(value)
        if isinstance(value, Mapping):
            return {self.protect_all(key): self.protect_all(item) for key, item in value.items()}
        return [self.protect_all(item) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt made of markup and protected text; the guard strings are removed."""
        return self._tokenizer.encode_with_special(text, self.text)
