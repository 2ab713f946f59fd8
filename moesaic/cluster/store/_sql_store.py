"""The job store in a database: each method of ``jobs.Store`` runs one operation on the database.

``sqlite`` and ``postgres`` define how their database runs an operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, Protocol, TypeVar

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


class Database(Protocol):
    """A database that runs the operations of a job store."""

    shared: bool
    """Whether several gateways may use the database at the same time."""
    listeners: list[ChangeListener]
    """Functions that are called with the ids of changed jobs, after the commit."""

    async def run(self, operation: Operation[T], *, reads: bool = False) -> T:
        """Run an operation, wait for its commit, call the listeners with its changes, and return its value.

        Args:
            operation: function that creates the SQL program; it may be called again after a rollback.
            reads: whether the operation only reads.

        Raises:
            Unavailable: the database is closed or cannot be reached.
        """
        ...

    async def integrity(self) -> str:
        """Return "ok", or the database's description of the damage in its files."""
        ...

    async def close(self) -> None:
        """Finish the waiting operations, and close the database."""
        ...


def notify(listeners: Sequence[ChangeListener], job_ids: Sequence[str]) -> None:
    """Call each listener with the ids of changed jobs, if there are any."""
    if job_ids:
        for listener in listeners:
            listener(job_ids)


class SqlStore:
    """The ``jobs.Store`` whose jobs are in a database."""

    def __init__(self, database: Database, limits: StoreLimits) -> None:
        self.database, self._limits = database, limits

    @property
    def shared(self) -> bool:
        return self.database.shared

    async def run(self, operation: Operation[T], *, reads: bool = False) -> T:
        """Run an operation on the database; see ``Database.run``."""
        return await self.database.run(operation, reads=reads)

    def listen(self, listener: ChangeListener) -> None:
        self.database.listeners.append(listener)

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
        integrity = await self.database.integrity()
        return integrity if integrity != "ok" else await self.run(_queries.check, reads=True)

    async def close(self) -> None:
        await self.database.close()
