"""What of running answers is on disk: events are gathered, and written together.

Knows jobs as they are followed, and when they are due. Does not know workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from moesaic.cluster import wire
from moesaic.cluster.active_jobs import ActiveJob
from moesaic.cluster.jobs import LeaseToken, LogRecord, Store

FLUSH_SECONDS = 1.0
"""How long events may be known without being on disk; ..."""
FLUSH_EVENTS = 256
"""... and how many."""
SHARED_FLUSH_SECONDS = 0.05
"""The same of a job whose client may be at another gateway."""


class LogFlusher:
    """Writes events to the store."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self.pace = SHARED_FLUSH_SECONDS if store.shared else FLUSH_SECONDS / 4
        """Seconds between two looks at what is due."""

    def due(self, lives: Iterable[ActiveJob]) -> list[ActiveJob]:
        """Return those of which something has not been on disk for too long."""
        now = self._clock()
        return [live for live in lives if live.worker and not live.ended and self._is_due(live, now)]

    def _is_due(self, live: ActiveJob, now: float) -> bool:
        unsaved = len(live.events) - live.kept
        patience = SHARED_FLUSH_SECONDS if self._store.shared and not live.readers else FLUSH_SECONDS
        return unsaved >= FLUSH_EVENTS or (unsaved > 0 and now - live.saved_at >= patience)

    async def save(self, lives: Sequence[ActiveJob]) -> list[ActiveJob]:
        """Write what is not on disk; return those jobs whose leases do not hold any more: nothing of them is written.

        Raises:
            Unavailable: nothing was written, as far as is known.
        """
        async with contextlib.AsyncExitStack() as locks:
            for live in sorted(set(lives), key=lambda each: each.id):
                await locks.enter_async_context(live.writing)
            unsaved = {
                LeaseToken(live.id, live.fence): live
                for live in lives
                if len(live.events) > live.kept and live.worker and not live.ended
            }
            if not unsaved:
                return []
            found = await self._store.append({lease_token: _unsaved(live) for lease_token, live in unsaved.items()})
            lost = []
            for lease_token, live in unsaved.items():
                live.saved_at = self._clock()
                end = found.get(lease_token.id)
                if live.fence != lease_token.fence:  # leased anew meanwhile, and known as far as that lease is
                    continue
                if end is None:
                    lost.append(live)
                else:
                    live.kept = end
            return lost


def _unsaved(live: ActiveJob) -> LogRecord:
    fresh = live.events[live.kept :]
    return LogRecord(live.kept, len(fresh), wire.pack_events(fresh))


def catch_up(live: ActiveJob, records: Sequence[LogRecord]) -> None:
    """Take in a job's log as it is on disk."""
    for record in records:
        live.agree(record.start, wire.unpack_events(record.blob))
        live.kept = max(live.kept, record.start + record.count)
