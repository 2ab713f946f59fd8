"""Since when each lease has not been renewed, by this process's own clock.

Who was not looking himself blames nobody: after a time in which the store could not be asked, or this process stood
still, every lease has its whole time again. Knows beats. Does not know what becomes of a lease that is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moesaic.cluster.jobs import Beat, Hold


class Silence:
    """Watches beats."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """A lease whose beat stands still for longer than ``seconds`` is silent."""
        self._seconds, self._clock = seconds, clock
        self._since: dict[Hold, tuple[int, float]] = {}  # of each lease its beat, and since when it has that
        self._looked = clock()

    def of(self, beats: Sequence[Beat]) -> list[Beat]:
        """Take in all beats as they are now; return those that are silent."""
        now = self._clock()
        if now - self._looked > self._seconds:
            self.forgive()
        self._looked = now
        self._since = {beat.hold: self._known(beat, now) for beat in beats}
        return [beat for beat in beats if now - self._since[beat.hold][1] > self._seconds]

    def _known(self, beat: Beat, now: float) -> tuple[int, float]:
        known = self._since.get(beat.hold)
        return known if known and known[0] == beat.beat else (beat.beat, now)

    def forgive(self) -> None:
        """Nobody could be heard: begin anew."""
        self._since = {}
