"""Pool of the AIME API workers (workers for the AIME API server) that are connected to this gateway.

Such a worker sends nothing between two updates, and each update contains the whole text so far. The gateway therefore
renews the worker's leases until the endpoint's inactivity timeout, and appends only the new part of each text. If the
worker or the gateway dies, another worker continues the job after the text so far. This module does not depend on HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from moesaic.backend import Delta, Event, ModelStats, PromptDone
from moesaic.cluster import wire
from moesaic.cluster.aime.aime_worker import AimeJob, AimeWorker
from moesaic.cluster.aime.conversation import parameters_for
from moesaic.cluster.jobs import Lease, LeaseToken
from moesaic.cluster.protocols import RENEW_FRACTION, STALL_SECONDS, WorkerService
from moesaic.errors import InvalidRequest, MoesaicError, NotFound, TimedOut

T = TypeVar("T")

log = logging.getLogger("moesaic.cluster.aime")

MAX_ENDED_JOBS = 10_000
"""Maximum number of ended jobs whose ids are remembered, because their results can arrive again."""
REFUSAL_PAUSE_SECONDS = 1.0
"""Pause of a worker that has only refused jobs, so that a worker of another protocol can lease them."""


class AimeWorkerPool:
    """Registry of AIME API workers, with a background task that renews their leases. It belongs to one event loop."""

    def __init__(self, service: WorkerService, worker_count: Callable[[str], int], lease_seconds: float) -> None:
        """Create an empty pool.

        Args:
            service: the gateway's interface for workers, which leases jobs to them.
            worker_count: returns the number of all workers that offer a model, AIME API workers included.
            lease_seconds: a lease expires after this time without a renewal.
        """
        self._service, self._worker_count, self._clock = service, worker_count, time.monotonic
        self._renew_seconds = lease_seconds * RENEW_FRACTION
        self._workers: dict[str, AimeWorker] = {}
        self._jobs: dict[str, tuple[AimeWorker, AimeJob]] = {}
        # By job id: whether the worker must still be notified that the job was cancelled.
        self._ended: OrderedDict[str, bool] = OrderedDict()
        self._renewals: asyncio.Task[None] | None = None

    def find(self, name: str, job_type: str = "") -> list[AimeWorker]:
        """Return the connected workers of this name and job type; "" means any job type."""
        workers = self._workers.values()
        return [worker for worker in workers if worker.name == name and job_type in ("", worker.definition.job_type)]

    def worker_of(self, job_id: str) -> AimeWorker | None:
        """Return the worker that runs a job; None if no AIME API worker runs it."""
        entry = self._jobs.get(job_id)
        return entry[0] if entry else None

    async def register(self, worker: AimeWorker) -> AimeWorker:
        """Register a worker and return it. It replaces a worker of the same name, whose jobs are lost."""
        if old := self._workers.get(worker.full_name):
            self._forget(old)
        await self._service.register(worker.info())
        self._workers[worker.full_name] = worker
        if self._renewals is None or self._renewals.done():
            self._renewals = asyncio.create_task(self._renew_until_empty(), name="aime-renewals")
        return worker

    def _forget(self, worker: AimeWorker) -> None:
        for job in list(worker.jobs.values()):
            self._drop(worker, job)

    def _drop(self, worker: AimeWorker, job: AimeJob, *, cancelled: bool = False) -> None:
        worker.jobs.pop(job.id, None)
        self._jobs.pop(job.id, None)
        self._ended[job.id] = cancelled
        if len(self._ended) > MAX_ENDED_JOBS:
            self._ended.popitem(last=False)

    async def _registered(self, worker: AimeWorker, work: Callable[[], Awaitable[T]]) -> T:
        """Return ``await work()``. If the gateway does not know the worker, register it again and retry once."""
        try:
            return await work()
        except NotFound:
            self._drop_lost(worker, await self._service.register(worker.info(), worker.leases))
            return await work()

    def _drop_lost(self, worker: AimeWorker, held: Mapping[str, object]) -> None:
        for job in list(worker.jobs.values()):
            if held.get(job.lease_token.id) is None:
                self._cancel(worker, (job.lease_token.id,))

    # Leasing jobs

    async def lease(self, worker: AimeWorker, free: int, wait: float) -> list[AimeJob]:
        """Wait up to ``wait`` seconds for jobs; lease at most ``free`` of them to the worker and return these."""
        worker.last_seen, until = self._clock(), self._clock() + wait
        if free >= worker.slots:  # the worker reports no running jobs
            for job in worker.jobs.values():
                job.missing_since = job.missing_since or self._clock()
        if free > worker.slots:
            worker.slots = free
            self._drop_lost(worker, await self._service.register(worker.info(), worker.leases))
        worker.pending_requests += 1
        try:
            while True:
                jobs = await self._lease(worker, free, until - self._clock())
                if jobs or self._clock() >= until:
                    return jobs
        finally:
            worker.pending_requests -= 1
            worker.last_seen = self._clock()

    async def _lease(self, worker: AimeWorker, free: int, wait: float) -> list[AimeJob]:
        assignment = await self._registered(worker, lambda: self._service.lease(worker.full_name, free, max(0.0, wait)))
        self._cancel(worker, assignment.cancel)
        jobs, refused = [], False
        try:
            for lease in assignment.leases:
                try:
                    jobs.append(self._start_job(worker, lease))
                except InvalidRequest as error:
                    refused = True
                    await self._refuse(worker, lease, error)
            if refused and not jobs:
                await asyncio.sleep(REFUSAL_PAUSE_SECONDS)
        except asyncio.CancelledError:  # the worker has disconnected and never gets these jobs
            leases = [lease.token for lease in assignment.leases]
            for job in jobs:
                self._drop(worker, job)
            await asyncio.shield(self._service.release(worker.full_name, leases))
            raise
        return jobs

    def _start_job(self, worker: AimeWorker, lease: Lease) -> AimeJob:
        if lease.job.kind != "generate":
            raise InvalidRequest(f"this model is served by AIME API workers, which do not support {lease.job.kind}")
        request = wire.unpack_request(lease.job.body)
        events = [event for record in lease.log for event in wire.unpack_events(record.blob)]
        deltas = [event for event in events if isinstance(event, Delta)]
        text = "".join(delta.text for delta in deltas)
        tokens = sum(len(delta.tokens) for delta in deltas) or len(text) // 4
        definition = next((item for item in worker.definitions if item.offered == lease.job.model), worker.definition)
        data = parameters_for(request, definition, text, tokens)
        lease_token = lease.token
        prompt = next((event.prompt_tokens for event in events if isinstance(event, PromptDone)), 0)
        job = AimeJob(
            f"{lease_token.id}#{lease_token.fence}",
            lease_token,
            data,
            text,
            tokens,
            text,
            len(events),
            self._clock(),
            prompt,
        )
        worker.jobs[job.id] = job
        self._jobs[job.id] = worker, job
        return job

    async def _refuse(self, worker: AimeWorker, lease: Lease, error: InvalidRequest) -> None:
        """Release a job that AIME API workers do not support; end it with ``error`` if only they offer its model."""
        lease_token = lease.token
        aime_workers = sum(1 for candidate in self._workers.values() if lease.job.model in candidate.models)
        if self._worker_count(lease.job.model) > aime_workers:
            await self._service.release(worker.full_name, [lease_token])
        else:
            start = sum(record.count for record in lease.log)
            await self._service.finish(worker.full_name, lease_token, start, (), error=error)

    # Progress and results

    async def progress(self, updates: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Append the new text of updates to the jobs' logs; return the response to each update.

        An update is a pair of a job id and the worker's ``progress_data``.
        """
        by_worker: dict[int, tuple[AimeWorker, list[tuple[AimeJob, Mapping[str, Any]]]]] = {}
        for job_id, data in updates:
            if entry := self._jobs.get(job_id):
                worker, job = entry
                by_worker.setdefault(id(worker), (worker, []))[1].append((job, data))
        for worker, worker_updates in by_worker.values():
            await self._append(worker, worker_updates)
        return [self._reply(job_id) for job_id, _ in updates]

    def _reply(self, job_id: str) -> dict[str, Any]:
        # The id is echoed only together with ``canceled``, and once: AIME API workers fail on an id they do not expect.
        if self._ended.get(job_id):
            self._ended[job_id] = False
            return {"success": True, "job_id": job_id, "canceled": True}
        return {"success": job_id in self._jobs}

    async def _append(self, worker: AimeWorker, updates: Sequence[tuple[AimeJob, Mapping[str, Any]]]) -> None:
        async with worker.lock:
            parts: dict[LeaseToken, tuple[int, Sequence[Event]]] = {}
            for job, data in updates:
                job.last_update = worker.last_seen = self._clock()
                job.missing_since = None
                if job.id in worker.jobs:
                    job.record_update(data)
                    if job.pending:
                        parts[job.lease_token] = job.logged, tuple(job.pending)
            if not parts:
                return
            held = await self._registered(worker, lambda: self._service.append_events(worker.full_name, parts))
            for job in {job.id: job for job, _ in updates}.values():
                if job.lease_token in parts:
                    await self._confirm_append(worker, job, held.get(job.lease_token.id))

    async def _confirm_append(self, worker: AimeWorker, job: AimeJob, position: tuple[int, int] | None) -> None:
        job.logged += len(job.pending)
        job.pending.clear()
        if position is None:
            self._cancel(worker, (job.lease_token.id,))
        elif position[0] != job.logged:  # another writer changed the log: the next worker continues from there
            self._drop(worker, job)
            await self._service.release(worker.full_name, [job.lease_token])

    async def result(self, job_id: str, data: Mapping[str, Any]) -> bool:
        """End a job with the worker's result ``data``; return whether the job is known, running or ended."""
        entry = self._jobs.get(job_id)
        if entry is None:
            return job_id in self._ended
        worker, job = entry
        async with worker.lock:
            worker.last_seen = self._clock()
            if job.id not in worker.jobs:
                return True
            error, start = job.failure(data), job.logged
            if not error:
                job.record_update(data, final=True)
            events = [*job.pending, *([] if error else [job.finished_event(data)])]
            await self._registered(
                worker, lambda: self._service.finish(worker.full_name, job.lease_token, start, events, error=error)
            )
            self._drop(worker, job)
        return True

    # Renewing leases

    async def _renew_until_empty(self) -> None:
        """Renew the leases of all workers and remove silent workers, until the pool is empty."""
        while self._workers:
            await asyncio.sleep(self._renew_seconds)
            for worker in list(self._workers.values()):
                try:
                    await self._maintain(worker)
                except MoesaicError as error:
                    log.warning("lease renewal failed", extra={"worker": worker.name, "error": str(error)})

    async def _maintain(self, worker: AimeWorker) -> None:
        now, definition = self._clock(), worker.definition
        silent = 0.0 if worker.pending_requests else now - worker.last_seen
        if silent > (definition.inactivity if worker.jobs else 2 * definition.request_timeout):
            log.warning("worker timed out", extra={"worker": worker.name, "jobs": len(worker.jobs)})
            self._forget(worker)
            del self._workers[worker.full_name]
            with contextlib.suppress(NotFound):
                await self._service.unregister(worker.full_name)
            return
        if any(job.missing_since and now - job.missing_since > STALL_SECONDS for job in worker.jobs.values()):
            await self._reregister(worker)
        for job in [job for job in worker.jobs.values() if now - job.last_update > definition.inactivity]:
            error = TimedOut(f"the worker sent no update of this job for {definition.inactivity:g} s")
            self._drop(worker, job)
            await self._service.finish(worker.full_name, job.lease_token, job.logged, (), error=error)
        await self._renew(worker)

    async def _reregister(self, worker: AimeWorker) -> None:
        """Register a worker again without the jobs that it has lost, probably in a restart. They count as crashes."""
        for job in [job for job in worker.jobs.values() if job.missing_since]:
            self._drop(worker, job)
        self._drop_lost(worker, await self._service.register(worker.info(), worker.leases))

    async def _renew(self, worker: AimeWorker) -> None:
        worker.steps += 1  # until its inactivity timeout, a silent worker counts as making progress
        model = worker.models[0]
        stats = {
            name: ModelStats(len(worker.jobs) if name == model else 0, steps=worker.steps) for name in worker.models
        }
        held = await self._registered(worker, lambda: self._service.renew(worker.full_name, worker.leases, stats))
        for job in list(worker.jobs.values()):
            if held.get(job.lease_token.id) in ("cancelled", "fenced"):
                self._cancel(worker, (job.lease_token.id,))

    def _cancel(self, worker: AimeWorker, ids: Sequence[str]) -> None:
        """Drop the jobs with these ids, whose leases the worker no longer holds.

        Only legacy workers are told to stop them: newer AIME API workers would stop the job but never free its slot.
        """
        for job in [job for job in worker.jobs.values() if job.lease_token.id in ids]:
            self._drop(worker, job, cancelled=worker.legacy)
