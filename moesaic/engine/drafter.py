"""Proposed tokens for one sequence, and the rate at which they are accepted.

The rate is learned by comparing proposals with the tokens that follow, also where the proposals did not run: that costs
nothing. Longer matches are right more often, so each class of lengths has a rate of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moesaic.engine.ngrams import NgramIndex, continuation

MATCH_CLASSES = ((8, 0.8), (5, 0.6), (0, 0.4))
"""Classes of matches: the tokens of the shortest match, and the acceptance rate that is assumed at first."""
ASSUMED_TRIALS = 2.0
"""Weight of the assumed acceptance rate, as a number of observed tokens."""
DECAY = 0.95
"""Factor by which each observed token reduces the weight of earlier ones."""


@dataclass(slots=True)
class Drafter:
    """The proposals for one sequence, and how often they were right."""

    index: NgramIndex = field(default_factory=NgramIndex)
    hits: list[float] = field(default_factory=lambda: [0.0] * len(MATCH_CLASSES))
    trials: list[float] = field(default_factory=lambda: [0.0] * len(MATCH_CLASSES))
    tokens: tuple[int, ...] = ()
    """The latest proposals, whether they ran or not; none after they were observed."""
    match_class: int = 0

    def propose(self, ids: list[int], count: int) -> None:
        """Set ``tokens`` to at most ``count`` likely continuations of ``ids``."""
        self.index.extend(ids)
        place, length = self.index.match(ids)
        self.tokens = continuation(ids, place, count) if length else ()
        self.match_class = next(index for index, (shortest, _) in enumerate(MATCH_CLASSES) if length >= shortest)

    @property
    def rate(self) -> float:
        """Estimated probability that the next of ``tokens`` is accepted if those before it are."""
        hits, trials = self.hits[self.match_class], self.trials[self.match_class]
        return (hits + ASSUMED_TRIALS * MATCH_CLASSES[self.match_class][1]) / (trials + ASSUMED_TRIALS)

    def observe(self, tokens: Sequence[int]) -> None:
        """Compare ``tokens``, the true continuation, with the proposals, up to the first difference."""
        kind = self.match_class
        for token_id, proposed in zip(tokens, self.tokens, strict=False):
            self.hits[kind] = DECAY * self.hits[kind] + (token_id == proposed)
            self.trials[kind] = DECAY * self.trials[kind] + 1
            if token_id != proposed:
                break
        self.tokens = ()
