"""Incremental detokenization and stop strings.

Only complete characters are returned, and no text after a stop string. The cost per token does not depend on the
length of the text. This module does not depend on requests or the engine.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from moesaic.errors import InvalidParameter
from moesaic.text.tokenizer import Tokenizer

FIRST_SURROGATE, SURROGATES = 0xD800, 0x800


class Detokenizer:
    """Incremental decoder: it gets token ids one by one and returns the text that they complete.

    All returned texts joined equal ``tokenizer.decode`` of all ids. An incomplete character is held back until its last
    byte comes. Bytes that cannot become a valid character are returned as U+FFFD as soon as that is certain.
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

    def bytes(self, token_id: int) -> bytes:
        """Return the bytes that ``token_id`` would add to the text next; none if it is a token left out."""
        special = self._tokenizer.is_special(token_id)
        return (
            b"" if special and self._skip_special else self._tokenizer.bytes(token_id, self._at_start and not special)
        )

    def add(self, token_id: int) -> str:
        """Add a token to the text; return the characters that it completes."""
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
        """End the text; return U+FFFD if its last character is incomplete, otherwise an empty string."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Returns a text up to the first stop string, although the text comes in pieces.

    If several stop strings occur, the one that begins first ends the text. It is not returned. Text that may be the
    beginning of a stop string is held back until this is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise InvalidParameter("stop", "a stop string must not be empty")
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.stopped: str | None = None  # the stop string that ended the text

    def add(self, text: str) -> tuple[str, bool]:
        """Add text; return (text that can be shown, whether a stop string was found). Text after it is dropped."""
        if self.stopped is not None:
            return "", True
        if not self._held and self._first_chars.isdisjoint(text):  # the usual case
            return text, False
        text = self._held + text
        match = self._first_match(text)
        # A longer stop string that begins earlier may be incomplete; it has priority over a match that begins later.
        end = partial_match(text, self._stops)
        if match and match[0] <= end:
            return self._stop(text, *match), True
        self._held = text[end:]
        return text[:end], False

    def finish(self) -> str:
        """End the text; return what was held back, up to a stop string in it.

        The held text can contain a complete stop string, if a longer one begins earlier and is incomplete.
        """
        text, self._held = self._held, ""
        match = self._first_match(text)
        return self._stop(text, *match) if match else text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Return the start of the first complete stop string in ``text`` and that string; None if there is none."""
        return min(((start, stop) for stop in self._stops if (start := text.find(stop)) >= 0), default=None)

    def _stop(self, text: str, start: int, stop: str) -> str:
        self._held, self.stopped = "", stop
        return text[:start]


def partial_match(text: str, wanted: Collection[str]) -> int:
    """Return where the earliest incomplete one of ``wanted`` at the end of ``text`` starts, or the length of ``text``.

    None of ``wanted`` is empty.
    """
    first_chars, longest = {string[0] for string in wanted}, max(map(len, wanted), default=1)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if text[start] in first_chars and any(
            string.startswith(text[start:]) and len(string) > len(text) - start for string in wanted
        ):
            return start
    return len(text)


class _HiddenNames:
    """Lets stop strings match the names of special tokens that are left out of the text.

    In the text that is searched, one unpaired surrogate stands for each special token that a stop string names. Such a
    character cannot occur in decoded text. A stop string with a name has a second form, with surrogates in place of
    names: the model may generate the token or spell its name.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        """Find the special tokens that ``stops`` name; ``tokenizer`` is None if special tokens are shown."""
        control = tokenizer.control if tokenizer else {}
        names = sorted({match[0] for stop in stops for match in tokenizer.find_special(stop)}) if tokenizer else []
        marks = {name: chr(FIRST_SURROGATE + index) for index, name in enumerate(names[:SURROGATES])}
        self.marks = {control[name]: mark for name, mark in marks.items()}
        self._remove = {ord(mark): None for mark in marks.values()}
        self._names = {ord(mark): name for name, mark in marks.items()}
        marked = (_replace_all(stop, marks) for stop in stops)
        self.stops = (*stops, *(stop for stop in marked if stop not in stops))

    def hide(self, text: str) -> str:
        """Return ``text`` without the characters that stood for special tokens while stop strings were searched."""
        return text.translate(self._remove) if self._remove else text

    def name(self, stop: str) -> str:
        """Return ``stop`` with names in place of surrogates, as the request states it."""
        return stop.translate(self._names)


def _replace_all(text: str, replacements: dict[str, str]) -> str:
    for name in sorted(replacements, key=len, reverse=True):
        text = text.replace(name, replacements[name])
    return text


class TextStream:
    """Turns the token ids of one sequence into text that can be shown, up to a stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        skip_special: bool = True,
        begins: bool = True,
        included: Collection[str | int] = (),
    ) -> None:
        """Create a stream.

        Args:
            tokenizer, skip_special, begins: as for ``Detokenizer``.
            stops: strings that end the text. One that names a special token matches that token, also if it is left out
                of the text.
            included: stop strings that are kept in the text if they end it.
        """
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special, begins=begins)
        self._hidden = _HiddenNames(tokenizer if skip_special else None, stops)
        self._stops = StopStrings(self._hidden.stops)
        self._included = included
        self.decoded = 0
        """Number of characters that were decoded so far, including those that are held back."""

    @property
    def stopped(self) -> str | None:
        """Stop string that ended the text; None if none did."""
        stop = self._stops.stopped
        return None if stop is None else self._hidden.name(stop)

    def bytes(self, token_id: int) -> bytes:
        """Return the bytes that the text would get if ``token_id`` came next."""
        return self._detokenizer.bytes(token_id)

    def add(self, token_id: int) -> tuple[str, bool]:
        """Add a token; return (text that can be shown now, whether a stop string was found)."""
        text = self._detokenizer.add(token_id)
        self.decoded += len(text)
        return self._search(text + self._hidden.marks.get(token_id, "")), self._ended

    def finish(self) -> str:
        """End the text, once, after the last token; return what was held back. It is empty after a stop string."""
        return self._search(self._detokenizer.finish(), last=True)

    @property
    def _ended(self) -> bool:
        return self._stops.stopped is not None

    def _search(self, text: str, *, last: bool = False) -> str:
        """Add ``text`` to the searched text; return what can be shown now. With ``last``, nothing is held back."""
        ended = self._ended
        shown, _ = self._stops.add(text)
        shown = self._hidden.hide(shown + self._stops.finish() if last else shown)
        new_stop = None if ended else self.stopped
        return shown + new_stop if new_stop in self._included and new_stop is not None else shown
