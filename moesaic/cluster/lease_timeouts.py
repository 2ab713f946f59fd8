"""Since when each lease has not been renewed, by this process's own clock.

Who was not looking himself blames nobody: after a time in which the store could not be asked, or this process stood
still, every lease has its whole time again. Knows beats. Does not know what becomes of a lease that is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moesaic.cluster.jobs import LeaseStatus, LeaseToken


class LeaseTimeouts:
    """Watches beats."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """A lease whose beat stands still for longer than ``seconds`` is silent."""
        self._seconds, self._clock = seconds, clock
        self._since: dict[LeaseToken, tuple[int, float]] = {}  # of each lease its beat, and since when it has that
        self._looked = clock()

    def of(self, active_leases: Sequence[LeaseStatus]) -> list[LeaseStatus]:
        """Take in all beats as they are now; return those that are silent."""
        now = self._clock()
        if now - self._looked > self._seconds:
            self.forgive()
        self._looked = now
        self._since = {status.lease_token: self._known(status, now) for status in active_leases}
        return [status for status in active_leases if now - self._since[status.lease_token][1] > self._seconds]

    def _known(self, status: LeaseStatus, now: float) -> tuple[int, float]:
        known = self._since.get(status.lease_token)
        return known if known and known[0] == status.heartbeat else (status.heartbeat, now)

    def forgive(self) -> None:
        """Nobody could be heard: begin anew."""
        self._since = {}
