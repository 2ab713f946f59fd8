"""Who hands work out: workers' sessions, their leases, what they send, and what becomes of it when they are lost.

A worker always has a question open that is answered when there is work, or something to stop. It is lost when its
leases are not renewed, when its connection is closed and it does not come again, when its engine stands still, or when
it comes again without what it had. Knows workers and leases. Does not know who asked for a job, nor HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from moesaic.cluster import protocol
from moesaic.cluster.desk import LEASE_SECONDS, STALL_SECONDS, Orders, Recruit
from moesaic.cluster.jobs import TICK_SECONDS, Beat, Held, Hold, Lease, Record, Store
from moesaic.cluster.live import Live
from moesaic.door import Card, Event, Load
from moesaic.errors import Conflict, MoesaicError, NotFound, Unavailable

log = logging.getLogger("moesaic.cluster")

SAVE_SECONDS = 1.0
"""How long events may be known without being on disk; ..."""
SAVE_EVENTS = 256
"""... and how many."""
SHARE_SECONDS = 0.05
"""The same of a job whose client may be at another gateway."""
GONE = 0.2
"""A worker whose connection was closed is lost when it has not come again for this part of a lease."""
LATE = ("fenced", "cancelled")


@dataclass(eq=False)
class Session:
    """A worker that is here."""

    recruit: Recruit
    models: tuple[str, ...]
    holds: dict[str, int] = field(default_factory=dict)
    """Jobs and fences of what it has."""
    stop: set[str] = field(default_factory=set)
    """Jobs that it is to be told to stop."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    load: Mapping[str, Load] = field(default_factory=dict)
    apart: bool = False
    """Whether what it has are suspects, and nothing else is to be given to it."""
    since: float = field(default_factory=time.time)
    heard: float = 0.0
    stepped: float = 0.0
    """When its engine was last seen to make progress, or had nothing to do."""
    drained: bool = False
    """Whether it is to get nothing more."""


class Foreman:
    """See ``desk.Labour``."""

    def __init__(
        self, store: Store, lease_seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store, self.lease_seconds, self.clock = store, lease_seconds, clock
        self.crew: dict[str, Session] = {}
        self.known: dict[str, Card] = {}
        """Every model that a worker has offered, or that was named at the start."""
        self.lives: dict[str, Live] = {}
        self.suspects: set[str] = set()
        """Models of which suspects wait."""
        self.fenced = 0
        """Results and tokens that came too late, and did not count."""
        self.lost = self.dead = 0
        """Leases that were lost, and jobs that were set aside because of it."""
        self.seconds = 1.0
        """What a job takes, as a running mean."""
        self._past: dict[str, Load] = {}  # what workers that have gone had counted
        self._seen: dict[Hold, tuple[int, float]] = {}  # of each lease its beat, and since when it has it
        self._background: set[asyncio.Task[Any]] = set()
        self._work = [asyncio.ensure_future(work()) for work in (self._watch, self._save_all, self._tick)]

    async def stop(self) -> None:
        """Save what is not on disk yet, and end."""
        for task in (*self._work, *self._background):
            task.cancel()
        await asyncio.gather(*self._work, *self._background, return_exceptions=True)
        with contextlib.suppress(Unavailable):
            await self._save([live for live in self.lives.values() if live.kept < len(live.events)])

    def background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have something done that nobody waits for."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("left undone", extra={"why": f"{type(error).__name__}: {error}"})

    # Workers come and go

    async def enlist(self, recruit: Recruit, holds: Sequence[Hold] = ()) -> Mapping[str, tuple[int, int] | None]:
        before = self.crew.get(recruit.name)
        now = self.clock()
        session = Session(recruit, tuple(card.name for card in recruit.cards), heard=now, stepped=now)
        self.crew[recruit.name] = session
        if before is not None:
            before.wake.set()
        for card in recruit.cards:
            self.known[card.name] = replace(card, state="loaded")
        kept = {hold.id for hold in holds}
        await self._lose(
            [beat for beat in await self.store.beats() if beat.worker == recruit.name and beat.hold.id not in kept]
        )
        log.info("a worker has come", extra={"worker": recruit.name, "models": session.models, "has": len(kept)})
        return {hold.id: self._how_far(await self._adopted(recruit.name, hold)) for hold in holds}

    def _session(self, worker: str) -> Session:
        session = self.crew.get(worker)
        if session is None:
            raise NotFound(f"there is no worker {worker!r:.80} here: enlist first")
        session.heard = self.clock()
        return session

    async def dismiss(self, worker: str) -> None:
        self._forget(worker)
        await self._lose([beat for beat in await self.store.beats() if beat.worker == worker])

    def _forget(self, worker: str) -> None:
        session = self.crew.pop(worker, None)
        if session is None:
            return
        log.info("a worker has gone", extra={"worker": worker})
        session.wake.set()
        for name, load in session.load.items():
            self._past[name] = _sum(
                self._past.get(name, Load()), replace(load, running=0, waiting=0, blocks=0, free_blocks=0)
            )
        there = {name for each in self.crew.values() for name in each.models}
        for name in set(session.models) - there:
            self.known[name] = replace(self.known[name], state="unloaded")

    def disconnected(self, worker: str) -> None:
        """A worker's connection was closed: unless it comes again in a moment, it is lost."""
        session = self.crew.get(worker)
        if session is not None:
            self.background(self._unless_heard(worker, session, session.heard))

    async def _unless_heard(self, worker: str, session: Session, heard: float) -> None:
        await asyncio.sleep(self.lease_seconds * GONE)
        if self.crew.get(worker) is session and session.heard == heard:
            await self.dismiss(worker)

    def loads(self) -> Mapping[str, Load]:
        """Return how busy the models are, all workers together."""
        out: dict[str, Load] = {}
        for session in self.crew.values():
            for name in session.models:
                out[name] = _sum(out.get(name, self._past.get(name, Load())), session.load.get(name, Load()))
        return out

    # Work goes out

    def wake_idle(self, model: str = "") -> None:
        """There is something new to do."""
        for session in self.crew.values():
            if not model or model in session.models:
                session.wake.set()

    async def lease(self, worker: str, free: int, wait: float) -> Orders:
        session = self._session(worker)
        until = self.clock() + wait
        while True:
            session.wake.clear()
            stop, session.stop = tuple(session.stop), set()
            leases = await self._lease(session, min(free, session.recruit.slots - len(session.holds)))
            if leases or stop or self.clock() >= until or self.crew.get(worker) is not session:
                return Orders(tuple(leases), stop)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - self.clock()):
                    await session.wake.wait()

    async def _lease(self, session: Session, most: int) -> list[Lease]:
        if most < 1 or session.drained or (session.apart and session.holds):
            return []
        session.apart = self._takes_suspects(session)
        if session.apart and session.holds:  # what it has, it does first
            return []
        name = session.recruit.name
        leases = await self.store.lease(name, session.models, most, suspects=session.apart)
        if session.apart and not leases:
            self.suspects -= set(session.models)
            session.apart = False
            leases = await self.store.lease(name, session.models, most)
        return [self._leased(session, lease) for lease in leases]

    def _takes_suspects(self, session: Session) -> bool:
        """Return whether this worker is to be kept for suspects: while some wait, half of the workers may be."""
        if not self.suspects & set(session.models):
            return False
        apart = sum(each.apart for each in self.crew.values() if each is not session)
        return apart < (len(self.crew) + 1) // 2

    def _leased(self, session: Session, lease: Lease) -> Lease:
        job = lease.job
        live = self.lives.setdefault(job.id, Live(job.id, job.model, job.tenant, unread_since=float("inf")))
        for record in lease.log:
            if record.start + record.count > len(live.events):
                live.extend(record.start, protocol.unpack_events(record.blob))
        live.kept = sum(record.count for record in lease.log)
        live.fence, live.worker, live.begun = lease.fence, session.recruit.name, time.time()
        session.holds[job.id] = lease.fence
        # What a client has seen is more than what was on disk, if the last worker died just now.
        return replace(lease, log=(Record(0, len(live.events), protocol.pack_events(live.events)),))

    # What workers send

    async def renew(self, worker: str, holds: Sequence[Hold], load: Mapping[str, Load]) -> Mapping[str, Held]:
        session = self._session(worker)
        moves = any(load[name].steps != session.load.get(name, Load()).steps for name in load)
        busy = any(each.running + each.waiting for each in load.values())
        if moves or not busy or not holds:
            session.stepped = self.clock()
        session.load = load
        if self.clock() - session.stepped > STALL_SECONDS:
            log.error("a worker's engine stands still", extra={"worker": worker, "jobs": len(holds)})
            await self._lose([beat for beat in await self.store.beats() if beat.worker == worker])
        held = dict(await self.store.renew(holds))
        for hold in holds:
            if held[hold.id] in LATE:
                self._drop(session, hold)
        return held

    async def take(
        self, worker: str, parts: Mapping[Hold, tuple[int, Sequence[Event]]]
    ) -> Mapping[str, tuple[int, int] | None]:
        session = self._session(worker)
        out: dict[str, tuple[int, int] | None] = {}
        for hold, (start, events) in parts.items():
            live = await self._adopted(worker, hold)
            if live is None:
                self.fenced += 1
                self._drop(session, hold)
            elif start <= len(live.events):
                live.extend(start, events)
            out[hold.id] = self._how_far(live)
        return out

    def _how_far(self, live: Live | None) -> tuple[int, int] | None:
        return None if live is None else (len(live.events), live.kept)

    async def _adopted(self, worker: str, hold: Hold) -> Live | None:
        """Return the job of a lease that holds, also of one that was given by another gateway; else None."""
        live = self.lives.get(hold.id)
        if live is not None and live.worker == worker and live.fence == hold.fence:
            return None if live.ended else live
        if (await self.store.renew([hold])).get(hold.id) != "ok":
            return None
        seen = await self.store.look(hold.id)
        if seen is None or seen.worker != worker:
            return None
        live = self.lives.setdefault(hold.id, Live(hold.id, seen.job.model, seen.job.tenant, unread_since=float("inf")))
        for record in await self.store.log(hold.id):
            live.extend(record.start, protocol.unpack_events(record.blob))
        live.kept, live.fence, live.worker = seen.logged, hold.fence, worker
        self.crew[worker].holds[hold.id] = hold.fence
        return live

    async def finish(
        self,
        worker: str,
        hold: Hold,
        start: int,
        events: Sequence[Event],
        outcome: Any = None,
        error: MoesaicError | None = None,
    ) -> bool:
        session = self._session(worker)
        live = await self._adopted(worker, hold)
        state: Literal["done", "failed"] = "failed" if error else "done"
        result = msgspec.json.encode(protocol.Result(outcome, protocol.fault(error) if error else None))
        if live is None:  # it is too late, or said again because the answer was not heard
            seen = await self.store.look(hold.id)
            counted = seen is not None and seen.fence == hold.fence and seen.state == state
            self.fenced += not counted
            self._drop(session, hold)
            return counted
        async with live.writing:
            if start > len(live.events):
                raise Conflict(f"only {len(live.events)} events of this job are known here: send the others first")
            fresh = [*live.events, *events[len(live.events) - start :]]
            last = Record(live.kept, len(fresh) - live.kept, protocol.pack_events(fresh[live.kept :]))
            counted = await self.store.finish(hold, state, result, last if last.count else None)
        self._drop(session, hold)
        if counted:
            self.seconds += 0.05 * (time.time() - live.begun - self.seconds) if live.begun else 0.0
            live.extend(0, fresh)
            live.kept = len(fresh)
            live.end(outcome, error)
        else:
            self.fenced += 1
        return counted

    async def release(self, worker: str, holds: Sequence[Hold]) -> None:
        session = self._session(worker)
        await self._save([live for hold in holds if (live := self.lives.get(hold.id)) and live.worker == worker])
        await self.store.release(holds)
        for hold in holds:
            self._drop(session, hold)
        self.wake_idle()

    def _drop(self, session: Session, hold: Hold) -> None:
        """A worker does not have this lease any more."""
        if session.holds.get(hold.id) == hold.fence:
            del session.holds[hold.id]
        live = self.lives.get(hold.id)
        if live is not None and live.fence == hold.fence:
            live.worker = ""
        session.wake.set()  # there is room for another

    def stop_job(self, live: Live) -> None:
        """Have a job stopped by whoever has it here."""
        session = self.crew.get(live.worker)
        live.worker = ""
        if session is not None:
            session.holds.pop(live.id, None)
            session.stop.add(live.id)
            session.wake.set()

    # What is on disk

    async def _save_all(self) -> None:
        while True:
            await asyncio.sleep(SHARE_SECONDS if self.store.shared else SAVE_SECONDS / 4)
            now = self.clock()
            due = [live for live in self.lives.values() if live.worker and not live.ended and self._is_due(live, now)]
            if due:
                with contextlib.suppress(Unavailable):
                    await self._save(due)

    def _is_due(self, live: Live, now: float) -> bool:
        unsaved = len(live.events) - live.kept
        patience = SHARE_SECONDS if self.store.shared and not live.readers else SAVE_SECONDS
        return unsaved >= SAVE_EVENTS or (unsaved > 0 and now - live.saved_at >= patience)

    async def _save(self, lives: Sequence[Live]) -> None:
        async with contextlib.AsyncExitStack() as locks:
            for live in sorted(lives, key=lambda each: each.id):
                await locks.enter_async_context(live.writing)
            parts = {
                Hold(live.id, live.fence): Record(
                    live.kept, len(live.events) - live.kept, protocol.pack_events(live.events[live.kept :])
                )
                for live in lives
                if len(live.events) > live.kept and not live.ended
            }
            if not parts:
                return
            found = await self.store.append(parts)
            for live in lives:
                live.saved_at = self.clock()
                known = found.get(live.id, live.kept)
                if known is None:
                    self.stop_job(live)
                else:
                    live.kept = known

    # What is lost

    async def _watch(self) -> None:
        """Lose leases whose beat has stood still for too long, by this process's own clock."""
        while True:
            await asyncio.sleep(min(1.0, self.lease_seconds / 5))
            with contextlib.suppress(Unavailable):
                beats, now = await self.store.beats(), self.clock()
                self._seen = {beat.hold: self._since(beat, now) for beat in beats}
                silent = [beat for beat in beats if now - self._seen[beat.hold][1] > self.lease_seconds]
                for worker in {beat.worker for beat in silent}:
                    await self._lose([beat for beat in silent if beat.worker == worker])

    def _since(self, beat: Beat, now: float) -> tuple[int, float]:
        known = self._seen.get(beat.hold)
        return known if known and known[0] == beat.beat else (beat.beat, now)

    async def _lose(self, beats: Sequence[Beat]) -> None:
        """Take leases from a worker, all of which it lost together."""
        if not beats:
            return
        here = [live for beat in beats if (live := self.lives.get(beat.hold.id)) and live.worker == beat.worker]
        if any(len(live.events) > live.kept for live in here):  # what a client has seen must be known to who goes on
            await self._save(here)
            holds = {beat.hold for beat in beats}
            beats = [beat for beat in await self.store.beats() if beat.hold in holds]
        dead = await self.store.lose(beats)
        self.lost, self.dead = self.lost + len(beats), self.dead + len(dead)
        log.warning(
            "leases are lost", extra={"worker": beats[0].worker if beats else "", "jobs": len(beats), "dead": len(dead)}
        )
        self.suspects |= {live.model for live in here} or {name for each in self.crew.values() for name in each.models}
        for live in here:
            self.stop_job(live)
        self.wake_idle()

    async def _tick(self) -> None:
        ticks = -1
        while True:
            with contextlib.suppress(Unavailable):
                ticks = await self.store.tick(ticks)
            await asyncio.sleep(TICK_SECONDS)


def _sum(one: Load, other: Load) -> Load:
    added = {name: getattr(one, name) + getattr(other, name) for name in vars(Load()) if name != "alive"}
    return Load(**added, alive=one.alive or other.alive)
