"""Base class of all stores: each method of ``jobs.Store`` runs one operation on the store's database.

The base class does not know how a database runs an operation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, TypeVar

from moesaic.cluster.jobs import (
    ChangeListener,
    Job,
    JobSnapshot,
    JobState,
    Lease,
    LeaseStatus,
    LeaseToken,
    LogRecord,
    QueueDepth,
    RenewState,
    StoreLimits,
)
from moesaic.cluster.store import _operations, _queries
from moesaic.cluster.store._program import Operation

T = TypeVar("T")


class BaseStore(ABC):
    """Implementation of ``jobs.Store`` without ``run`` and ``close``."""

    def __init__(self, limits: StoreLimits) -> None:
        self._limits = limits
        self._listeners: list[ChangeListener] = []

    @abstractmethod
    async def run(self, operation: Operation[T], *, reads: bool = False) -> T:
        """Run an operation, wait until it is committed, and notify the listeners of its changes.

        Args:
            operation: creates the operation's program; it may be called again after a rollback.
            reads: whether the operation only reads.
        """

    def _notify(self, job_ids: Sequence[str]) -> None:
        if job_ids:
            for listener in self._listeners:
                listener(job_ids)

    def listen(self, listener: ChangeListener) -> None:
        self._listeners.append(listener)

    async def submit(self, job: Job) -> str:
        return await self.run(partial(_operations.submit, job, self._limits))

    async def lease(self, worker: str, models: Sequence[str], limit: int, *, suspects: bool = False) -> list[Lease]:
        return await self.run(partial(_operations.lease, worker, models, limit, suspects))

    async def renew(self, leases: Sequence[LeaseToken]) -> Mapping[str, RenewState]:
        return await self.run(partial(_operations.renew, leases))

    async def append(self, parts: Mapping[LeaseToken, LogRecord]) -> Mapping[str, int | None]:
        return await self.run(partial(_operations.append, parts))

    async def finish(
        self, lease_token: LeaseToken, state: Literal["done", "failed"], result: bytes, last: LogRecord | None = None
    ) -> bool:
        return await self.run(partial(_operations.finish, lease_token, state, result, last))

    async def release(self, leases: Sequence[LeaseToken]) -> None:
        await self.run(partial(_operations.release, leases))

    async def expire(self, statuses: Sequence[LeaseStatus]) -> list[str]:
        return await self.run(partial(_operations.expire, statuses, self._limits))

    async def forgive_crash(self, leases: Sequence[LeaseToken]) -> None:
        await self.run(partial(_operations.forgive_crash, leases))

    async def cancel(self, job_id: str) -> JobState | None:
        return await self.run(partial(_operations.cancel, job_id))

    async def snapshot(self, job_id: str) -> JobSnapshot | None:
        return await self.run(partial(_queries.snapshot, job_id), reads=True)

    async def log(self, job_id: str, start: int = 0) -> list[LogRecord]:
        return await self.run(partial(_queries.log, job_id, start), reads=True)

    async def active_leases(self) -> list[LeaseStatus]:
        return await self.run(_queries.active_leases, reads=True)

    async def depths(self) -> Mapping[str, QueueDepth]:
        return await self.run(_queries.depths, reads=True)

    async def list_jobs(self, state: JobState, limit: int = 100) -> list[JobSnapshot]:
        return await self.run(partial(_queries.list_jobs, state, limit), reads=True)

    async def revive(self, job_id: str) -> bool:
        return await self.run(partial(_operations.revive, job_id))

    async def tick(self, seen: int) -> int:
        now = await self.run(partial(_queries.tick, seen, self._limits))
        while now == seen + 1 and await self.run(partial(_queries.drop, now, self._limits)):
            pass
        return now

    async def check(self) -> str:
        return await self.run(_queries.check, reads=True)
