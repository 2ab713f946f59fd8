"""The jobs that a gateway follows: clients subscribe to them, and the store is their source of truth.

This module does not depend on HTTP. It does not decide which worker runs a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import msgspec

from moesaic.cluster import wire
from moesaic.cluster.active_job import ActiveJob, Subscription
from moesaic.cluster.jobs import JobSnapshot, JobState, Store
from moesaic.cluster.log_flusher import LogFlusher, catch_up
from moesaic.cluster.tasks import BackgroundTasks, shielded
from moesaic.cluster.workers import WorkerRegistry
from moesaic.errors import Cancelled, NotFound, PoisonedJob, Unavailable

POLL_SECONDS = 2.0
"""A job that this gateway follows, but none of its workers runs, is read from the store again after this time."""
RECONNECT_SECONDS = 60.0
"""A job whose client has disconnected, but can come back for the answer, is cancelled after this time."""


class ActiveJobs:
    """The jobs that a gateway follows: their events are in memory, for subscribers and workers of this gateway."""

    def __init__(
        self, store: Store, workers: WorkerRegistry, tasks: BackgroundTasks, clock: Callable[[], float]
    ) -> None:
        self.tasks = tasks
        self.jobs: dict[str, ActiveJob] = {}
        self._store, self._workers, self._clock = store, workers, clock
        self._flusher = LogFlusher(store, clock)
        self.flush_interval = self._flusher.interval
        """Seconds between two calls of ``flush_due``."""
        self._changed: set[str] = set()
        self._has_changed = asyncio.Event()

    def get(self, job_id: str) -> ActiveJob | None:
        """Return a job that this gateway follows; None if it does not follow the job."""
        return self.jobs.get(job_id)

    def add(self, job_id: str, model: str, tenant: str) -> ActiveJob:
        """Start to follow a job that a client is submitting; return it."""
        job = ActiveJob(job_id, model, tenant, unread_since=self._clock(), submitted_at=time.time())
        self.jobs[job_id] = job
        return job

    def adopt(self, job_id: str, model: str, tenant: str) -> ActiveJob:
        """Follow a job from the store, and return it. It is not cancelled for having no subscribers."""
        return self.jobs.setdefault(job_id, ActiveJob(job_id, model, tenant, unread_since=float("inf")))

    def remove(self, job_id: str) -> None:
        """Stop following a job, if it is followed."""
        self.jobs.pop(job_id, None)

    async def find(self, job_id: str, tenant: str) -> ActiveJob:
        """Return a job of this tenant. If it is not followed yet, read it from the store and follow it.

        Raises:
            NotFound: there is no such job, or it belongs to another tenant.
        """
        job = self.jobs.get(job_id)
        if job is None:
            snapshot = await self._store.snapshot(job_id)
            if snapshot is None or snapshot.job.tenant != tenant:
                raise NotFound(f"there is no job {job_id!r:.60}")
            job = self.adopt(job_id, snapshot.job.model, snapshot.job.tenant)
            job.resumable = True
            await self.refresh(job)
        if job.tenant != tenant:
            raise NotFound(f"there is no job {job_id!r:.60}")
        return job

    def follow(self, job: ActiveJob, *, replayed: bool = False, cancel: bool = True) -> Subscription:
        """Subscribe to a job; return the stream of its events.

        Args:
            job: the job to read.
            replayed: whether the job existed before this request.
            cancel: whether the job is cancelled when its last subscriber cancels and the client cannot come back.
        """
        return Subscription(job, (lambda: self._on_unsubscribed(job)) if cancel else _ignore, replayed=replayed)

    def _on_unsubscribed(self, job: ActiveJob) -> None:
        if not job.readers:
            job.unread_since = self._clock()
            if not job.resumable and not job.ended:
                self.tasks.start(self.cancel(job))

    @shielded
    async def cancel(self, job: ActiveJob) -> JobState:
        """Cancel a job unless it has ended; return its state afterwards."""
        state = await self._store.cancel(job.id)
        if state == "cancelled":
            self.cancel_at_worker(job)
            job.finish(error=Cancelled("the request was cancelled"))
        return state or "cancelled"

    def cancel_at_worker(self, job: ActiveJob) -> None:
        """Tell the worker that runs the job to stop it, if that worker is connected to this gateway."""
        worker, job.worker = job.worker, ""
        self._workers.cancel(worker, job.id)

    # Reading the store

    def mark_changed(self, job_ids: Sequence[str]) -> None:
        """Schedule a read from the store of those of the jobs that are followed."""
        self._changed |= self.jobs.keys() & set(job_ids)
        self._has_changed.set()

    def on_store_changed(self, job_ids: Sequence[str]) -> None:
        """Handle a notification of the store about changed jobs; see ``Store.listen``."""
        for job_id in job_ids:
            if not job_id:
                self._workers.wake()
            elif (job := self.jobs.get(job_id)) and not job.ended and (self._store.shared or not job.worker):
                self.mark_changed([job_id])

    async def refresh_changed(self) -> None:
        """Wait until ``mark_changed`` marks jobs, and read these from the store."""
        await self._has_changed.wait()
        self._has_changed.clear()
        while self._changed:
            job = self.jobs.get(self._changed.pop())
            if job is not None:
                with contextlib.suppress(Unavailable):
                    await self.refresh(job)

    async def refresh(self, job: ActiveJob) -> None:
        """Read a job's new events and its end from the store."""
        job.refreshed_at = self._clock()
        snapshot = await self._store.snapshot(job.id)
        if snapshot is None:
            job.finish(error=NotFound("the job store has dropped this job: send the request again"))
            return
        ended = snapshot.state not in ("queued", "leased")
        if snapshot.logged > job.persisted and (ended or not job.worker):
            catch_up(job, await self._store.log(job.id, job.persisted))
        if ended and not job.ended:
            job.truncate(snapshot.logged)
            self.cancel_at_worker(job)
            _finish_from_snapshot(job, snapshot)

    async def sweep(self) -> None:
        """Forget unneeded jobs, cancel abandoned ones, and poll those that other gateways may have changed."""
        now = self._clock()
        idle = [job for job in self.jobs.values() if not job.worker and now - job.refreshed_at > POLL_SECONDS]
        for job in idle:
            if job.ended:
                if not job.readers:
                    self.remove(job.id)
            elif not job.readers and job.unread_since + RECONNECT_SECONDS < now:
                if self._store.shared:  # the client may be reading at another gateway
                    self.remove(job.id)
                else:
                    self.tasks.start(self.cancel(job))
            elif job.readers and (self._store.shared or job.started_at):
                self.mark_changed([job.id])

    # Writing the store

    async def flush_due(self) -> None:
        """Write the events that are due to the store (see ``LogFlusher.due``)."""
        await self.flush(self._flusher.due(self.jobs.values()))

    async def flush(self, jobs: Sequence[ActiveJob]) -> None:
        """Write the new events of jobs to the store. Workers are told to stop jobs whose leases are not valid.

        Raises:
            Unavailable: the store did not confirm the write, which may be repeated.
        """
        for job in await self._flusher.flush(jobs):
            self.cancel_at_worker(job)

    async def close(self) -> None:
        """Write the new events of all jobs, if the store is reachable."""
        with contextlib.suppress(Unavailable):
            await self._flusher.flush(list(self.jobs.values()))


def _ignore() -> None:
    pass


def _finish_from_snapshot(job: ActiveJob, snapshot: JobSnapshot) -> None:
    if snapshot.state == "cancelled":
        job.finish(error=Cancelled("the request was cancelled"))
    elif snapshot.state == "dead":
        job.finish(error=PoisonedJob("every worker that ran this request died: it is not retried"))
    else:
        result = msgspec.json.decode(snapshot.result, type=wire.JobResult) if snapshot.result else wire.JobResult()
        job.finish(result.outcome, wire.to_error(result.error) if result.error else None)
