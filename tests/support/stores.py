"""Locations of job stores, and stores whose methods are called without ``await``."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from moesaic.cluster.jobs import Job, Lease, LeaseStatus, LeaseToken, Store, StoreLimits
from moesaic.cluster.store import open_store

DEFAULT_LIMITS = StoreLimits()


class SyncStore:
    """A store whose methods block until they are done."""

    def __init__(self, loop: asyncio.AbstractEventLoop, store: Store) -> None:
        self.loop = loop
        self.store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.store, name)
        if not inspect.iscoroutinefunction(method):
            return method
        return lambda *values, **named: self.loop.run_until_complete(method(*values, **named))

    def all(self, *waiting: Awaitable[Any]) -> list[Any]:
        """Await several calls of ``store`` at once; errors are returned in their places."""

        async def gather() -> list[Any]:
            return await asyncio.gather(*waiting, return_exceptions=True)

        return self.loop.run_until_complete(gather())

    def lease_ids(
        self, limit: int = 1, worker: str = "w", models: Sequence[str] = ("m",), suspects: bool = False
    ) -> list[str]:
        """Lease jobs and return their ids."""
        return [lease.job.id for lease in self.lease(worker, models, limit, suspects=suspects)]

    def statuses_of(self, *ids: str) -> list[LeaseStatus]:
        return [status for status in self.active_leases() if status.lease_token.id in ids]


class Location(Protocol):
    """A location of a store, which can be opened several times."""

    name: str

    def open(self, limits: StoreLimits = ...) -> SyncStore: ...

    def close(self) -> None:
        """Close all stores that were opened, and remove the location."""


class BaseLocation:
    """Opens stores at one address, and closes them at the end."""

    name = ""

    def __init__(self, where: str) -> None:
        self.where = where
        self.loop = asyncio.new_event_loop()
        self._open: list[SyncStore] = []

    def open(self, limits: StoreLimits = DEFAULT_LIMITS) -> SyncStore:
        store = SyncStore(self.loop, self.loop.run_until_complete(open_store(self.where, limits)))
        self._open.append(store)
        return store

    def close(self) -> None:
        for store in self._open:
            store.close()
        self.loop.close()


class SQLiteFile(BaseLocation):
    """A SQLite file."""

    name = "sqlite"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder / "jobs.db"))


def token_of(lease: Lease) -> LeaseToken:
    return LeaseToken(lease.job.id, lease.fence)


def job(job_id: str, **changes: Any) -> Job:
    return Job(**{"id": job_id, "model": "m", "body": f"body of {job_id}".encode(), **changes})
