"""Whether the engines get on: health is progress, not the existence of a process."""

from __future__ import annotations

import time
from collections.abc import Callable

from moesaic.backend import Backend


class Readiness:
    """Remembers when each engine last made a step. Looks when it is asked."""

    def __init__(self, backend: Backend, stall: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend, self._stall, self._clock = backend, stall, clock
        self._seen: dict[str, tuple[int, float]] = {}

    def why_not(self) -> str | None:
        """Return why the server is not ready; None: it is."""
        now, reasons = self._clock(), []
        for name, load in self._backend.stats().items():
            steps, since = self._seen.get(name, (-1, now))
            if load.steps != steps or not load.running + load.waiting:
                self._seen[name] = load.steps, now
            elif now - since >= self._stall:
                reasons.append(f"stalled: {name}")
            if not load.alive:
                reasons.append(f"dead: {name}")
        states = [card.state for card in self._backend.models()]
        if states and all(state in ("loading", "failed") for state in states):
            reasons.append(states[0])
        return "; ".join(reasons) or None
