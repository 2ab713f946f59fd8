"""An index of the n-grams of one sequence, which proposes its next tokens (prompt lookup decoding).

Text often repeats: an answer quotes the prompt, edits code, or fills in the same form again. The tokens that followed
the last tokens of a sequence when these occurred before are therefore a good guess for what follows now. The method is
that of github.com/apoorvumang/prompt-lookup-decoding. This module does not depend on models or costs.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST = 3
"""Tokens of the shortest match."""
LONGEST = 32
"""Tokens after which two matches count as equally long."""
CANDIDATES = 8
"""Earlier occurrences, latest first, among which the longest match is chosen."""


class NgramIndex:
    """The places of all n-grams of ``SHORTEST`` tokens in a sequence that only grows.

    A token is added in constant time, and a match is found in constant time.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram: the place after its latest occurrence
        self._earlier: dict[int, int] = {}  # place after an n-gram: the place after its previous occurrence
        self._next = SHORTEST  # first place that is not in the index

    def extend(self, ids: Sequence[int]) -> None:
        """Add the n-grams of ``ids`` that a token follows. Earlier calls had a prefix of ``ids``."""
        for place in range(self._next, len(ids)):
            ngram = tuple(ids[place - SHORTEST : place])
            if (before := self._latest.get(ngram)) is not None:
                self._earlier[place] = before
            self._latest[ngram] = place
        self._next = max(self._next, len(ids))

    def match(self, ids: Sequence[int]) -> tuple[int, int]:
        """Return the place after the best earlier occurrence of the last tokens of ``ids``, and its length in tokens.

        The longest match is the best, and of these the latest. Both are 0 if there is none. ``ids`` was given to
        ``extend`` before.
        """
        best = length = 0
        place = self._latest.get(tuple(ids[-SHORTEST:]))
        for _ in range(CANDIDATES):
            if place is None or length == LONGEST:
                break
            if (common := _common_suffix(ids, place)) > length:
                best, length = place, common
            place = self._earlier.get(place)
        return best, length


def continuation(ids: Sequence[int], place: int, count: int) -> tuple[int, ...]:
    """Return the ``count`` tokens that follow ``place`` in ``ids``, as if ``ids`` repeated itself from ``place`` on."""
    period = len(ids) - place
    return tuple(ids[place + offset % period] for offset in range(count))


def _common_suffix(ids: Sequence[int], place: int) -> int:
    """Return the number of equal tokens before ``place`` and at the end of ``ids``, at most ``LONGEST``."""
    end = len(ids)
    most = min(place, LONGEST)
    return next((n for n in range(SHORTEST, most) if ids[place - 1 - n] != ids[end - 1 - n]), most)
