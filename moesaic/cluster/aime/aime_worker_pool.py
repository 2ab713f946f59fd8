"""AIME's workers as this gateway knows them: what each has, what it has said, and whether it is still there.

A worker of AIME's says nothing between two updates, and an update has the whole text so far. So the gateway renews
its leases for it as long as it may be silent, and passes on what is new in each text. What is lost with a worker, or
with this process, is done again by another, behind what was said. Knows no HTTP.
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
"""Jobs that have ended, whose results may come again."""
REFUSAL_PAUSE_SECONDS = 1.0
"""Seconds in which somebody else may take a job that these workers cannot do."""


class AimeWorkerPool:
    """All of them. Lives on one event loop; a task of its own runs while there is anybody."""

    def __init__(self, service: WorkerService, worker_count: Callable[[str], int], lease_seconds: float) -> None:
        """Begin without anybody.

        Args:
            service: leases jobs to workers.
            worker_count: returns the number of workers that offer a model, these included.
            lease_seconds: a lease that is not renewed for so long is lost.
        """
        self._service, self._worker_count, self._clock = service, worker_count, time.monotonic
        self._pace = lease_seconds * RENEW_FRACTION
        self._members: dict[str, AimeWorker] = {}
        self._jobs: dict[str, tuple[AimeWorker, AimeJob]] = {}
        self._ended: OrderedDict[str, bool] = OrderedDict()  # true: cancelled, and its worker is still to be told
        self._keeper: asyncio.Task[None] | None = None

    def find(self, name: str, job_type: str = "") -> list[AimeWorker]:
        """Return the workers of that name, and type, that are there."""
        members = self._members.values()
        return [each for each in members if each.name == name and job_type in ("", each.definition.job_type)]

    def worker_of(self, job: str) -> AimeWorker | None:
        """Return who has a job."""
        found = self._jobs.get(job)
        return found[0] if found else None

    async def admit(self, member: AimeWorker) -> AimeWorker:
        """Let a worker in; what one of that name had is lost."""
        if old := self._members.get(member.worker):
            self._forget(old)
        await self._service.register(member.info())
        self._members[member.worker] = member
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep(), name="aime-keeper")
        return member

    def _forget(self, member: AimeWorker) -> None:
        for running in list(member.jobs.values()):
            self._drop(member, running)

    def _drop(self, member: AimeWorker, running: AimeJob, *, cancelled: bool = False) -> None:
        member.jobs.pop(running.id, None)
        self._jobs.pop(running.id, None)
        self._ended[running.id] = cancelled
        if len(self._ended) > MAX_ENDED_JOBS:
            self._ended.popitem(last=False)

    async def _known(self, member: AimeWorker, work: Callable[[], Awaitable[T]]) -> T:
        """Do something in a worker's name; let it in again if it is not known any more."""
        try:
            return await work()
        except NotFound:
            self._settle(member, await self._service.register(member.info(), member.leases))
            return await work()

    def _settle(self, member: AimeWorker, held: Mapping[str, object]) -> None:
        for running in list(member.jobs.values()):
            if held.get(running.lease_token.id) is None:
                self._cancel(member, (running.lease_token.id,))

    # Jobs out

    async def give(self, member: AimeWorker, free: int, wait: float) -> list[AimeJob]:
        """Return jobs for a worker that can take ``free`` more; none after ``wait`` seconds without."""
        member.heard, until = self._clock(), self._clock() + wait
        if free >= member.slots:  # it says that it has none
            for running in member.jobs.values():
                running.doubted = running.doubted or self._clock()
        if free > member.slots:
            member.slots = free
            self._settle(member, await self._service.register(member.info(), member.leases))
        member.asking += 1
        try:
            while True:
                found = await self._leased(member, free, until - self._clock())
                if found or self._clock() >= until:
                    return found
        finally:
            member.asking -= 1
            member.heard = self._clock()

    async def _leased(self, member: AimeWorker, free: int, wait: float) -> list[AimeJob]:
        assignment = await self._known(member, lambda: self._service.lease(member.worker, free, max(0.0, wait)))
        self._cancel(member, assignment.cancel)
        found, refused = [], False
        try:
            for lease in assignment.leases:
                try:
                    found.append(self._begun(member, lease))
                except InvalidRequest as error:
                    refused = True
                    await self._refuse(member, lease, error)
            if refused and not found:
                await asyncio.sleep(REFUSAL_PAUSE_SECONDS)
        except asyncio.CancelledError:  # the worker has left, and will never know of them
            leases = [lease.token for lease in assignment.leases]
            for running in found:
                self._drop(member, running)
            await asyncio.shield(self._service.release(member.worker, leases))
            raise
        return found

    def _begun(self, member: AimeWorker, lease: Lease) -> AimeJob:
        if lease.job.kind != "generate":
            raise InvalidRequest(f"this model is served by AIME's workers, which cannot {lease.job.kind}")
        request = wire.unpack_request(lease.job.body)
        events = [event for record in lease.log for event in wire.unpack_events(record.blob)]
        pieces = [event for event in events if isinstance(event, Delta)]
        before = "".join(piece.text for piece in pieces)
        tokens = sum(len(piece.tokens) for piece in pieces) or len(before) // 4
        definition = next((each for each in member.definitions if each.offered == lease.job.model), member.definition)
        data = parameters_for(request, definition, before, tokens)
        lease_token = lease.token
        prompt = next((event.prompt_tokens for event in events if isinstance(event, PromptDone)), 0)
        running = AimeJob(
            f"{lease_token.id}#{lease_token.fence}",
            lease_token,
            data,
            before,
            tokens,
            before,
            len(events),
            self._clock(),
            prompt,
        )
        member.jobs[running.id] = running
        self._jobs[running.id] = member, running
        return running

    async def _refuse(self, member: AimeWorker, lease: Lease, error: InvalidRequest) -> None:
        """Give a job back that such workers cannot do, or end it if there are no others."""
        lease_token = lease.token
        own = sum(1 for each in self._members.values() if lease.job.model in each.models)
        if self._worker_count(lease.job.model) > own:
            await self._service.release(member.worker, [lease_token])
        else:
            start = sum(record.count for record in lease.log)
            await self._service.finish(member.worker, lease_token, start, (), error=error)

    # Jobs in

    async def progress(self, updates: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Take in how far jobs are, each with its job's id; return what each update is answered with."""
        by_member: dict[int, tuple[AimeWorker, list[tuple[AimeJob, Mapping[str, Any]]]]] = {}
        for job, data in updates:
            if found := self._jobs.get(job):
                by_member.setdefault(id(found[0]), (found[0], []))[1].append((found[1], data))
        for member, theirs in by_member.values():
            await self._take(member, theirs)
        return [self._answer(job) for job, _ in updates]

    def _answer(self, job: str) -> dict[str, Any]:
        # An id is echoed with ``canceled`` alone, and once: their interface breaks on one that it does not expect.
        if self._ended.get(job):
            self._ended[job] = False
            return {"success": True, "job_id": job, "canceled": True}
        return {"success": job in self._jobs}

    async def _take(self, member: AimeWorker, updates: Sequence[tuple[AimeJob, Mapping[str, Any]]]) -> None:
        async with member.lock:
            parts: dict[LeaseToken, tuple[int, Sequence[Event]]] = {}
            for running, data in updates:
                running.heard = member.heard = self._clock()
                running.doubted = None
                if running.id in member.jobs:
                    running.note(data)
                    if running.pending:
                        parts[running.lease_token] = running.logged, tuple(running.pending)
            if not parts:
                return
            held = await self._known(member, lambda: self._service.append_events(member.worker, parts))
            for running in {running.id: running for running, _ in updates}.values():
                if running.lease_token in parts:
                    await self._taken(member, running, held.get(running.lease_token.id))

    async def _taken(self, member: AimeWorker, running: AimeJob, known: tuple[int, int] | None) -> None:
        running.logged += len(running.pending)
        running.pending.clear()
        if known is None:
            self._cancel(member, (running.lease_token.id,))
        elif known[0] != running.logged:  # the log is not as it was left: whoever does it next goes on behind it
            self._drop(member, running)
            await self._service.release(member.worker, [running.lease_token])

    async def result(self, job: str, data: Mapping[str, Any]) -> bool:
        """End a job with its worker's result; return whether there is such a job, or was."""
        found = self._jobs.get(job)
        if found is None:
            return job in self._ended
        member, running = found
        async with member.lock:
            member.heard = self._clock()
            if running.id not in member.jobs:
                return True
            error, start = running.failure(data), running.logged
            if not error:
                running.note(data, final=True)
            events = [*running.pending, *([] if error else [running.end(data)])]
            await self._known(
                member, lambda: self._service.finish(member.worker, running.lease_token, start, events, error=error)
            )
            self._drop(member, running)
        return True

    # Leases

    async def _keep(self) -> None:
        """Renew what they have, and let go who is gone, until nobody is there."""
        while self._members:
            await asyncio.sleep(self._pace)
            for member in list(self._members.values()):
                try:
                    await self._look_after(member)
                except MoesaicError as error:
                    log.warning("a worker could not be looked after", extra={"worker": member.name, "why": str(error)})

    async def _look_after(self, member: AimeWorker) -> None:
        now, own = self._clock(), member.definition
        silent = 0.0 if member.asking else now - member.heard
        if silent > (own.inactivity if member.jobs else 2 * own.request_timeout):
            log.warning("a worker is gone", extra={"worker": member.name, "jobs": len(member.jobs)})
            self._forget(member)
            del self._members[member.worker]
            with contextlib.suppress(NotFound):
                await self._service.unregister(member.worker)
            return
        if any(each.doubted and now - each.doubted > STALL_SECONDS for each in member.jobs.values()):
            await self._begin_again(member)
        for running in [each for each in member.jobs.values() if now - each.heard > own.inactivity]:
            error = TimedOut(f"the worker said nothing of this job for {own.inactivity:g} s")
            self._drop(member, running)
            await self._service.finish(member.worker, running.lease_token, running.logged, (), error=error)
        await self._renew(member)

    async def _begin_again(self, member: AimeWorker) -> None:
        """Let a worker in anew that has lost jobs, most likely with its process: these are lost, and counted so."""
        for running in [each for each in member.jobs.values() if each.doubted]:
            self._drop(member, running)
        self._settle(member, await self._service.register(member.info(), member.leases))

    async def _renew(self, member: AimeWorker) -> None:
        member.steps += 1  # within what it may be silent, it counts as making progress
        model = member.models[0]
        load = {
            name: ModelStats(len(member.jobs) if name == model else 0, steps=member.steps) for name in member.models
        }
        held = await self._known(member, lambda: self._service.renew(member.worker, member.leases, load))
        for running in list(member.jobs.values()):
            if held.get(running.lease_token.id) in ("cancelled", "fenced"):
                self._cancel(member, (running.lease_token.id,))

    def _cancel(self, member: AimeWorker, ids: Sequence[str]) -> None:
        """Forget jobs that are nobody's any more, or another's.

        Only older workers are told: AIME's newer ones would end the work and never free its place.
        """
        for running in [each for each in member.jobs.values() if each.lease_token.id in ids]:
            self._drop(member, running, cancelled=member.legacy)
