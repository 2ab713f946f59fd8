"""Whether the server can answer requests now. An engine must make progress; that its process exists is not enough."""

from __future__ import annotations

import time
from collections.abc import Callable

from moesaic.backend import Backend


class Readiness:
    """Tells whether the server is ready, from the time at which each engine last made a step.

    The engines are checked only when ``why_not`` is called.
    """

    def __init__(self, backend: Backend, stall_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Watch the engines of a backend.

        An engine that has work but makes no step for ``stall_seconds`` is stalled. ``clock`` returns the time in
        seconds.
        """
        self._backend, self._stall_seconds, self._clock = backend, stall_seconds, clock
        self._progress: dict[str, tuple[int, float]] = {}  # model -> its step count, and when that was reached

    def why_not(self) -> str | None:
        """Return why the server is not ready, such as ``stalled: MODEL``; None: it is ready."""
        now, reasons = self._clock(), []
        for name, stats in self._backend.stats().items():
            steps, since = self._progress.get(name, (-1, now))
            if stats.steps != steps or not stats.running + stats.waiting:
                self._progress[name] = stats.steps, now
            elif now - since >= self._stall_seconds:
                reasons.append(f"stalled: {name}")
            if not stats.alive:
                reasons.append(f"dead: {name}")
        states = [model.state for model in self._backend.models()]
        if states and all(state == "failed" for state in states):  # requests wait for a model that is being loaded
            reasons.append("failed")
        return "; ".join(reasons) or None
