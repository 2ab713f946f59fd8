"""Incremental detokenization and stop strings.

Only complete characters are returned, and no text from a stop string on. The cost per token does not depend on the
length of the text. This module does not depend on requests or the engine.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from moesaic.errors import InvalidParameter
from moesaic.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoder: the texts that it returns, joined, equal ``tokenizer.decode`` of all ids.

    An incomplete character is held back until its last byte comes. Bytes that cannot become a valid character are
    returned as U+FFFD as soon as that is certain.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, begins: bool = True) -> None:
        """Create a decoder.

        Args:
            tokenizer: the tokenizer of the ids.
            skip_special: whether special tokens are left out of the text.
            begins: whether the first id begins a text. SentencePiece drops the leading space of a text, but keeps it
                in the continuation of a text.
        """
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_start = begins
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.byte_errors)

    def add(self, token_id: int) -> str:
        """Return the characters that a token completes."""
        if not self._tokenizer.is_special(token_id):
            text = self._utf8.decode(self._tokenizer.bytes(token_id, self._at_start))
            self._at_start = False
            return text
        # A special token ends a character: it cannot continue after the token.
        text = self._utf8.decode(b"", final=True)
        if self._skip_special:
            return text
        self._at_start = False
        return text + self._tokenizer.piece(token_id)

    def finish(self) -> str:
        """Return U+FFFD for an incomplete character at the end of the text; otherwise an empty string."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Filter that returns text up to the first stop string, however the text is cut into pieces.

    If several stop strings occur, the one that begins first ends the text. It is not returned. Text that may be the
    beginning of a stop string is held back until this is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise InvalidParameter("stop", "a stop string must not be empty")
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=1)
        self._held = ""
        self.stopped: str | None = None  # the stop string that ended the text

    def add(self, text: str) -> tuple[str, bool]:
        """Return (text to show, whether a stop string was met); text after a stop string is dropped."""
        if self.stopped is not None:
            return "", True
        if not self._held and self._first_chars.isdisjoint(text):  # the usual case
            return text, False
        text = self._held + text
        matches = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        # A longer stop string that begins earlier may be incomplete; it has priority over a match that begins later.
        end = self._partial_match(text)
        if matches and min(matches)[0] <= end:
            start, self.stopped = min(matches)
            self._held = ""
            return text[:start], True
        self._held = text[end:]
        return text[:end], False

    def finish(self) -> str:
        """Return the text that was held back, up to a stop string in it.

        The held text can contain a complete stop string, if a longer one begins earlier and is incomplete.
        """
        text, self._held = self._held, ""
        matches = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not matches:
            return text
        start, self.stopped = min(matches)
        return text[:start]

    def _partial_match(self, text: str) -> int:
        """Return the start of the earliest incomplete stop string at the end of ``text``, or its length."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_chars and any(
                stop.startswith(text[start:]) and len(stop) > len(text) - start for stop in self._stops
            ):
                return start
        return len(text)


class TextStream:
    """Detokenizer and stop strings of one sequence: turns token ids into text that can be shown."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, skip_special: bool = True, begins: bool = True
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special, begins=begins)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> str | None:
        """Stop string that ended the text; None if none did."""
        return self._stops.stopped

    def add(self, token_id: int) -> tuple[str, bool]:
        """Return (text to show, whether a stop string was met)."""
        return self._stops.add(self._detokenizer.add(token_id))

    def finish(self) -> str:
        """Return the rest of the text; call it once, after the last token. It is empty after a stop string."""
        text, _ = self._stops.add(self._detokenizer.finish())
        return text + self._stops.finish()
