"""Workers that are here, and the models that they offer.

Knows sessions and cards. Does not know jobs, stores or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from moesaic.backend import ModelInfo, ModelStats
from moesaic.cluster.desk import Recruit
from moesaic.errors import NotFound

log = logging.getLogger("moesaic.cluster")


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
    load: Mapping[str, ModelStats] = field(default_factory=dict)
    apart: bool = False
    """Whether what it has are suspects, and nothing else is to be given to it."""
    since: float = field(default_factory=time.time)
    heard: float = 0.0
    stepped: float = 0.0
    """When its engine was last seen to make progress, or had nothing to do."""
    stalled: bool = False
    """Whether its engine stands still: it gets nothing more until it moves."""
    leaves: bool = False
    """Whether it is about to go, and gets nothing more."""
    drained: bool = False
    """Whether administrators want it to get nothing more."""

    def see(self, load: Mapping[str, ModelStats], works: bool, now: float) -> None:
        """Take in what it says of its engine; ``works``: whether it has anything to do."""
        moves = any(load[name].steps != self.load.get(name, ModelStats()).steps for name in load)
        busy = any(each.running + each.waiting for each in load.values())
        if moves or not busy or not works:
            self.stepped = now
        self.stalled = self.stalled and busy and not moves
        self.load = load


class Crew:
    """All of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.crew: dict[str, Session] = {}
        self.known: dict[str, ModelInfo] = {}
        """Every model that a worker has offered, or that was named at the start."""
        self._past: dict[str, ModelStats] = {}  # what workers that have gone had counted

    def join(self, recruit: Recruit) -> tuple[Session, Session | None]:
        """Let a worker in; return its session, and the one that it replaces."""
        before, now = self.crew.get(recruit.name), self.clock()
        session = Session(recruit, tuple(card.name for card in recruit.cards), heard=now, stepped=now)
        if before is not None and before.recruit.run == recruit.run != "":
            session.apart, session.stalled = before.apart, before.stalled
            session.stop, session.load = before.stop, before.load
            before.wake.set()
        elif before is not None:
            self._leave(before)
        self.crew[recruit.name] = session
        for card in recruit.cards:
            self.known[card.name] = replace(card, state="loaded")
        return session, before

    def forget(self, worker: str) -> None:
        """It is not here any more."""
        session = self.crew.pop(worker, None)
        if session is not None:
            log.info("a worker has gone", extra={"worker": worker})
            self._leave(session)

    def _leave(self, session: Session) -> None:
        self.crew.pop(session.recruit.name, None)
        session.wake.set()
        for name, load in session.load.items():
            counted = replace(load, running=0, waiting=0, blocks=0, free_blocks=0, alive=True)
            self._past[name] = _sum(self._past.get(name, ModelStats()), counted)
        there = {name for each in self.crew.values() for name in each.models}
        for name in set(session.models) - there:
            self.known[name] = replace(self.known[name], state="unloaded")

    def session(self, worker: str) -> Session:
        """Return a worker's session; it has just been heard of.

        Raises:
            NotFound: it is not here.
        """
        session = self.crew.get(worker)
        if session is None:
            raise NotFound(f"there is no worker {worker!r:.80} here: enlist first")
        session.heard = self.clock()
        return session

    def wake_idle(self, model: str = "") -> None:
        """There is something new to do."""
        for session in self.crew.values():
            if not model or model in session.models:
                session.wake.set()

    def slots(self, model: str = "") -> int:
        """Return how many jobs can run at once."""
        return sum(each.recruit.slots for each in self.crew.values() if not model or model in each.models)

    def loads(self) -> Mapping[str, ModelStats]:
        """Return how busy the models are, all workers together."""
        out = dict(self._past)
        for session in self.crew.values():
            for name in session.models:
                load = session.load.get(name, ModelStats())
                out[name] = _sum(out[name], load) if name in out else load
        return out


def _sum(one: ModelStats, other: ModelStats) -> ModelStats:
    added = {name: getattr(one, name) + getattr(other, name) for name in vars(ModelStats()) if name != "alive"}
    return ModelStats(**added, alive=one.alive or other.alive)
