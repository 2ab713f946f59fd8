"""What is the same in every store: the methods of ``jobs.Store``, each an operation that a database runs.

Knows which operation is behind which method, and who wants news. Does not know how operations are run.
"""

from __future__ import annotations

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


class BaseStore:
    """A ``jobs.Store``, less ``run`` and ``close``."""

    def __init__(self, bounds: StoreLimits) -> None:
        self._bounds = bounds
        self._listeners: list[ChangeListener] = []

    async def run(self, operation: Operation[T], *, reads: bool = False) -> T:
        """Run an operation, wait until it is committed, and tell its news.

        Args:
            operation: begins it; may be begun again where all of it was rolled back.
            reads: it writes nothing.
        """
        raise NotImplementedError

    def _tell(self, ids: Sequence[str]) -> None:
        if ids:
            for news in self._listeners:
                news(ids)

    def listen(self, news: ChangeListener) -> None:
        self._listeners.append(news)

    async def submit(self, job: Job) -> str:
        return await self.run(partial(_operations.submit, job, self._bounds))

    async def lease(self, worker: str, models: Sequence[str], most: int, *, suspects: bool = False) -> list[Lease]:
        return await self.run(partial(_operations.lease, worker, models, most, suspects))

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

    async def expire(self, active_leases: Sequence[LeaseStatus]) -> list[str]:
        return await self.run(partial(_operations.expire, active_leases, self._bounds))

    async def forgive_crash(self, leases: Sequence[LeaseToken]) -> None:
        await self.run(partial(_operations.forgive_crash, leases))

    async def cancel(self, id: str) -> JobState | None:
        return await self.run(partial(_operations.cancel, id))

    async def snapshot(self, id: str) -> JobSnapshot | None:
        return await self.run(partial(_queries.snapshot, id), reads=True)

    async def log(self, id: str, start: int = 0) -> list[LogRecord]:
        return await self.run(partial(_queries.log, id, start), reads=True)

    async def active_leases(self) -> list[LeaseStatus]:
        return await self.run(_queries.active_leases, reads=True)

    async def depths(self) -> Mapping[str, QueueDepth]:
        return await self.run(_queries.depths, reads=True)

    async def list_jobs(self, state: JobState, most: int = 100) -> list[JobSnapshot]:
        return await self.run(partial(_queries.list_jobs, state, most), reads=True)

    async def revive(self, id: str) -> bool:
        return await self.run(partial(_operations.revive, id))

    async def tick(self, seen: int) -> int:
        now = await self.run(partial(_queries.tick, seen, self._bounds))
        while now == seen + 1 and await self.run(partial(_queries.drop, now, self._bounds)):
            pass
        return now

    async def check(self) -> str:
        return await self.run(_queries.check, reads=True)
