"""What a store does, in the plainest way: dictionaries and lists, one operation after another, nothing on disk.

Who is next among tenants is left open: the model only says who may be (``may_be_next``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from moesaic.cluster.jobs import Job, Lease, LeaseStatus, LeaseToken, LogRecord, QueueDepth, StoreLimits
from moesaic.errors import Conflict, Overloaded, Unavailable


@dataclass
class Known:
    """A job as it should be."""

    job: Job
    place: int
    number: int
    state: str = "queued"
    fence: int = 0
    heartbeat: int = 0
    worker: str = ""
    attempts: int = 0
    crashes: int = 0
    group: int = 0
    log: list[LogRecord] = field(default_factory=list)
    result: bytes = b""
    ended: int | None = None
    ends: int = 0

    @property
    def logged(self) -> int:
        return sum(record.count for record in self.log)

    def holds(self, fence: int) -> bool:
        return self.state == "leased" and self.fence == fence


@dataclass
class Name:
    id: str
    digest: str
    ended: int | None = None


class Model:
    """The store's twin."""

    def __init__(self, bounds: StoreLimits) -> None:
        self.bounds = bounds
        self.jobs: dict[str, Known] = {}
        self.names: dict[tuple[str, str], Name] = {}
        self.tick_count = 0
        self.groups = 0
        self.places = 0

    def queued(self) -> list[Known]:
        return [known for known in self.jobs.values() if known.state == "queued"]

    def submit(self, job: Job) -> str:
        name = self.names.get((job.tenant, job.idempotency_key)) if job.idempotency_key else None
        if job.id in self.jobs:
            name = Name(job.id, self.jobs[job.id].job.digest)
        if name is not None:
            if name.digest != job.digest:
                raise Conflict("")
            return name.id
        waiting = self.queued()
        if sum(each.job.tenant == job.tenant for each in waiting) >= self.bounds.queued_per_tenant:
            raise Overloaded("")
        cost = sum(each.job.cost for each in waiting) + job.cost
        if len(waiting) >= self.bounds.queued or cost > self.bounds.queued_cost:
            raise Unavailable("")
        self.places += 1
        self.jobs[job.id] = Known(job, self.places, number=self.places)
        if job.idempotency_key:
            self.names[job.tenant, job.idempotency_key] = Name(job.id, job.digest)
        return job.id

    def may_be_next(self, ids: Sequence[str], models: Sequence[str], most: int) -> None:
        """Assert that these may be leased now, in this order."""
        open_jobs = [each for each in self.queued() if not each.group and each.job.model in models]
        assert len(ids) == len(set(ids)) == min(most, len(open_jobs))
        chosen = [self.jobs[job_id] for job_id in ids]
        assert all(each in open_jobs for each in chosen)
        priorities = sorted(each.job.priority for each in open_jobs)
        assert [each.job.priority for each in chosen] == priorities[: len(ids)]
        left = [each for each in open_jobs if each not in chosen]
        for n, each in enumerate(chosen):
            flow = (each.job.tenant, each.job.model, each.job.priority)
            behind = [other for other in (*chosen[n + 1 :], *left) if other.place < each.place]
            assert all((other.job.tenant, other.job.model, other.job.priority) != flow for other in behind)

    def may_be_next_suspects(self, ids: Sequence[str], models: Sequence[str], most: int) -> None:
        """The same of suspects."""
        open_jobs = [each for each in self.queued() if each.group and each.job.model in models]
        group = [each for each in open_jobs if each.group == min(each.group for each in open_jobs)]
        assert len(ids) == len(set(ids)) == min(most, len(group))
        assert all(self.jobs[job_id] in group for job_id in ids)

    def lease(self, worker: str, leases: Sequence[Lease]) -> None:
        for lease in leases:
            known = self.jobs[lease.job.id]
            assert lease.job == known.job
            assert lease.fence > known.fence, "a fence strictly grows"
            assert list(lease.log) == known.log
            known.state, known.fence, known.worker = "leased", lease.fence, worker
            known.heartbeat, known.attempts = known.heartbeat + 1, known.attempts + 1

    def renew(self, holds: Sequence[LeaseToken]) -> dict[str, str]:
        held = {}
        for hold in holds:
            known = self.jobs.get(hold.id)
            if known is not None and known.holds(hold.fence):
                held[hold.id] = "ok"
                known.heartbeat += 1
            elif known is not None and known.state == "cancelled" and known.fence == hold.fence:
                held[hold.id] = "cancelled"
            else:
                held[hold.id] = "fenced"
        return held

    def append(self, hold: LeaseToken, record: LogRecord) -> int | None:
        known = self.jobs.get(hold.id)
        if known is None or not known.holds(hold.fence):
            return None
        known.heartbeat += 1
        if record.start == known.logged:
            known.log.append(record)
        return known.logged

    def finish(self, hold: LeaseToken, state: Literal["done", "failed"], result: bytes, last: LogRecord | None) -> bool:
        known = self.jobs.get(hold.id)
        if known is None or not known.holds(hold.fence):
            return known is not None and known.fence == hold.fence and known.state in ("done", "failed")
        if last is not None and last.start + last.count > known.logged:
            if last.start != known.logged:
                raise ValueError
            known.log.append(last)
        known.result = result
        self._end(known, state)
        return True

    def _end(self, known: Known, state: str) -> None:
        known.state, known.ended, known.ends = state, self.tick_count, known.ends + 1
        assert known.ends == 1, "a job ends once"
        name = self.names.get((known.job.tenant, known.job.idempotency_key))
        if name is not None and name.id == known.job.id:
            name.ended = self.tick_count

    def _queue(self, known: Known, group: int) -> None:
        known.state, known.fence, known.group = "queued", known.fence + 1, group

    def release(self, holds: Sequence[LeaseToken]) -> None:
        for hold in holds:
            known = self.jobs.get(hold.id)
            if known is not None and known.holds(hold.fence):
                self._queue(known, known.group)

    def expire(self, active_leases: Sequence[LeaseStatus]) -> list[str]:
        lost = [
            known
            for job_id, known in self.jobs.items()
            if any(
                each.lease_token.id == job_id
                and known.holds(each.lease_token.fence)
                and known.heartbeat == each.heartbeat
                for each in active_leases
            )
        ]
        for known in lost:
            known.crashes += 1
        if len(lost) == 1 and lost[0].crashes >= self.bounds.crashes:
            lost[0].fence += 1
            self._end(lost[0], "dead")
            return [lost[0].job.id]
        for n, known in enumerate(lost):
            self._queue(known, self.groups + (1 if 2 * n < len(lost) else 2))
        self.groups += 2 if lost else 0
        return []

    def forgive_crash(self, holds: Sequence[LeaseToken]) -> None:
        for job_id, fence in {hold.id: hold.fence for hold in holds}.items():
            known = self.jobs.get(job_id)
            if known and known.state in ("queued", "leased") and known.crashes and known.fence > fence:
                known.crashes -= 1
                known.group = known.group if known.crashes else 0

    def cancel(self, job_id: str) -> str | None:
        known = self.jobs.get(job_id)
        if known is None:
            return None
        if known.state in ("queued", "leased"):
            self._end(known, "cancelled")
        return known.state

    def revive(self, job_id: str) -> bool:
        known = self.jobs.get(job_id)
        if known is None or known.state != "dead":
            return False
        self.places += 1
        known.state, known.crashes, known.group, known.place = "queued", 0, 0, self.places
        known.ended, known.ends = None, 0
        name = self.names.get((known.job.tenant, known.job.idempotency_key))
        if name is not None and name.id == job_id:
            name.ended = None
        return True

    def tick(self) -> int:
        self.tick_count += 1
        old = self.tick_count - self.bounds.idempotency_ticks
        self.names = {key: name for key, name in self.names.items() if name.ended is None or name.ended >= old}
        ended = sorted(
            (known.ended, known.number, job_id) for job_id, known in self.jobs.items() if known.ended is not None
        )
        young = [each for each in ended if each[0] >= self.tick_count - self.bounds.retention_ticks]
        for each in set(ended) - set(young[max(len(young) - self.bounds.max_ended, 0) :]):
            del self.jobs[each[2]]
        return self.tick_count

    def depths(self) -> dict[str, QueueDepth]:
        found = {}
        live = [each for each in self.jobs.values() if each.state in ("queued", "leased")]
        for model in {each.job.model for each in live}:
            here = [each for each in live if each.job.model == model]
            states = Counter(each.state for each in here)
            suspects = sum(each.state == "queued" and each.group > 0 for each in here)
            cost = sum(each.job.cost for each in here if each.state == "queued")
            found[model] = QueueDepth(states["queued"], states["leased"], suspects, cost)
        return found
