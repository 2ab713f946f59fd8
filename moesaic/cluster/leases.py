"""Leases: which worker runs which job, what workers report, and when a lease expires.

A worker long-polls for jobs. Its leases expire when they are not renewed, when its connection closes and it does not
come back, when its engine stalls, or when it registers again without them. This module does not depend on HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec

from moesaic.backend import Event, ModelStats
from moesaic.cluster import wire
from moesaic.cluster.active_job import ActiveJob
from moesaic.cluster.active_jobs import ActiveJobs
from moesaic.cluster.jobs import Lease, LeaseStatus, LeaseToken, LogRecord, RenewState, Store
from moesaic.cluster.lease_timeouts import LeaseTimeouts
from moesaic.cluster.log_flusher import catch_up
from moesaic.cluster.protocols import LEASE_SECONDS, STALL_SECONDS, Assignment, LogPosition, WorkerInfo
from moesaic.cluster.tasks import BackgroundTasks, shielded
from moesaic.cluster.workers import WorkerRegistry, WorkerSession, is_same_instance
from moesaic.errors import Conflict, MoesaicError, Unavailable

log = logging.getLogger("moesaic.cluster")

RECONNECT_FRACTION = 0.2
"""A worker whose connection closed is lost if it has not come back within this fraction of a lease's duration."""
SILENT_LEASES = 2.0
"""A worker that has sent nothing for this number of lease durations is unregistered, even if it is connected."""
INVALID = ("fenced", "cancelled")

WaitObserver = Callable[[str, float], None]
"""Function called with a job's model and the seconds from its submission to its first lease."""


class LeaseManager:
    """Leases jobs to workers, and handles their reports. Implements ``protocols.WorkerService``."""

    def __init__(
        self,
        workers: WorkerRegistry,
        store: Store,
        jobs: ActiveJobs,
        tasks: BackgroundTasks,
        *,
        lease_seconds: float = LEASE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tasks = tasks
        self.lease_seconds = lease_seconds
        self.suspect_models: set[str] = set()
        """Models whose queues have suspects: jobs that crashed with a worker."""
        self.fenced = 0
        """Number of results and event batches refused because their lease was not valid, since the start."""
        self.expired = 0
        """Number of leases that expired, since the start."""
        self.dead = 0
        """Number of jobs that became dead letters, since the start."""
        self.mean_job_seconds = 1.0
        """Running mean of the seconds from a job's lease to its end."""
        self._workers, self._store, self._jobs, self._clock = workers, store, jobs, clock
        self._stall_seconds = stall_seconds
        self._timeouts = LeaseTimeouts(lease_seconds, clock)
        self._wait_observers: list[WaitObserver] = []

    def add_wait_observer(self, observer: WaitObserver) -> None:
        """Call ``observer`` whenever a job that was submitted to this gateway is leased for the first time."""
        self._wait_observers.append(observer)

    # Registration

    @shielded
    async def register(self, info: WorkerInfo, leases: Sequence[LeaseToken] = ()) -> Mapping[str, LogPosition | None]:
        session, previous = self._workers.register(info)
        held = {lease_token.id for lease_token in leases}
        missing = [status for status in await self._leases_of(info.name) if status.lease_token.id not in held]
        if previous is not None and is_same_instance(previous, session):  # the worker never received these
            await self._requeue([status.lease_token for status in missing])
        else:
            await self.expire(missing)
        log.info("worker registered", extra={"worker": info.name, "models": session.models, "leases": len(held)})
        adopted = {token.id: await self._adopt(session, token) for token in leases}
        if not session.stalled:  # it is alive, so these jobs did not crash it when their leases expired
            await self._store.forgive_crash([token for token in leases if adopted[token.id] is None])
        return {job_id: None if job is None else job.log_position for job_id, job in adopted.items()}

    @shielded
    async def unregister(self, worker: str) -> None:
        self._workers.unregister(worker)
        await self.expire(await self._leases_of(worker))

    @shielded
    async def ban(self, worker: str) -> None:
        """Unregister a worker and refuse its next registrations. Its jobs are queued again without counting a crash.

        Raises:
            NotFound: there is no such worker.
        """
        self._workers.ban(worker)
        session = self._workers.sessions.get(worker)
        if session is not None:
            await self._release(session, session.lease_tokens)
        self._workers.unregister(worker)
        await self.expire(await self._leases_of(worker))

    async def _leases_of(self, worker: str) -> list[LeaseStatus]:
        return [status for status in await self._store.active_leases() if status.worker == worker]

    def on_disconnect(self, worker: str) -> None:
        """Handle the closed connection of a worker: unless the worker comes back soon, its leases expire."""
        session = self._workers.sessions.get(worker)
        if session is not None:
            self.tasks.start(self._expire_unless_seen(session, session.last_seen))

    async def _expire_unless_seen(self, session: WorkerSession, last_seen: float) -> None:
        await self._jobs.flush([job for job_id in session.leases if (job := self._jobs.get(job_id))])
        before = await self._leases_of(session.name)
        await asyncio.sleep(self.lease_seconds * RECONNECT_FRACTION)
        if self._workers.sessions.get(session.name) is session and session.last_seen == last_seen:
            self._workers.unregister(session.name)
            now = set(await self._leases_of(session.name))  # a higher heartbeat: it is connected to another gateway
            await self.expire([status for status in before if status in now])

    # Leasing

    async def lease(self, worker: str, free_slots: int, wait_seconds: float) -> Assignment:
        session = self._workers.session(worker)
        deadline = self._clock() + wait_seconds
        while self._workers.sessions.get(worker) is session:
            session.wake.clear()
            leases = await self._lease(session, min(free_slots, session.free_slots))
            assignment = Assignment(tuple(leases), session.take_cancelled(), session.take_queries())
            if assignment != Assignment() or self._clock() >= deadline:
                return assignment
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline - self._clock()):
                    await session.wake.wait()
        return Assignment()

    async def _lease(self, session: WorkerSession, limit: int) -> list[Lease]:
        if limit < 1 or session.stalled or session.leaving or session.drained:
            return []
        if session.quarantined and session.leases:
            return []
        session.quarantined = self._takes_suspects(session)
        if session.quarantined and session.leases:  # it finishes its other jobs first
            return []
        leases = await self._lease_from_store(session, limit)
        if session.quarantined and not leases:
            self.suspect_models -= set(session.models)
            session.quarantined = False
            leases = await self._lease_from_store(session, limit)
        return [self._start(session, lease) for lease in leases]

    async def _lease_from_store(self, session: WorkerSession, limit: int) -> list[Lease]:
        leasing = asyncio.ensure_future(
            self._store.lease(session.name, session.models, limit, suspects=session.quarantined)
        )
        try:
            return await asyncio.shield(leasing)
        except asyncio.CancelledError:  # the worker has disconnected and does not receive the leases
            self.tasks.start(self._give_back(leasing))
            raise

    async def _give_back(self, leasing: asyncio.Future[list[Lease]]) -> None:
        await self._store.release([lease.token for lease in await leasing])

    def _takes_suspects(self, session: WorkerSession) -> bool:
        """Return whether a worker must take suspects (jobs that crashed with a worker). At most half of them do."""
        if not self.suspect_models & set(session.models):
            return False
        sessions = self._workers.sessions.values()
        quarantined = sum(other.quarantined for other in sessions if other is not session)
        return quarantined < (len(sessions) + 1) // 2

    def _start(self, session: WorkerSession, lease: Lease) -> Lease:
        """Record a new lease of a worker; return it with all events that subscribers have read as its log."""
        job = self._jobs.adopt(lease.job.id, lease.job.model, lease.job.tenant)
        catch_up(job, lease.log)
        first = job.submitted_at > 0 and not job.started_at
        job.fence, job.worker = lease.fence, session.name
        job.started_at, job.leased_at = time.time(), self._clock()
        session.leases[job.id] = lease.fence
        if first:
            for observer in self._wait_observers:
                observer(job.model, max(0.0, job.started_at - job.submitted_at))
        # Subscribers may have seen more than was on disk, if the last worker was lost a moment ago.
        return replace(lease, log=(LogRecord(0, len(job.events), wire.pack_events(job.events)),))

    # Reports of workers

    @shielded
    async def renew(
        self, worker: str, leases: Sequence[LeaseToken], stats: Mapping[str, ModelStats]
    ) -> Mapping[str, RenewState]:
        session = self._workers.session(worker)
        session.update_stats(stats, bool(leases), self._clock())
        if self._clock() - session.last_step > self._stall_seconds and not session.stalled:
            log.error("worker engine stalled", extra={"worker": worker, "jobs": len(leases)})
            session.stalled = True
            await self.expire(await self._leases_of(worker))
        try:
            renewed = await self._store.renew([token for token in leases if await self._is_of(worker, token)])
        except Unavailable:
            self._timeouts.restart()
            raise
        states: dict[str, RenewState] = {token.id: renewed.get(token.id, "fenced") for token in leases}
        for lease_token in leases:
            if states[lease_token.id] in INVALID:
                self._remove_lease(session, lease_token)
                self._jobs.mark_changed([lease_token.id])
        return states

    async def _is_of(self, worker: str, lease_token: LeaseToken) -> bool:
        """Return whether the job's newest lease has this token and belongs, or belonged, to this worker."""
        if self._is_local(worker, lease_token):
            return True
        snapshot = await self._store.snapshot(lease_token.id)
        return snapshot is not None and snapshot.held_by(worker, lease_token)

    def _is_local(self, worker: str, lease_token: LeaseToken) -> bool:
        """Return whether the worker runs the job under this lease, as far as this gateway knows."""
        job = self._jobs.get(lease_token.id)
        return job is not None and (job.worker, job.fence) == (worker, lease_token.fence)

    async def append_events(
        self, worker: str, batches: Mapping[LeaseToken, tuple[int, Sequence[Event]]]
    ) -> Mapping[str, LogPosition | None]:
        session = self._workers.session(worker)
        positions: dict[str, LogPosition | None] = {}
        for lease_token, (start, events) in batches.items():
            job = await self._adopt(session, lease_token)
            if job is None:
                self.fenced += 1
                self._remove_lease(session, lease_token)
            elif start <= len(job.events):
                job.extend(start, events)
            positions[lease_token.id] = None if job is None else job.log_position
        return positions

    async def _adopt(self, session: WorkerSession, lease_token: LeaseToken) -> ActiveJob | None:
        """Return the job of a worker's lease, which another gateway may have given; None if the lease is not valid."""
        job = self._jobs.get(lease_token.id)
        if job is None or not self._is_local(session.name, lease_token):
            job = await self._load(session.name, lease_token)
        if job is None or job.ended:
            return None
        session.leases[lease_token.id] = lease_token.fence
        return job

    async def _load(self, worker: str, lease_token: LeaseToken) -> ActiveJob | None:
        """Read the job of a worker's lease from the store and return it; None if the lease is not valid."""
        if not await self._is_of(worker, lease_token):
            return None
        if (await self._store.renew([lease_token]))[lease_token.id] != "ok":
            return None
        snapshot, records = await self._store.snapshot(lease_token.id), await self._store.log(lease_token.id)
        if snapshot is None or snapshot.fence != lease_token.fence:
            return None
        job = self._jobs.adopt(lease_token.id, snapshot.job.model, snapshot.job.tenant)
        catch_up(job, records)
        job.fence, job.worker = lease_token.fence, worker
        return job

    @shielded
    async def finish(
        self,
        worker: str,
        lease_token: LeaseToken,
        start: int,
        events: Sequence[Event],
        outcome: Any = None,
        error: MoesaicError | None = None,
    ) -> bool:
        session = self._workers.session(worker)
        job = await self._adopt(session, lease_token)
        accepted = await self._finish(job, lease_token, start, events, outcome, error) if job else None
        if accepted is None:  # it is too late, or a repetition because the response was lost
            snapshot = await self._store.snapshot(lease_token.id)
            accepted = bool(snapshot and snapshot.held_by(worker, lease_token) and snapshot.state in ("done", "failed"))
        self.fenced += not accepted
        self._remove_lease(session, lease_token)
        return accepted

    async def _finish(
        self,
        job: ActiveJob,
        lease_token: LeaseToken,
        start: int,
        events: Sequence[Event],
        outcome: Any,
        error: MoesaicError | None,
    ) -> bool | None:
        """End a job; return whether the store accepted it, or None if the job has ended before or was leased again."""
        state: Literal["done", "failed"] = "failed" if error else "done"
        result = msgspec.json.encode(wire.JobResult(outcome, wire.error_info(error) if error else None))
        async with job.write_lock:
            if job.ended or job.fence != lease_token.fence:
                return None
            if start > len(job.events):
                raise Conflict(
                    f"only the first {len(job.events)} events of this job have arrived: send the others first"
                )
            complete = [*job.events, *events[len(job.events) - start :]]
            count = len(complete) - job.persisted
            last = LogRecord(job.persisted, count, wire.pack_events(complete[job.persisted :]))
            try:
                accepted = await self._store.finish(lease_token, state, result, last if last.count else None)
            except ValueError:  # the log on disk is longer than known here: the response to a write was lost
                catch_up(job, await self._store.log(lease_token.id))
                raise Unavailable("the log of this job has grown: send the request again") from None
        if accepted and job.fence == lease_token.fence:
            if job.leased_at:
                self.mean_job_seconds += 0.05 * (self._clock() - job.leased_at - self.mean_job_seconds)
            job.extend(0, complete)
            job.persisted = len(complete)
            job.finish(outcome, error)
        return accepted

    async def answer_query(
        self, worker: str, query_id: str, outcome: Any = None, error: MoesaicError | None = None
    ) -> None:
        self._workers.session(worker).answer_query(query_id, outcome, error)

    # The end of leases

    @shielded
    async def release(self, worker: str, leases: Sequence[LeaseToken], *, leaving: bool = False) -> None:
        session = self._workers.session(worker)
        session.leaving = session.leaving or leaving
        await self._release(session, leases)
        if leaving:  # the others never reached the worker, whose last request for jobs was cut off
            await self._requeue([status.lease_token for status in await self._leases_of(worker)])

    async def _release(self, session: WorkerSession, leases: Sequence[LeaseToken]) -> None:
        own = [lease_token for lease_token in leases if await self._is_of(session.name, lease_token)]
        await self._requeue(own)
        for lease_token in own:
            self._remove_lease(session, lease_token)

    async def _requeue(self, leases: Sequence[LeaseToken]) -> None:
        """Queue the jobs of these leases again without counting a crash."""
        local = [job for token in leases if (job := self._jobs.get(token.id)) and job.fence == token.fence]
        await self._jobs.flush(local)
        await self._store.release(leases)
        for lease_token in leases:
            job = self._jobs.get(lease_token.id)
            if job is not None and job.fence == lease_token.fence:
                job.worker = ""
        self._workers.wake()

    def _remove_lease(self, session: WorkerSession, lease_token: LeaseToken) -> None:
        """Record in memory that a worker no longer has a lease."""
        job = self._jobs.get(lease_token.id)
        if job is not None and self._is_local(session.name, lease_token):
            job.worker = ""
        session.remove_lease(lease_token)

    async def expire_silent(self) -> None:
        """Expire the leases that have timed out, and unregister workers that have sent nothing for too long."""
        timed_out = self._timeouts.timed_out(await self._store.active_leases())
        for worker in {status.worker for status in timed_out}:
            session = self._workers.sessions.get(worker)
            statuses = [status for status in timed_out if status.worker == worker]
            if session is not None:  # leases that the worker never received, because the store's response was lost
                unknown = {status.lease_token for status in statuses if status.lease_token.id not in session.leases}
                await self._requeue(list(unknown))
                statuses = [status for status in statuses if status.lease_token not in unknown]
            await self.expire(statuses)
        deadline = self._clock() - SILENT_LEASES * self.lease_seconds
        for session in list(self._workers.sessions.values()):
            if session.last_seen < deadline:
                self._workers.unregister(session.name)

    async def expire(self, statuses: Sequence[LeaseStatus]) -> None:
        """Expire leases that one worker lost at the same time. Their jobs become suspects, or dead letters."""
        if not statuses:
            return
        tokens = {status.lease_token for status in statuses}
        local = [job for token in tokens if (job := self._jobs.get(token.id)) and job.worker]
        if any(len(job.events) > job.persisted for job in local):  # the next worker must continue what clients saw
            await self._jobs.flush(local)
            statuses = [status for status in await self._store.active_leases() if status.lease_token in tokens]
        dead = await self._store.expire(statuses)
        tokens -= {status.lease_token for status in await self._store.active_leases()}  # renewed at the last moment
        self.expired, self.dead = self.expired + len(tokens), self.dead + len(dead)
        workers = sorted({status.worker for status in statuses})
        log.warning("leases expired", extra={"workers": workers, "jobs": len(tokens), "dead": len(dead)})
        offered = {name for session in self._workers.sessions.values() for name in session.models}
        self.suspect_models |= {job.model for job in local} or offered
        for job in local:
            if job.lease_token in tokens:
                self._jobs.cancel_at_worker(job)
        self._jobs.mark_changed(dead)
        self._workers.wake()
