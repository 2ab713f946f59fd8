"""A model of a job store: dictionaries and lists in memory, and one operation after another.

The model does not decide which tenant is next. ``may_be_next`` only asserts that a choice is allowed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from moesaic.cluster.jobs import Job, Lease, LeaseStatus, LeaseToken, LogRecord, QueueDepth, StoreLimits
from moesaic.errors import Conflict, Overloaded, Unavailable


@dataclass
class ExpectedJob:
    """The expected state of a job."""

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

    def is_leased_under(self, fence: int) -> bool:
        return self.state == "leased" and self.fence == fence


@dataclass
class ExpectedKey:
    """The expected state of an idempotency key."""

    id: str
    digest: str
    ended: int | None = None


class Model:
    """A store in memory, with the same operations and results."""

    def __init__(self, limits: StoreLimits) -> None:
        self.limits = limits
        self.jobs: dict[str, ExpectedJob] = {}
        self.names: dict[tuple[str, str], ExpectedKey] = {}
        self.tick_count = 0
        self.groups = 0
        self.places = 0

    def queued(self) -> list[ExpectedJob]:
        return [expected for expected in self.jobs.values() if expected.state == "queued"]

    def submit(self, job: Job) -> str:
        name = self.names.get((job.tenant, job.idempotency_key)) if job.idempotency_key else None
        if job.id in self.jobs:
            name = ExpectedKey(job.id, self.jobs[job.id].job.digest)
        if name is not None:
            if name.digest != job.digest:
                raise Conflict("")
            return name.id
        waiting = self.queued()
        if sum(other.job.tenant == job.tenant for other in waiting) >= self.limits.queued_per_tenant:
            raise Overloaded("")
        cost = sum(other.job.cost for other in waiting) + job.cost
        if len(waiting) >= self.limits.queued or cost > self.limits.queued_cost:
            raise Unavailable("")
        self.places += 1
        self.jobs[job.id] = ExpectedJob(job, self.places, number=self.places)
        if job.idempotency_key:
            self.names[job.tenant, job.idempotency_key] = ExpectedKey(job.id, job.digest)
        return job.id

    def may_be_next(self, ids: Sequence[str], models: Sequence[str], limit: int) -> None:
        """Assert that these jobs may be leased now, in this order."""
        open_jobs = [job for job in self.queued() if not job.group and job.job.model in models]
        assert len(ids) == len(set(ids)) == min(limit, len(open_jobs))
        chosen = [self.jobs[job_id] for job_id in ids]
        assert all(job in open_jobs for job in chosen)
        priorities = sorted(job.job.priority for job in open_jobs)
        assert [job.job.priority for job in chosen] == priorities[: len(ids)]
        unchosen = [job for job in open_jobs if job not in chosen]
        for n, job in enumerate(chosen):
            flow = (job.job.tenant, job.job.model, job.job.priority)
            overtaken = [other for other in (*chosen[n + 1 :], *unchosen) if other.place < job.place]
            assert all((other.job.tenant, other.job.model, other.job.priority) != flow for other in overtaken)

    def may_be_next_suspects(self, ids: Sequence[str], models: Sequence[str], limit: int) -> None:
        """Assert that these suspects may be leased now."""
        open_jobs = [job for job in self.queued() if job.group and job.job.model in models]
        group = [job for job in open_jobs if job.group == min(job.group for job in open_jobs)]
        assert len(ids) == len(set(ids)) == min(limit, len(group))
        assert all(self.jobs[job_id] in group for job_id in ids)

    def lease(self, worker: str, leases: Sequence[Lease]) -> None:
        for lease in leases:
            expected = self.jobs[lease.job.id]
            assert lease.job == expected.job
            assert lease.fence > expected.fence, "a fence strictly grows"
            assert list(lease.log) == expected.log
            expected.state, expected.fence, expected.worker = "leased", lease.fence, worker
            expected.heartbeat, expected.attempts = expected.heartbeat + 1, expected.attempts + 1

    def renew(self, lease_tokens: Sequence[LeaseToken]) -> dict[str, str]:
        states = {}
        for lease_token in lease_tokens:
            expected = self.jobs.get(lease_token.id)
            if expected is not None and expected.is_leased_under(lease_token.fence):
                states[lease_token.id] = "ok"
                expected.heartbeat += 1
            elif expected is not None and expected.state == "cancelled" and expected.fence == lease_token.fence:
                states[lease_token.id] = "cancelled"
            else:
                states[lease_token.id] = "fenced"
        return states

    def append(self, lease_token: LeaseToken, record: LogRecord) -> int | None:
        expected = self.jobs.get(lease_token.id)
        if expected is None or not expected.is_leased_under(lease_token.fence):
            return None
        expected.heartbeat += 1
        if record.start == expected.logged:
            expected.log.append(record)
        return expected.logged

    def finish(
        self, lease_token: LeaseToken, state: Literal["done", "failed"], result: bytes, last: LogRecord | None
    ) -> bool:
        expected = self.jobs.get(lease_token.id)
        if expected is None or not expected.is_leased_under(lease_token.fence):
            return expected is not None and expected.fence == lease_token.fence and expected.state in ("done", "failed")
        if last is not None and last.start + last.count > expected.logged:
            if last.start != expected.logged:
                raise ValueError
            expected.log.append(last)
        expected.result = result
        self._end(expected, state)
        return True

    def _end(self, expected: ExpectedJob, state: str) -> None:
        expected.state, expected.ended, expected.ends = state, self.tick_count, expected.ends + 1
        assert expected.ends == 1, "a job ends once"
        name = self.names.get((expected.job.tenant, expected.job.idempotency_key))
        if name is not None and name.id == expected.job.id:
            name.ended = self.tick_count

    def _queue(self, expected: ExpectedJob, group: int) -> None:
        expected.state, expected.fence, expected.group = "queued", expected.fence + 1, group

    def release(self, lease_tokens: Sequence[LeaseToken]) -> None:
        for lease_token in lease_tokens:
            expected = self.jobs.get(lease_token.id)
            if expected is not None and expected.is_leased_under(lease_token.fence):
                self._queue(expected, expected.group)

    def expire(self, active_leases: Sequence[LeaseStatus]) -> list[str]:
        lost = [
            expected
            for job_id, expected in self.jobs.items()
            if any(
                status.lease_token.id == job_id
                and expected.is_leased_under(status.lease_token.fence)
                and expected.heartbeat == status.heartbeat
                for status in active_leases
            )
        ]
        for expected in lost:
            expected.crashes += 1
        if len(lost) == 1 and lost[0].crashes >= self.limits.crashes:
            lost[0].fence += 1
            self._end(lost[0], "dead")
            return [lost[0].job.id]
        for n, expected in enumerate(lost):
            self._queue(expected, self.groups + (1 if 2 * n < len(lost) else 2))
        self.groups += 2 if lost else 0
        return []

    def forgive_crash(self, lease_tokens: Sequence[LeaseToken]) -> None:
        for job_id, fence in {lease_token.id: lease_token.fence for lease_token in lease_tokens}.items():
            expected = self.jobs.get(job_id)
            if expected and expected.state in ("queued", "leased") and expected.crashes and expected.fence > fence:
                expected.crashes -= 1
                expected.group = expected.group if expected.crashes else 0

    def cancel(self, job_id: str) -> str | None:
        expected = self.jobs.get(job_id)
        if expected is None:
            return None
        if expected.state in ("queued", "leased"):
            self._end(expected, "cancelled")
        return expected.state

    def revive(self, job_id: str) -> bool:
        expected = self.jobs.get(job_id)
        if expected is None or expected.state != "dead":
            return False
        self.places += 1
        expected.state, expected.crashes, expected.group, expected.place = "queued", 0, 0, self.places
        expected.ended, expected.ends = None, 0
        name = self.names.get((expected.job.tenant, expected.job.idempotency_key))
        if name is not None and name.id == job_id:
            name.ended = None
        return True

    def tick(self) -> int:
        self.tick_count += 1
        oldest_tick = self.tick_count - self.limits.idempotency_ticks
        self.names = {key: name for key, name in self.names.items() if name.ended is None or name.ended >= oldest_tick}
        ended = sorted(
            (expected.ended, expected.number, job_id)
            for job_id, expected in self.jobs.items()
            if expected.ended is not None
        )
        recent = [entry for entry in ended if entry[0] >= self.tick_count - self.limits.retention_ticks]
        for entry in set(ended) - set(recent[max(len(recent) - self.limits.max_ended, 0) :]):
            del self.jobs[entry[2]]
        return self.tick_count

    def depths(self) -> dict[str, QueueDepth]:
        queue_depths = {}
        live = [job for job in self.jobs.values() if job.state in ("queued", "leased")]
        for model in {job.job.model for job in live}:
            jobs = [job for job in live if job.job.model == model]
            states = Counter(job.state for job in jobs)
            suspects = sum(job.state == "queued" and job.group > 0 for job in jobs)
            cost = sum(job.job.cost for job in jobs if job.state == "queued")
            queue_depths[model] = QueueDepth(states["queued"], states["leased"], suspects, cost)
        return queue_depths
