"""Where the tests keep jobs, and stores that are used without ``await``."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from moesaic.cluster.jobs import Job, Lease, LeaseStatus, LeaseToken, Store, StoreLimits
from moesaic.cluster.store import open_store

USUAL = StoreLimits()


class Sync:
    """A store whose methods wait by themselves."""

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

    def take(
        self, most: int = 1, worker: str = "w", models: Sequence[str] = ("m",), suspects: bool = False
    ) -> list[str]:
        """Lease, and return the ids."""
        return [each.job.id for each in self.lease(worker, models, most, suspects=suspects)]

    def beats_of(self, *ids: str) -> list[LeaseStatus]:
        return [beat for beat in self.active_leases() if beat.lease_token.id in ids]


class Place(Protocol):
    """Where a store is kept: it can be opened again and again."""

    name: str

    def open(self, bounds: StoreLimits = ...) -> Sync: ...

    def close(self) -> None:
        """Close what was opened, and remove what is there."""


class Places:
    """Opens stores at one address, and closes them in the end."""

    name = ""

    def __init__(self, where: str) -> None:
        self.where = where
        self.loop = asyncio.new_event_loop()
        self._open: list[Sync] = []

    def open(self, bounds: StoreLimits = USUAL) -> Sync:
        store = Sync(self.loop, self.loop.run_until_complete(open_store(self.where, bounds)))
        self._open.append(store)
        return store

    def close(self) -> None:
        for store in self._open:
            store.close()
        self.loop.close()


class File(Places):
    """A file of SQLite's."""

    name = "sqlite"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder / "jobs.db"))


def hold(lease: Lease) -> LeaseToken:
    return LeaseToken(lease.job.id, lease.fence)


def job(job_id: str, **changes: Any) -> Job:
    return Job(**{"id": job_id, "model": "m", "body": f"body of {job_id}".encode(), **changes})
