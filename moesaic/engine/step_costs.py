"""The measured times of decoding steps by their number of tokens. This module has no clock: times are passed in."""

from __future__ import annotations

from dataclasses import dataclass

REMEMBERED_STEPS = 512
"""Steps after which a measured cost is forgotten: costs change with the length of the sequences."""
TOKEN_COST = 0.1
"""Assumed cost of a further token in steps that are larger than all measured ones, as a fraction of a step."""


@dataclass(slots=True)
class _Cost:
    seconds: float
    step: int  # when it was measured last
    count: int = 1


class StepCosts:
    """The time of a decoding step as a function of its number of tokens, measured while the engine runs."""

    def __init__(self) -> None:
        self._costs: dict[int, _Cost] = {}
        self._steps = 0

    def record(self, tokens: int, seconds: float) -> None:
        """Add the measured time of a decoding step of ``tokens`` tokens."""
        self._steps += 1
        key, cost = _rounded(tokens), self._known(tokens)
        if cost is None:
            self._costs[key] = _Cost(seconds, self._steps)
            return
        cost.count += 1
        cost.step = self._steps
        # Other processes and page faults only add to a time, so an estimate falls faster than it rises.
        if seconds < cost.seconds:
            cost.seconds = seconds if cost.count <= 3 else (cost.seconds + seconds) / 2
        elif cost.count > 3:
            cost.seconds += min(seconds - cost.seconds, cost.seconds) / 16

    def measured(self, tokens: int) -> float | None:
        """Return the time of a step of ``tokens`` tokens in seconds, or None if it was not measured lately."""
        cost = self._known(tokens)
        return None if cost is None else cost.seconds

    def estimate(self, tokens: int, base: int) -> float:
        """Return the estimated time of a step of ``tokens`` tokens in seconds, from the measured sizes around it.

        ``base`` is less than ``tokens``, and was measured. Any other size counts once it was measured twice, so that a
        single outlier does not keep it from being tried again.
        """
        points = {base: self._costs[_rounded(base)].seconds}
        points |= {key: cost.seconds for key, cost in self._costs.items() if key > base and self._certain(key)}
        if (exact := points.get(_rounded(tokens))) is not None:
            return exact
        below = max(key for key in points if key < tokens)
        above = min((key for key in points if key > tokens), default=None)
        if above is None:
            return points[below] + TOKEN_COST * points[base] * (tokens - below) / base
        return points[below] + (points[above] - points[below]) * (tokens - below) / (above - below)

    def _certain(self, key: int) -> bool:
        cost = self._known(key)
        return cost is not None and cost.count > 1

    def _known(self, tokens: int) -> _Cost | None:
        cost = self._costs.get(_rounded(tokens))
        return None if cost is None or self._steps - cost.step > REMEMBERED_STEPS else cost


def _rounded(tokens: int) -> int:
    """Return ``tokens`` rounded down to four significant bits, so that sizes of about equal cost share one entry."""
    shift = max(0, tokens.bit_length() - 4)
    return tokens >> shift << shift
