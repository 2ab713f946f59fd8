"""Speculative decoding: how many tokens to propose for each sequence, by their expected gain and measured cost.

A step that verifies k proposed tokens of a sequence computes k + 1 tokens, and yields 1 to k + 1 of them
(arXiv:2211.17192). The sampler draws each of them as without proposals, so answers do not change. A step with more
tokens takes longer: a little for dense models on a CPU, but much more for a mixture of experts, whose tokens choose
different experts. So proposals are made only where the tokens per second are expected to rise, as in Cascade
(arXiv:2506.20675).

``Speculation`` compares both sides. The gain follows from the acceptance rate of each sequence. It is observed in every
step, also where nothing is proposed. The cost is the measured time of earlier steps by their number of tokens. This
module has no clock and no tensors: the engine passes the times in.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Listing
from typing import Literal, Protocol, get_args

from moesaic.engine.drafter import Drafter
from moesaic.engine.request import Sequence
from moesaic.engine.step_costs import StepCosts

Kind = Literal["ngram", "off"]
"""How tokens are proposed: by the n-grams of the sequence, or not at all."""
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_PROPOSALS = 16
"""Maximum number of proposed tokens of a sequence in one step."""
THRESHOLDS = (0.85, 0.7, 0.55, 0.45, 0.35, 0.25, 0.15)
"""Probabilities of acceptance down to which tokens are proposed; the best of them is chosen in each step."""
MIN_UTILITY = 1.05
"""Expected speed with proposals, relative to that without, from which tokens are proposed."""
MIN_SHARE = 0.95
"""Smallest expected speed of any sequence of the step, relative to that without proposals."""


class Proposer(Protocol):
    """What the scheduler needs to propose tokens."""

    def propose(self, sequences: Listing[Sequence], budget: int) -> Mapping[Sequence, tuple[int, ...]]:
        """Return proposed next tokens for some of ``sequences``, each of which runs one token in the step.

        There are at most ``budget`` proposed tokens in all. The scheduler may use fewer of them.
        """

    def observe(self, sequence: Sequence, tokens: Listing[int]) -> None:
        """Learn that ``tokens`` follow the tokens for which ``propose`` was called."""


class Speculation:
    """Proposes tokens by n-grams. It is a ``Proposer``; ``costs`` has the measured times of steps."""

    def __init__(self) -> None:
        self.costs = StepCosts()

    def propose(self, sequences: Listing[Sequence], budget: int) -> Mapping[Sequence, tuple[int, ...]]:
        drafters = {sequence: drafter for sequence in sequences if (drafter := _drafter(sequence)).tokens}
        base = len(sequences)
        plain = self.costs.measured(base)
        if not drafters or plain is None:
            return {}
        best, best_utility = dict[Sequence, int](), MIN_UTILITY
        for threshold in THRESHOLDS:
            counts = {sequence: _length(drafter, threshold) for sequence, drafter in drafters.items()}
            if sum(counts.values()) > budget:
                break
            if (utility := self._utility(plain, base, drafters, counts)) > best_utility:
                best, best_utility = counts, utility
        return {sequence: drafters[sequence].tokens[:count] for sequence, count in best.items() if count}

    def _utility(
        self, plain: float, base: int, drafters: Mapping[Sequence, Drafter], counts: Mapping[Sequence, int]
    ) -> float:
        """Return the expected tokens per second with proposals, relative to those without.

        Return 0 if there are no proposals, or if they would slow one sequence down. A step without proposals has
        ``base`` tokens and takes ``plain`` seconds.
        """
        total = base + sum(counts.values())
        if total == base:
            return 0.0
        ratio = self.costs.estimate(total, base) / plain
        gains = [_expected(drafters[sequence].rate, count) for sequence, count in counts.items()]
        gains += [1.0] * (base - len(gains))
        return sum(gains) / base / ratio if min(gains) >= MIN_SHARE * ratio else 0.0

    def observe(self, sequence: Sequence, tokens: Listing[int]) -> None:
        if sequence.drafter is not None:
            sequence.drafter.observe(tokens)


def speculates(sequence: Sequence) -> bool:
    """Return whether tokens may be proposed for ``sequence``.

    They may not for an answer with a grammar: its constraint cannot step back from a token that is rejected.
    """
    return sequence.request.sampling.speculation and sequence.constraint is None


def _drafter(sequence: Sequence) -> Drafter:
    """Return the drafter of ``sequence`` with new proposals; it has none if tokens must not be proposed."""
    drafter = sequence.drafter = sequence.drafter or Drafter()
    # The step samples one token more than it accepts proposals.
    count = min(MAX_PROPOSALS, sequence.limit - len(sequence.ids) - 1)
    if speculates(sequence) and count > 0:
        drafter.propose(sequence.ids, count)
    return drafter


def _length(drafter: Drafter, threshold: float) -> int:
    """Return how many proposals are accepted with at least the probability ``threshold``, in a row from the first."""
    probability, rate = 1.0, drafter.rate
    for count in range(len(drafter.tokens)):
        probability *= rate
        if probability < threshold:
            return count
    return len(drafter.tokens)


def _expected(rate: float, count: int) -> float:
    """Return the expected number of tokens of a step with ``count`` proposals, each accepted with ``rate``."""
    return sum(rate**accepted for accepted in range(count + 1))
