"""Who hands work out: leases, what workers send, and what becomes of it when they are lost.

A worker always has a question open that is answered when there is work, or something to stop. It is lost when its
leases are not renewed, when its connection is closed and it does not come again, when its engine stands still, or when
it comes again without what it had. Knows leases. Does not know who asked for a job, nor HTTP.
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
from moesaic.cluster.active_jobs import ActiveJob
from moesaic.cluster.jobs import TICK_SECONDS, JobSnapshot, Lease, LeaseStatus, LeaseToken, LogRecord, RenewState, Store
from moesaic.cluster.lease_timeouts import LeaseTimeouts
from moesaic.cluster.log_flusher import LogFlusher, catch_up
from moesaic.cluster.protocols import LEASE_SECONDS, STALL_SECONDS, Assignment, WorkerInfo
from moesaic.cluster.tasks import BackgroundTasks, shielded
from moesaic.cluster.workers import WorkerRegistry, WorkerSession
from moesaic.errors import Conflict, MoesaicError, Unavailable

log = logging.getLogger("moesaic.cluster")

GONE = 0.2
"""A worker whose connection was closed is lost when it has not come again for this part of a lease."""
FORGOTTEN = 2.0
"""One of which nothing was heard for so many leases is not here any more, if its connection is open or not."""
LATE = ("fenced", "cancelled")


class LeaseManager(WorkerRegistry, BackgroundTasks):
    """See ``desk.Labour``."""

    def __init__(
        self,
        store: Store,
        lease_seconds: float = LEASE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        WorkerRegistry.__init__(self, clock)
        BackgroundTasks.__init__(self)
        self.store, self.lease_seconds, self._stall_seconds = store, lease_seconds, stall_seconds
        self.lives: dict[str, ActiveJob] = {}
        self.suspects: set[str] = set()
        """Models of which suspects wait."""
        self.changed: set[str] = set()
        """Jobs to be looked at in the store."""
        self.looking = asyncio.Event()
        self.fenced = 0
        """Results and tokens that came too late, and did not count."""
        self.lost = self.dead = 0
        """Leases that were lost, and jobs that were set aside because of it."""
        self.seconds = 1.0
        """What a job takes, as a running mean."""
        self._saver, self._silence = LogFlusher(store, clock), LeaseTimeouts(lease_seconds, clock)
        self._ticks = -1
        self.always(min(1.0, lease_seconds / 5), self._watch)
        self.always(self._saver.pace, self._save_due)
        self.always(TICK_SECONDS, self._tick)

    async def stop(self) -> None:
        """Save what is not on disk yet, and end."""
        await self.leave_off()
        with contextlib.suppress(Unavailable):
            await self._saver.save(list(self.lives.values()))

    def look_again(self, ids: Sequence[str]) -> None:
        """Have jobs looked at in the store, for something has become of them there."""
        self.changed |= self.lives.keys() & set(ids)
        self.looking.set()

    # Workers come and go

    @shielded
    async def register(
        self, info: WorkerInfo, leases: Sequence[LeaseToken] = ()
    ) -> Mapping[str, tuple[int, int] | None]:
        session, before = self.join(info)
        again = before is not None and before.info.run == info.run != ""
        kept = {lease_token.id for lease_token in leases}
        left = [status for status in await self._beats_of(info.name) if status.lease_token.id not in kept]
        if again:  # what it was given did not reach it
            await self._take_back([status.lease_token for status in left])
        else:
            await self._lose(left)
        log.info("a worker has come", extra={"worker": info.name, "models": session.models, "has": len(kept)})
        known = {lease_token.id: _how_far(await self._adopted(session, lease_token)) for lease_token in leases}
        if not session.stalled:  # it has not died of what it still has, though it was taken for lost
            await self.store.forgive_crash([lease_token for lease_token in leases if known[lease_token.id] is None])
        return known

    @shielded
    async def dismiss(self, worker: str) -> None:
        self.forget(worker)
        await self._lose(await self._beats_of(worker))

    async def _beats_of(self, worker: str) -> list[LeaseStatus]:
        return [status for status in await self.store.active_leases() if status.worker == worker]

    def disconnected(self, worker: str) -> None:
        """A worker's connection was closed: unless it comes again in a moment, it is lost."""
        session = self.crew.get(worker)
        if session is not None:
            self.background(self._unless_heard(session, session.last_seen))

    async def _unless_heard(self, session: WorkerSession, heard: float) -> None:
        worker = session.info.name
        await self._save([live for id in session.leases if (live := self.lives.get(id))])
        before = await self._beats_of(worker)
        await asyncio.sleep(self.lease_seconds * GONE)
        if self.crew.get(worker) is session and session.last_seen == heard:
            self.forget(worker)
            now = set(await self._beats_of(worker))  # where a beat has risen, it has come to another gateway
            await self._lose([status for status in before if status in now])

    # Work goes out

    async def lease(self, worker: str, free: int, wait: float) -> Assignment:
        session = self.session(worker)
        until = self.clock() + wait
        while self.crew.get(worker) is session:
            session.wake.clear()
            leases = await self._lease(session, min(free, session.info.slots - len(session.leases)))
            stop, session.stop = tuple(session.stop), set()
            if leases or stop or self.clock() >= until:
                return Assignment(tuple(leases), stop)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - self.clock()):
                    await session.wake.wait()
        return Assignment()

    async def _lease(self, session: WorkerSession, most: int) -> list[Lease]:
        if most < 1 or session.stalled or session.leaves or session.drained or (session.quarantined and session.leases):
            return []
        session.quarantined = self._takes_suspects(session)
        if session.quarantined and session.leases:  # what it has, it does first
            return []
        leases = await self._leases(session, most)
        if session.quarantined and not leases:
            self.suspects -= set(session.models)
            session.quarantined = False
            leases = await self._leases(session, most)
        return [self._leased(session, lease) for lease in leases]

    async def _leases(self, session: WorkerSession, most: int) -> list[Lease]:
        asking = asyncio.ensure_future(
            self.store.lease(session.info.name, session.models, most, suspects=session.quarantined)
        )
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:  # whoever asked has left, and never hears of what it was given
            self.background(self._give_back(asking))
            raise

    async def _give_back(self, asking: asyncio.Future[list[Lease]]) -> None:
        await self.store.release([LeaseToken(lease.job.id, lease.fence) for lease in await asking])

    def _takes_suspects(self, session: WorkerSession) -> bool:
        """Return whether this worker is to be kept for suspects: while some wait, half of the workers may be."""
        if not self.suspects & set(session.models):
            return False
        apart = sum(each.quarantined for each in self.crew.values() if each is not session)
        return apart < (len(self.crew) + 1) // 2

    def _leased(self, session: WorkerSession, lease: Lease) -> Lease:
        job = lease.job
        live = self.lives.setdefault(job.id, ActiveJob(job.id, job.model, job.tenant, unread_since=float("inf")))
        catch_up(live, lease.log)
        live.fence, live.worker = lease.fence, session.info.name
        live.begun, live.leased_at = time.time(), self.clock()
        session.leases[job.id] = lease.fence
        # What a client has seen is more than what was on disk, if the last worker died just now.
        return replace(lease, log=(LogRecord(0, len(live.events), wire.pack_events(live.events)),))

    # What workers send

    @shielded
    async def renew(
        self, worker: str, leases: Sequence[LeaseToken], load: Mapping[str, ModelStats]
    ) -> Mapping[str, RenewState]:
        session = self.session(worker)
        session.see(load, bool(leases), self.clock())
        if self.clock() - session.stepped > self._stall_seconds and not session.stalled:
            log.error("a worker's engine stands still", extra={"worker": worker, "jobs": len(leases)})
            session.stalled = True
            await self._lose(await self._beats_of(worker))
        try:
            renewed = await self.store.renew(
                [lease_token for lease_token in leases if await self._is_of(worker, lease_token)]
            )
        except Unavailable:
            self._silence.forgive()
            raise
        held: dict[str, RenewState] = {lease_token.id: renewed.get(lease_token.id, "fenced") for lease_token in leases}
        for lease_token in leases:
            if held[lease_token.id] in LATE:
                self._drop(session, lease_token)
                self.look_again([lease_token.id])
        return held

    async def _is_of(self, worker: str, lease_token: LeaseToken) -> bool:
        """Return whether a lease is, or was, this worker's."""
        if self._is_here(worker, lease_token):
            return True
        seen = await self.store.snapshot(lease_token.id)
        return seen is not None and _is_whose(seen, worker, lease_token)

    def _is_here(self, worker: str, lease_token: LeaseToken) -> bool:
        live = self.lives.get(lease_token.id)
        return live is not None and (live.worker, live.fence) == (worker, lease_token.fence)

    async def take(
        self, worker: str, parts: Mapping[LeaseToken, tuple[int, Sequence[Event]]]
    ) -> Mapping[str, tuple[int, int] | None]:
        session = self.session(worker)
        out: dict[str, tuple[int, int] | None] = {}
        for lease_token, (start, events) in parts.items():
            live = await self._adopted(session, lease_token)
            if live is None:
                self.fenced += 1
                self._drop(session, lease_token)
            elif start <= len(live.events):
                live.extend(start, events)
            out[lease_token.id] = _how_far(live)
        return out

    async def _adopted(self, session: WorkerSession, lease_token: LeaseToken) -> ActiveJob | None:
        """Return the job of a lease that holds, also of one that was given by another gateway; else None."""
        worker = session.info.name
        live = self.lives.get(lease_token.id)
        if live is None or not self._is_here(worker, lease_token):
            if (
                not await self._is_of(worker, lease_token)
                or (await self.store.renew([lease_token]))[lease_token.id] != "ok"
            ):
                return None
            seen, records = await self.store.snapshot(lease_token.id), await self.store.log(lease_token.id)
            if seen is None or seen.fence != lease_token.fence:
                return None
            fresh = ActiveJob(lease_token.id, seen.job.model, seen.job.tenant, unread_since=float("inf"))
            live = self.lives.setdefault(lease_token.id, fresh)
            catch_up(live, records)
            live.fence, live.worker = lease_token.fence, worker
        if live.ended:
            return None
        session.leases[lease_token.id] = lease_token.fence
        return live

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
        session = self.session(worker)
        live = await self._adopted(session, lease_token)
        counted = await self._finish(live, lease_token, start, events, outcome, error) if live else None
        if counted is None:  # it is too late, or said again because the answer was not heard
            seen = await self.store.snapshot(lease_token.id)
            counted = seen is not None and _is_whose(seen, worker, lease_token) and seen.state in ("done", "failed")
        self.fenced += not counted
        self._drop(session, lease_token)
        return counted

    async def _finish(
        self,
        live: ActiveJob,
        lease_token: LeaseToken,
        start: int,
        events: Sequence[Event],
        outcome: Any,
        error: MoesaicError | None,
    ) -> bool | None:
        """End a job; return whether that counts, None if it has ended or is somebody else's meanwhile."""
        state: Literal["done", "failed"] = "failed" if error else "done"
        result = msgspec.json.encode(wire.JobResult(outcome, wire.error_info(error) if error else None))
        async with live.writing:
            if live.ended or live.fence != lease_token.fence:
                return None
            if start > len(live.events):
                raise Conflict(f"only {len(live.events)} events of this job are known here: send the others first")
            fresh = [*live.events, *events[len(live.events) - start :]]
            last = LogRecord(live.kept, len(fresh) - live.kept, wire.pack_events(fresh[live.kept :]))
            try:
                counted = await self.store.finish(lease_token, state, result, last if last.count else None)
            except ValueError:  # more is on disk than was told: the answer of a write was lost
                catch_up(live, await self.store.log(lease_token.id))
                raise Unavailable("the log of this job has grown: say it again") from None
        if counted and live.fence == lease_token.fence:
            self.seconds += 0.05 * (self.clock() - live.leased_at - self.seconds) if live.leased_at else 0.0
            live.extend(0, fresh)
            live.kept = len(fresh)
            live.end(outcome, error)
        return counted

    @shielded
    async def release(self, worker: str, leases: Sequence[LeaseToken], *, leave: bool = False) -> None:
        session = self.session(worker)
        session.leaves = session.leaves or leave
        mine = [lease_token for lease_token in leases if await self._is_of(worker, lease_token)]
        await self._take_back(mine)
        for lease_token in mine:
            self._drop(session, lease_token)

    async def _take_back(self, leases: Sequence[LeaseToken]) -> None:
        """Queue jobs again, without blame."""
        await self._save(
            [
                live
                for lease_token in leases
                if (live := self.lives.get(lease_token.id)) and live.fence == lease_token.fence
            ]
        )
        await self.store.release(leases)
        for lease_token in leases:
            live = self.lives.get(lease_token.id)
            if live is not None and live.fence == lease_token.fence:
                live.worker = ""
        self.wake_idle()

    def _drop(self, session: WorkerSession, lease_token: LeaseToken) -> None:
        """A worker does not have this lease any more."""
        if session.leases.get(lease_token.id) == lease_token.fence:
            del session.leases[lease_token.id]
        if self._is_here(session.info.name, lease_token):
            self.lives[lease_token.id].worker = ""
        session.wake.set()  # there is room for another

    def stop_job(self, live: ActiveJob) -> None:
        """Have a job stopped by whoever has it here."""
        session = self.crew.get(live.worker)
        live.worker = ""
        if session is not None:
            session.leases.pop(live.id, None)
            session.stop.add(live.id)
            session.wake.set()

    # What is on disk, and what is lost

    async def _save_due(self) -> None:
        await self._save(self._saver.due(self.lives.values()))

    async def _save(self, lives: Sequence[ActiveJob]) -> None:
        for live in await self._saver.save(lives):
            self.stop_job(live)

    async def _watch(self) -> None:
        """Lose leases whose beat has stood still for too long, and forget workers of which nothing was heard."""
        silent = self._silence.of(await self.store.active_leases())
        for worker in {status.worker for status in silent}:
            session, mine = self.crew.get(worker), [status for status in silent if status.worker == worker]
            if session is not None:  # the store could not say what it gave: nobody had these
                untold = {status.lease_token for status in mine if status.lease_token.id not in session.leases}
                await self._take_back(list(untold))
                mine = [status for status in mine if status.lease_token not in untold]
            await self._lose(mine)
        now = self.clock()
        for worker in [
            name for name, each in self.crew.items() if now - each.last_seen > FORGOTTEN * self.lease_seconds
        ]:
            self.forget(worker)

    async def _lose(self, active_leases: Sequence[LeaseStatus]) -> None:
        """Take leases from a worker, all of which it lost together."""
        if not active_leases:
            return
        leases = {status.lease_token for status in active_leases}
        here = [
            live for live in map(self.lives.get, (lease_token.id for lease_token in leases)) if live and live.worker
        ]
        if any(len(live.events) > live.kept for live in here):  # what a client has seen must be known to who goes on
            await self._save(here)
            active_leases = [status for status in await self.store.active_leases() if status.lease_token in leases]
        dead = await self.store.expire(active_leases)
        leases -= {
            status.lease_token for status in await self.store.active_leases()
        }  # those were renewed in the last moment
        self.lost, self.dead = self.lost + len(leases), self.dead + len(dead)
        workers = sorted({status.worker for status in active_leases})
        log.warning("leases are lost", extra={"workers": workers, "jobs": len(leases), "dead": len(dead)})
        self.suspects |= {live.model for live in here} or {name for each in self.crew.values() for name in each.models}
        for live in here:
            if LeaseToken(live.id, live.fence) in leases:
                self.stop_job(live)
        self.look_again(dead)
        self.wake_idle()

    async def _tick(self) -> None:
        self._ticks = await self.store.tick(self._ticks)


def _is_whose(seen: JobSnapshot, worker: str, lease_token: LeaseToken) -> bool:
    """Return whether a lease is this worker's, or was the job's last one and is no more."""
    return (seen.worker, seen.fence) == (worker, lease_token.fence)


def _how_far(live: ActiveJob | None) -> tuple[int, int] | None:
    return None if live is None else (len(live.events), live.kept)
