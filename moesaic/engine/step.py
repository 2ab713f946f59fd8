"""A step, which is one forward pass of the model: what it runs, the rows that it samples, and its outcome.

This module does not import torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

from moesaic.engine.request import Request, Sequence, Token
from moesaic.errors import MoesaicError


@dataclass(frozen=True, slots=True)
class Run:
    """The tokens of one sequence that a step computes: [cached : cached + count]; those before are in the cache.

    The last of them are ``proposals``, which are guesses for the tokens after those of the sequence.
    """

    sequence: Sequence
    count: int
    proposals: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the run includes the newest token of the sequence, so that the next token is sampled."""
        return self.count - len(self.proposals) == self.sequence.pending


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of the model: a run of tokens for each sequence in it."""

    runs: tuple[Run, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each run among the tokens of the step; then the number of tokens."""
        return (0, *itertools.accumulate(run.count for run in self.runs))

    @property
    def tokens(self) -> int:
        """Number of tokens that the step computes."""
        return self.starts[-1]

    @property
    def decodes(self) -> bool:
        """Whether each run computes the newest token of a started answer, and proposals, but no prompt."""
        return all(run.sequence.pending == 1 and run.sequence.generated for run in self.runs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model and the sampler computed in a step."""

    tokens: Mapping[Sequence, Listing[Token]]
    """New tokens of each sequence, in the order of the answer: one, and one more for each accepted proposal. A run with
    proposals that has none must run again without them."""
    scores: Mapping[Sequence, Listing[Token]] = field(default_factory=dict)
    """For each sequence that requests log-probabilities of its prompt: prompt tokens cached + 1 .. cached + count, with
    these; without those before ``Sequence.first_scored``."""
    failed: frozenset[Sequence] = frozenset()
    """Sequences for which the model computed NaN or infinity."""
    refused: Mapping[Sequence, MoesaicError] = field(default_factory=dict)
    """Sequences whose grammar allows no next token, and the error of each."""


@dataclass(slots=True, eq=False)
class Ahead:
    """A sequence as it will be if its next tokens are ``proposed``. The sampler reads it like a ``Sequence``."""

    sequence: Sequence
    proposed: tuple[int, ...]

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def index(self) -> int:
        return self.sequence.index

    @property
    def seed(self) -> int:
        return self.sequence.seed

    @property
    def constraint(self) -> None:
        """No token is proposed for a sequence with a grammar."""

    @property
    def prompt(self) -> int:
        return self.sequence.prompt

    @property
    def ids(self) -> list[int]:
        return [*self.sequence.ids, *self.proposed]

    @property
    def generated(self) -> int:
        return self.sequence.generated + len(self.proposed)


Row = Sequence | Ahead
"""A state for which a step samples the next token: the state now, or after proposed tokens."""
