"""Writes the events of running jobs to the store, many jobs in one transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from moesaic.cluster import wire
from moesaic.cluster.active_job import ActiveJob
from moesaic.cluster.jobs import LogRecord, Store

FLUSH_SECONDS = 1.0
"""An event is written to the store at most this number of seconds after it was received."""
FLUSH_EVENTS = 256
"""The events of a job are written at once when this number of them is not on disk."""
SHARED_FLUSH_SECONDS = 0.05
"""As FLUSH_SECONDS, for a job of a shared store whose client may be connected to another gateway."""


class LogFlusher:
    """Writes the events of running jobs to the store when they are due."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self.interval = SHARED_FLUSH_SECONDS if store.shared else FLUSH_SECONDS / 4
        """Seconds between two checks for due jobs."""

    def due(self, jobs: Iterable[ActiveJob]) -> list[ActiveJob]:
        """Return those of the jobs whose new events must be written now."""
        now = self._clock()
        return [job for job in jobs if job.worker and not job.ended and self._is_due(job, now)]

    def _is_due(self, job: ActiveJob, now: float) -> bool:
        unwritten = len(job.events) - job.persisted
        seconds = SHARED_FLUSH_SECONDS if self._store.shared and not job.readers else FLUSH_SECONDS
        return unwritten >= FLUSH_EVENTS or (unwritten > 0 and now - job.flushed_at >= seconds)

    async def flush(self, jobs: Sequence[ActiveJob]) -> list[ActiveJob]:
        """Write the jobs' events that are not on disk. Return jobs without a valid lease, which were not written.

        Raises:
            Unavailable: the store did not confirm the write, which may be repeated.
        """
        async with contextlib.AsyncExitStack() as locks:
            for job in sorted(set(jobs), key=lambda job: job.id):
                await locks.enter_async_context(job.write_lock)
            unwritten = {
                job.lease_token: job for job in jobs if len(job.events) > job.persisted and job.worker and not job.ended
            }
            if not unwritten:
                return []
            ends = await self._store.append({token: _unwritten(job) for token, job in unwritten.items()})
            invalid = []
            for token, job in unwritten.items():
                job.flushed_at = self._clock()
                end = ends.get(token.id)
                if job.fence != token.fence:  # it was leased again in the meantime, from what is on disk
                    continue
                if end is None:
                    invalid.append(job)
                else:
                    job.persisted = end
            return invalid


def _unwritten(job: ActiveJob) -> LogRecord:
    events = job.events[job.persisted :]
    return LogRecord(job.persisted, len(events), wire.pack_events(events))


def catch_up(job: ActiveJob, records: Sequence[LogRecord]) -> None:
    """Add the events in ``records``, which were read from the job's log in the store, to a followed job."""
    for record in records:
        job.reconcile(record.start, wire.unpack_events(record.blob))
        job.persisted = max(job.persisted, record.start + record.count)
