"""Text that comes out piece by piece: finished characters only, and never past a stop string.

Knows bytes, characters and strings. Does not know requests or the engine. Each token costs the same,
however long the text already is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from moesaic.errors import InvalidParameter
from moesaic.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes one id at a time: what it has returned, joined, is ``tokenizer.decode`` of all ids.

    A character whose last byte has not come yet is held back; bytes that can no longer become a
    character are returned as U+FFFD as soon as that is certain.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, begins: bool = True) -> None:
        """Decode a text from its beginning, where a SentencePiece loses its leading space, or one that goes on."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._fresh = begins
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.byte_errors)

    def add(self, id: int) -> str:
        """Return the characters that ``id`` finishes."""
        if not self._tokenizer.is_special(id):
            text = self._utf8.decode(self._tokenizer.bytes(id, self._fresh))
            self._fresh = False
            return text
        # A character never goes on behind a special token.
        text = self._utf8.decode(b"", final=True)
        if self._skip_special:
            return text
        self._fresh = False
        return text + self._tokenizer.piece(id)

    def finish(self) -> str:
        """Return what is left of a character that was never finished (U+FFFD, or nothing)."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Passes text on up to the first stop string, wherever pieces begin and end.

    The occurrence that begins first wins, and is not passed on. Text that may turn out to be the
    beginning of a stop string is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise InvalidParameter("stop", "a stop string cannot be empty")
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=1)
        self._held = ""
        self.stopped: str | None = None  # the stop string that was met

    def add(self, text: str) -> tuple[str, bool]:
        """Return (text to show, whether a stop string was met); after that, all further text is dropped."""
        if self.stopped is not None:
            return "", True
        if not self._held and self._firsts.isdisjoint(text):  # as nearly always
            return text, False
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        # A longer stop string that began earlier may still be under way.
        keep = self._possible(text)
        if found and min(found)[0] <= keep:
            at, self.stopped = min(found)
            self._held = ""
            return text[:at], True
        self._held = text[keep:]
        return text[:keep], False

    def finish(self) -> str:
        """Return the text that was held back: the end came before it could become a stop string.

        A stop string in it that only waited for a longer one that began earlier is met now.
        """
        text, self._held = self._held, ""
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not found:
            return text
        at, self.stopped = min(found)
        return text[:at]

    def _possible(self, text: str) -> int:
        """Return where the earliest unfinished stop string at the end of ``text`` may begin."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._firsts and any(
                stop.startswith(text[at:]) and len(stop) > len(text) - at for stop in self._stops
            ):
                return at
        return len(text)


class TextStream:
    """One sequence's way from ids to text that can be shown: detokenizer and stop strings in one."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, skip_special: bool = True, begins: bool = True
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special, begins=begins)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.stopped

    def add(self, id: int) -> tuple[str, bool]:
        """Return (text to show, whether a stop string was met)."""
        return self._stops.add(self._detokenizer.add(id))

    def finish(self) -> str:
        """Return the rest of the text once the last id has been added; nothing after a stop string."""
        text, _ = self._stops.add(self._detokenizer.finish())
        return text + self._stops.finish()
