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
from moesaic.cluster import protocol
from moesaic.cluster.chores import Chores, whole
from moesaic.cluster.crew import Crew, Session
from moesaic.cluster.desk import LEASE_SECONDS, STALL_SECONDS, Orders, Recruit
from moesaic.cluster.jobs import TICK_SECONDS, Beat, Held, Hold, Lease, Record, Seen, Store
from moesaic.cluster.live import Live
from moesaic.cluster.saving import Saver, catch_up
from moesaic.cluster.silence import Silence
from moesaic.errors import Conflict, MoesaicError, Unavailable

log = logging.getLogger("moesaic.cluster")

GONE = 0.2
"""A worker whose connection was closed is lost when it has not come again for this part of a lease."""
FORGOTTEN = 2.0
"""One of which nothing was heard for so many leases is not here any more, if its connection is open or not."""
LATE = ("fenced", "cancelled")


class Foreman(Crew, Chores):
    """See ``desk.Labour``."""

    def __init__(
        self,
        store: Store,
        lease_seconds: float = LEASE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        Crew.__init__(self, clock)
        Chores.__init__(self)
        self.store, self.lease_seconds, self._stall_seconds = store, lease_seconds, stall_seconds
        self.lives: dict[str, Live] = {}
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
        self._saver, self._silence = Saver(store, clock), Silence(lease_seconds, clock)
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

    @whole
    async def enlist(self, recruit: Recruit, holds: Sequence[Hold] = ()) -> Mapping[str, tuple[int, int] | None]:
        session, before = self.join(recruit)
        again = before is not None and before.recruit.run == recruit.run != ""
        kept = {hold.id for hold in holds}
        left = [beat for beat in await self._beats_of(recruit.name) if beat.hold.id not in kept]
        if again:  # what it was given did not reach it
            await self._take_back([beat.hold for beat in left])
        else:
            await self._lose(left)
        log.info("a worker has come", extra={"worker": recruit.name, "models": session.models, "has": len(kept)})
        known = {hold.id: _how_far(await self._adopted(session, hold)) for hold in holds}
        if not session.stalled:  # it has not died of what it still has, though it was taken for lost
            await self.store.absolve([hold for hold in holds if known[hold.id] is None])
        return known

    @whole
    async def dismiss(self, worker: str) -> None:
        self.forget(worker)
        await self._lose(await self._beats_of(worker))

    async def _beats_of(self, worker: str) -> list[Beat]:
        return [beat for beat in await self.store.beats() if beat.worker == worker]

    def disconnected(self, worker: str) -> None:
        """A worker's connection was closed: unless it comes again in a moment, it is lost."""
        session = self.crew.get(worker)
        if session is not None:
            self.background(self._unless_heard(session, session.heard))

    async def _unless_heard(self, session: Session, heard: float) -> None:
        worker = session.recruit.name
        await self._save([live for id in session.holds if (live := self.lives.get(id))])
        before = await self._beats_of(worker)
        await asyncio.sleep(self.lease_seconds * GONE)
        if self.crew.get(worker) is session and session.heard == heard:
            self.forget(worker)
            now = set(await self._beats_of(worker))  # where a beat has risen, it has come to another gateway
            await self._lose([beat for beat in before if beat in now])

    # Work goes out

    async def lease(self, worker: str, free: int, wait: float) -> Orders:
        session = self.session(worker)
        until = self.clock() + wait
        while self.crew.get(worker) is session:
            session.wake.clear()
            leases = await self._lease(session, min(free, session.recruit.slots - len(session.holds)))
            stop, session.stop = tuple(session.stop), set()
            if leases or stop or self.clock() >= until:
                return Orders(tuple(leases), stop)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - self.clock()):
                    await session.wake.wait()
        return Orders()

    async def _lease(self, session: Session, most: int) -> list[Lease]:
        if most < 1 or session.stalled or session.leaves or session.drained or (session.apart and session.holds):
            return []
        session.apart = self._takes_suspects(session)
        if session.apart and session.holds:  # what it has, it does first
            return []
        leases = await self._leases(session, most)
        if session.apart and not leases:
            self.suspects -= set(session.models)
            session.apart = False
            leases = await self._leases(session, most)
        return [self._leased(session, lease) for lease in leases]

    async def _leases(self, session: Session, most: int) -> list[Lease]:
        asking = asyncio.ensure_future(
            self.store.lease(session.recruit.name, session.models, most, suspects=session.apart)
        )
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:  # whoever asked has left, and never hears of what it was given
            self.background(self._give_back(asking))
            raise

    async def _give_back(self, asking: asyncio.Future[list[Lease]]) -> None:
        await self.store.release([Hold(lease.job.id, lease.fence) for lease in await asking])

    def _takes_suspects(self, session: Session) -> bool:
        """Return whether this worker is to be kept for suspects: while some wait, half of the workers may be."""
        if not self.suspects & set(session.models):
            return False
        apart = sum(each.apart for each in self.crew.values() if each is not session)
        return apart < (len(self.crew) + 1) // 2

    def _leased(self, session: Session, lease: Lease) -> Lease:
        job = lease.job
        live = self.lives.setdefault(job.id, Live(job.id, job.model, job.tenant, unread_since=float("inf")))
        catch_up(live, lease.log)
        live.fence, live.worker = lease.fence, session.recruit.name
        live.begun, live.leased_at = time.time(), self.clock()
        session.holds[job.id] = lease.fence
        # What a client has seen is more than what was on disk, if the last worker died just now.
        return replace(lease, log=(Record(0, len(live.events), protocol.pack_events(live.events)),))

    # What workers send

    @whole
    async def renew(self, worker: str, holds: Sequence[Hold], load: Mapping[str, ModelStats]) -> Mapping[str, Held]:
        session = self.session(worker)
        session.see(load, bool(holds), self.clock())
        if self.clock() - session.stepped > self._stall_seconds and not session.stalled:
            log.error("a worker's engine stands still", extra={"worker": worker, "jobs": len(holds)})
            session.stalled = True
            await self._lose(await self._beats_of(worker))
        try:
            renewed = await self.store.renew([hold for hold in holds if await self._is_of(worker, hold)])
        except Unavailable:
            self._silence.forgive()
            raise
        held: dict[str, Held] = {hold.id: renewed.get(hold.id, "fenced") for hold in holds}
        for hold in holds:
            if held[hold.id] in LATE:
                self._drop(session, hold)
                self.look_again([hold.id])
        return held

    async def _is_of(self, worker: str, hold: Hold) -> bool:
        """Return whether a lease is, or was, this worker's."""
        if self._is_here(worker, hold):
            return True
        seen = await self.store.look(hold.id)
        return seen is not None and _is_whose(seen, worker, hold)

    def _is_here(self, worker: str, hold: Hold) -> bool:
        live = self.lives.get(hold.id)
        return live is not None and (live.worker, live.fence) == (worker, hold.fence)

    async def take(
        self, worker: str, parts: Mapping[Hold, tuple[int, Sequence[Event]]]
    ) -> Mapping[str, tuple[int, int] | None]:
        session = self.session(worker)
        out: dict[str, tuple[int, int] | None] = {}
        for hold, (start, events) in parts.items():
            live = await self._adopted(session, hold)
            if live is None:
                self.fenced += 1
                self._drop(session, hold)
            elif start <= len(live.events):
                live.extend(start, events)
            out[hold.id] = _how_far(live)
        return out

    async def _adopted(self, session: Session, hold: Hold) -> Live | None:
        """Return the job of a lease that holds, also of one that was given by another gateway; else None."""
        worker = session.recruit.name
        live = self.lives.get(hold.id)
        if live is None or not self._is_here(worker, hold):
            if not await self._is_of(worker, hold) or (await self.store.renew([hold]))[hold.id] != "ok":
                return None
            seen, records = await self.store.look(hold.id), await self.store.log(hold.id)
            if seen is None or seen.fence != hold.fence:
                return None
            fresh = Live(hold.id, seen.job.model, seen.job.tenant, unread_since=float("inf"))
            live = self.lives.setdefault(hold.id, fresh)
            catch_up(live, records)
            live.fence, live.worker = hold.fence, worker
        if live.ended:
            return None
        session.holds[hold.id] = hold.fence
        return live

    @whole
    async def finish(
        self,
        worker: str,
        hold: Hold,
        start: int,
        events: Sequence[Event],
        outcome: Any = None,
        error: MoesaicError | None = None,
    ) -> bool:
        session = self.session(worker)
        live = await self._adopted(session, hold)
        counted = await self._finish(live, hold, start, events, outcome, error) if live else None
        if counted is None:  # it is too late, or said again because the answer was not heard
            seen = await self.store.look(hold.id)
            counted = seen is not None and _is_whose(seen, worker, hold) and seen.state in ("done", "failed")
        self.fenced += not counted
        self._drop(session, hold)
        return counted

    async def _finish(
        self, live: Live, hold: Hold, start: int, events: Sequence[Event], outcome: Any, error: MoesaicError | None
    ) -> bool | None:
        """End a job; return whether that counts, None if it has ended or is somebody else's meanwhile."""
        state: Literal["done", "failed"] = "failed" if error else "done"
        result = msgspec.json.encode(protocol.Result(outcome, protocol.fault(error) if error else None))
        async with live.writing:
            if live.ended or live.fence != hold.fence:
                return None
            if start > len(live.events):
                raise Conflict(f"only {len(live.events)} events of this job are known here: send the others first")
            fresh = [*live.events, *events[len(live.events) - start :]]
            last = Record(live.kept, len(fresh) - live.kept, protocol.pack_events(fresh[live.kept :]))
            try:
                counted = await self.store.finish(hold, state, result, last if last.count else None)
            except ValueError:  # more is on disk than was told: the answer of a write was lost
                catch_up(live, await self.store.log(hold.id))
                raise Unavailable("the log of this job has grown: say it again") from None
        if counted and live.fence == hold.fence:
            self.seconds += 0.05 * (self.clock() - live.leased_at - self.seconds) if live.leased_at else 0.0
            live.extend(0, fresh)
            live.kept = len(fresh)
            live.end(outcome, error)
        return counted

    @whole
    async def release(self, worker: str, holds: Sequence[Hold], *, leave: bool = False) -> None:
        session = self.session(worker)
        session.leaves = session.leaves or leave
        mine = [hold for hold in holds if await self._is_of(worker, hold)]
        await self._take_back(mine)
        for hold in mine:
            self._drop(session, hold)

    async def _take_back(self, holds: Sequence[Hold]) -> None:
        """Queue jobs again, without blame."""
        await self._save([live for hold in holds if (live := self.lives.get(hold.id)) and live.fence == hold.fence])
        await self.store.release(holds)
        for hold in holds:
            live = self.lives.get(hold.id)
            if live is not None and live.fence == hold.fence:
                live.worker = ""
        self.wake_idle()

    def _drop(self, session: Session, hold: Hold) -> None:
        """A worker does not have this lease any more."""
        if session.holds.get(hold.id) == hold.fence:
            del session.holds[hold.id]
        if self._is_here(session.recruit.name, hold):
            self.lives[hold.id].worker = ""
        session.wake.set()  # there is room for another

    def stop_job(self, live: Live) -> None:
        """Have a job stopped by whoever has it here."""
        session = self.crew.get(live.worker)
        live.worker = ""
        if session is not None:
            session.holds.pop(live.id, None)
            session.stop.add(live.id)
            session.wake.set()

    # What is on disk, and what is lost

    async def _save_due(self) -> None:
        await self._save(self._saver.due(self.lives.values()))

    async def _save(self, lives: Sequence[Live]) -> None:
        for live in await self._saver.save(lives):
            self.stop_job(live)

    async def _watch(self) -> None:
        """Lose leases whose beat has stood still for too long, and forget workers of which nothing was heard."""
        silent = self._silence.of(await self.store.beats())
        for worker in {beat.worker for beat in silent}:
            session, mine = self.crew.get(worker), [beat for beat in silent if beat.worker == worker]
            if session is not None:  # the store could not say what it gave: nobody had these
                untold = {beat.hold for beat in mine if beat.hold.id not in session.holds}
                await self._take_back(list(untold))
                mine = [beat for beat in mine if beat.hold not in untold]
            await self._lose(mine)
        now = self.clock()
        for worker in [name for name, each in self.crew.items() if now - each.heard > FORGOTTEN * self.lease_seconds]:
            self.forget(worker)

    async def _lose(self, beats: Sequence[Beat]) -> None:
        """Take leases from a worker, all of which it lost together."""
        if not beats:
            return
        holds = {beat.hold for beat in beats}
        here = [live for live in map(self.lives.get, (hold.id for hold in holds)) if live and live.worker]
        if any(len(live.events) > live.kept for live in here):  # what a client has seen must be known to who goes on
            await self._save(here)
            beats = [beat for beat in await self.store.beats() if beat.hold in holds]
        dead = await self.store.lose(beats)
        holds -= {beat.hold for beat in await self.store.beats()}  # those were renewed in the last moment
        self.lost, self.dead = self.lost + len(holds), self.dead + len(dead)
        workers = sorted({beat.worker for beat in beats})
        log.warning("leases are lost", extra={"workers": workers, "jobs": len(holds), "dead": len(dead)})
        self.suspects |= {live.model for live in here} or {name for each in self.crew.values() for name in each.models}
        for live in here:
            if Hold(live.id, live.fence) in holds:
                self.stop_job(live)
        self.look_again(dead)
        self.wake_idle()

    async def _tick(self) -> None:
        self._ticks = await self.store.tick(self._ticks)


def _is_whose(seen: Seen, worker: str, hold: Hold) -> bool:
    """Return whether a lease is this worker's, or was the job's last one and is no more."""
    return (seen.worker, seen.fence) == (worker, hold.fence)


def _how_far(live: Live | None) -> tuple[int, int] | None:
    return None if live is None else (len(live.events), live.kept)
