"""Timers that find expired leases, by the monotonic clock of this process.

If this process was paused, or the store was unreachable, all timers restart, so that no lease expires because of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moesaic.cluster.jobs import LeaseStatus, LeaseToken


class LeaseTimeouts:
    """Finds leases whose heartbeat counter has stopped."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """Create timers. A lease times out when its heartbeat counter has not changed for more than ``seconds``."""
        self._seconds, self._clock = seconds, clock
        self._since: dict[LeaseToken, tuple[int, float]] = {}  # heartbeat, and the time at which it was first seen
        self._checked_at = clock()

    def timed_out(self, statuses: Sequence[LeaseStatus]) -> list[LeaseStatus]:
        """Update the timers with ``statuses``, which are all active leases; return the leases that have timed out."""
        now = self._clock()
        if now - self._checked_at > self._seconds:
            self.restart()
        self._checked_at = now
        self._since = {status.lease_token: self._first_seen(status, now) for status in statuses}
        return [status for status in statuses if now - self._since[status.lease_token][1] > self._seconds]

    def _first_seen(self, status: LeaseStatus, now: float) -> tuple[int, float]:
        since = self._since.get(status.lease_token)
        return since if since and since[0] == status.heartbeat else (status.heartbeat, now)

    def restart(self) -> None:
        """Restart all timers."""
        self._since = {}
