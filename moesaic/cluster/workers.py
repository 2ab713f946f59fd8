"""Registry of connected workers: their sessions, models, statistics, and drain and ban state.

This module does not depend on jobs, on a store or on HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from moesaic.backend import ModelInfo, ModelStats
from moesaic.cluster.jobs import LeaseToken
from moesaic.cluster.protocols import Query, WorkerInfo
from moesaic.errors import Forbidden, MoesaicError, NotFound, Unavailable

log = logging.getLogger("moesaic.cluster")


@dataclass(eq=False)
class PendingQuery:
    """A query that a worker has not answered yet, and the future for its answer."""

    query: Query
    answer: asyncio.Future[Any]
    delivered: bool = False


@dataclass(eq=False)
class WorkerSession:
    """The state of a connected worker."""

    info: WorkerInfo
    models: tuple[str, ...]
    leases: dict[str, int] = field(default_factory=dict)
    """The fences of the worker's leases, by job id."""
    cancelled: set[str] = field(default_factory=set)
    """Ids of jobs that the worker must be told to stop."""
    queries: dict[str, PendingQuery] = field(default_factory=dict)
    """Queries to the worker that it has not answered, by id."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the worker's long poll may have something to return."""
    stats: Mapping[str, ModelStats] = field(default_factory=dict)
    quarantined: bool = False
    """Whether the worker runs suspects (jobs that crashed with a worker); it then gets no other jobs."""
    connected_at: float = field(default_factory=time.time)
    """Time of the registration, in seconds since the epoch."""
    last_seen: float = 0.0
    """Time of the worker's last request, by the registry's clock."""
    last_step: float = 0.0
    """Time at which the worker's engine last made a step or had no work, by the registry's clock."""
    stalled: bool = False
    """Whether the worker's engine has work but makes no steps. It gets no jobs until it makes steps again."""
    leaving: bool = False
    """Whether the worker is about to unregister; it gets no jobs."""
    drained: bool = False
    """Whether an administrator has drained the worker; it gets no jobs."""

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def free_slots(self) -> int:
        return self.info.slots - len(self.leases)

    @property
    def lease_tokens(self) -> list[LeaseToken]:
        return [LeaseToken(job_id, fence) for job_id, fence in self.leases.items()]

    def update_stats(self, stats: Mapping[str, ModelStats], has_jobs: bool, now: float) -> None:
        """Store new engine statistics and note whether the engine makes progress."""
        moved = any(stats[name].steps != self.stats.get(name, ModelStats()).steps for name in stats)
        busy = any(each.running + each.waiting for each in stats.values())
        if moved or not busy or not has_jobs:
            self.last_step = now
        self.stalled = self.stalled and busy and not moved
        self.stats = stats

    def remove_lease(self, lease_token: LeaseToken) -> None:
        """Forget a lease that the worker no longer has, and wake its long poll, because a slot may be free."""
        if self.leases.get(lease_token.id) == lease_token.fence:
            del self.leases[lease_token.id]
        self.wake.set()

    def take_cancelled(self) -> tuple[str, ...]:
        """Return the ids of jobs that the worker must stop, and forget them."""
        cancelled, self.cancelled = tuple(self.cancelled), set()
        return cancelled

    def take_queries(self) -> tuple[Query, ...]:
        """Return the queries that the worker has not received yet, and mark them as delivered."""
        pending = [item for item in self.queries.values() if not item.delivered]
        for item in pending:
            item.delivered = True
        return tuple(item.query for item in pending)

    def answer_query(self, query_id: str, outcome: Any, error: MoesaicError | None) -> None:
        """Pass the outcome or the error of a query on to its caller, if the caller still waits."""
        pending = self.queries.pop(query_id, None)
        if pending is None or pending.answer.done():
            return
        if error is not None:
            pending.answer.set_exception(error)
        else:
            pending.answer.set_result(outcome)

    def fail_queries(self) -> None:
        """Fail all unanswered queries with ``Unavailable``, because the worker has left."""
        for query_id in list(self.queries):
            self.answer_query(query_id, None, Unavailable("the worker was lost: try again"))


class WorkerRegistry:
    """Registry of the workers that are connected to a gateway."""

    def __init__(self, models: Sequence[str] = (), clock: Callable[[], float] = time.monotonic) -> None:
        """Create an empty registry.

        Args:
            models: names of models that are known before a worker offers them.
            clock: monotonic clock, in seconds.
        """
        self.clock = clock
        self.sessions: dict[str, WorkerSession] = {}
        """The connected workers, by name."""
        self.models: dict[str, ModelInfo] = {}
        """Every model that a worker has offered, that a job names, or that was named at the start; by name."""
        self.drained: set[str] = set()
        """Names of drained workers. The state survives reconnects and ends with this process."""
        self.banned: set[str] = set()
        """Names of banned workers. The state survives reconnects and ends with this process."""
        self.registered = asyncio.Event()
        """Set and cleared at once when a worker registers, to wake those that wait for it."""
        self._past: dict[str, ModelStats] = {}  # counters of workers that have left
        self.add_models(models)

    def add_models(self, names: Iterable[str]) -> None:
        """Add models by name that no worker offers yet; known models stay as they are."""
        for name in names:
            self.models.setdefault(name, ModelInfo(name, state="unloaded"))

    def find_model(self, name: str) -> ModelInfo:
        """Return the model with this name or alias; "" means the first model.

        Raises:
            Unavailable: no model is known yet. NotFound: there is no such model.
        """
        if not self.models:
            raise Unavailable("no worker is connected: start one with `moesaic worker`, or try again later")
        if not name:
            return next(iter(self.models.values()))
        for model in self.models.values():
            if name == model.name or name in model.aliases:
                return model
        raise NotFound(f"unknown model {name!r:.120}; available models: {', '.join(list(self.models)[:20])}")

    def register(self, info: WorkerInfo) -> tuple[WorkerSession, WorkerSession | None]:
        """Add a worker; return its session, and the session of that name which it replaces, or None.

        Raises:
            Forbidden: the worker is banned.
        """
        if info.name in self.banned:
            raise Forbidden("this worker was banned: `moesaic admin resume` lets it register again")
        previous, now = self.sessions.get(info.name), self.clock()
        session = WorkerSession(info, tuple(model.name for model in info.models), last_seen=now, last_step=now)
        session.drained = info.name in self.drained
        if previous is not None and is_same_instance(previous, session):
            session.quarantined, session.stalled = previous.quarantined, previous.stalled
            session.cancelled, session.stats, session.queries = previous.cancelled, previous.stats, previous.queries
            for pending in session.queries.values():
                pending.delivered = False
            previous.wake.set()
        elif previous is not None:
            self._remove(previous)
        self.sessions[info.name] = session
        for model in info.models:
            self.models[model.name] = replace(model, state="loaded")
        self.registered.set()
        self.registered.clear()
        return session, previous

    def unregister(self, name: str) -> None:
        """Remove a worker, if it is connected."""
        session = self.sessions.get(name)
        if session is not None:
            log.info("worker unregistered", extra={"worker": name})
            self._remove(session)

    def _remove(self, session: WorkerSession) -> None:
        self.sessions.pop(session.name, None)
        session.wake.set()
        session.fail_queries()
        for name, stats in session.stats.items():
            counters = replace(stats, running=0, waiting=0, blocks=0, free_blocks=0, alive=True)
            self._past[name] = _sum(self._past.get(name, ModelStats()), counters)
        offered = {name for other in self.sessions.values() for name in other.models}
        for name in set(session.models) - offered:
            self.models[name] = replace(self.models[name], state="unloaded")

    def session(self, name: str) -> WorkerSession:
        """Return the session of a worker that has just sent a request, and record the time of the request.

        Raises:
            NotFound: the worker is not registered.
        """
        session = self.sessions.get(name)
        if session is None:
            raise NotFound(f"the worker {name!r:.80} is not registered: register first")
        session.last_seen = self.clock()
        return session

    def offering(self, model: str) -> list[WorkerSession]:
        """Return the workers that offer a model; "" means every worker."""
        return [session for session in self.sessions.values() if not model or model in session.models]

    def wake(self, model: str = "") -> None:
        """Wake the long polls of all workers that offer a model; "" means every worker."""
        for session in self.offering(model):
            session.wake.set()

    def cancel(self, name: str, job_id: str) -> None:
        """Tell a worker, if it is connected, to stop a job, and forget the job's lease."""
        session = self.sessions.get(name)
        if session is not None:
            session.leases.pop(job_id, None)
            session.cancelled.add(job_id)
            session.wake.set()

    def slots(self, model: str = "") -> int:
        """Return the number of jobs of a model that workers can run at the same time; "" means of all models."""
        return sum(session.info.slots for session in self.offering(model))

    def stats(self) -> Mapping[str, ModelStats]:
        """Return the statistics of each model, summed over workers. Counters include workers that have left."""
        totals = dict(self._past)
        for session in self.sessions.values():
            for name in session.models:
                stats = session.stats.get(name, ModelStats())
                totals[name] = _sum(totals[name], stats) if name in totals else stats
        return totals

    def drain(self, name: str) -> None:
        """Give a worker no further jobs; it finishes those that it has.

        Raises:
            NotFound: there is no such worker.
        """
        self._check_known(name)
        self.drained.add(name)
        self._mark_drained(name)
        log.info("worker drained", extra={"worker": name})

    def resume(self, name: str) -> None:
        """Lift the drain and the ban of a worker.

        Raises:
            NotFound: no worker of that name is connected, drained or banned.
        """
        self._check_known(name)
        self.drained.discard(name)
        self.banned.discard(name)
        self._mark_drained(name)
        log.info("worker resumed", extra={"worker": name})

    def ban(self, name: str) -> None:
        """Refuse a worker's next registration, and give it no further jobs.

        Raises:
            NotFound: there is no such worker.
        """
        self._check_known(name)
        self.banned.add(name)
        session = self.sessions.get(name)
        if session is not None:
            session.drained = True
        log.info("worker banned", extra={"worker": name})

    def _check_known(self, name: str) -> None:
        if name not in self.sessions and name not in self.drained | self.banned:
            raise NotFound(f"there is no worker {name!r:.140}: `moesaic admin workers` lists the workers")

    def _mark_drained(self, name: str) -> None:
        session = self.sessions.get(name)
        if session is not None:
            session.drained = name in self.drained
            session.wake.set()


def is_same_instance(one: WorkerSession, other: WorkerSession) -> bool:
    """Return whether two sessions belong to the same process, by its random id."""
    return one.info.instance == other.info.instance != ""


def _sum(one: ModelStats, other: ModelStats) -> ModelStats:
    names = (item.name for item in fields(ModelStats) if item.name != "alive")
    counters = {name: getattr(one, name) + getattr(other, name) for name in names}
    return ModelStats(**counters, alive=one.alive or other.alive)
