"""A gateway behind a real socket, and real workers that connect to it. All run on the gateway's loop, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from moesaic.cluster import routes
from moesaic.cluster.gateway import Gateway
from moesaic.cluster.jobs import JobSnapshot, StoreLimits
from moesaic.cluster.store import open_store
from moesaic.cluster.worker.agent import Worker
from moesaic.errors import MoesaicError
from moesaic.serve.keys import Keys
from moesaic.serve.settings import Settings
from tests.support.backend import FakeBackend
from tests.support.server import Server, running
from tests.support.wait import eventually

SLOW = 0.05
"""Seconds for a token, for tests in which something happens in the middle of an answer."""


@dataclass
class WorkerHandle:
    """A running worker, and the means to end it."""

    cluster: Cluster
    worker: Worker
    backend: Any
    future: Future[None]

    def stop(self) -> None:
        """Stop the worker as a signal would stop its process."""
        self.cluster.server.call(self.worker.stopped.set)
        with contextlib.suppress(MoesaicError):
            self.future.result(20)

    def abort(self) -> None:
        """End the worker at once, whatever it does."""
        self.future.cancel()

    def drain(self, seconds: float = 20.0) -> None:
        self.cluster.run(self.worker.drain(seconds))


class Cluster:
    """A gateway, its workers and a client."""

    def __init__(self, server: Server, key: str | None = None) -> None:
        self.server, self.url = server, server.url
        self.port = int(server.url.rsplit(":", 1)[1])
        self.handles: list[WorkerHandle] = []
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(base_url=server.url, headers=headers, timeout=60, limits=limits)

    @property
    def gateway(self) -> Gateway:
        gateway: Gateway = self.server.backend
        return gateway

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = 60) -> Any:
        """Run a coroutine on the gateway's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.server.loop).result(seconds)

    def start_worker(
        self,
        backend: Any = None,
        *,
        name: str = "",
        slots: int = 4,
        key: str | None = None,
        urls: Sequence[str] = (),
        wait: bool = True,
        **options: Any,
    ) -> WorkerHandle:
        """Start a worker and wait until it is registered."""
        backend, name = backend or FakeBackend(), name or f"w{len(self.handles)}"

        async def made() -> Worker:
            return Worker(backend, urls or [self.url], name=name, key=key, slots=slots, **options)

        worker = self.run(made())
        future = asyncio.run_coroutine_threadsafe(worker.run(), self.server.loop)
        handle = WorkerHandle(self, worker, backend, future)
        self.handles.append(handle)
        if wait:
            eventually(lambda: worker.connected.is_set() or future.done())
        return handle

    def snapshot(self, job_id: str) -> JobSnapshot:
        """Return the store's snapshot of a job."""
        snapshot: JobSnapshot = self.run(self.gateway.store.snapshot(job_id))
        return snapshot

    def depths(self) -> tuple[int, int]:
        """Return the numbers of queued and leased jobs."""
        depths = self.run(self.gateway.store.depths()).values()
        return sum(depth.queued for depth in depths), sum(depth.leased for depth in depths)

    def close(self) -> None:
        self.client.close()
        for handle in self.handles:
            handle.stop()


@contextlib.contextmanager
def running_cluster(
    where: Path | str,
    *,
    models: Sequence[str] = (),
    lease: float = 10.0,
    stall: float = 30.0,
    limits: StoreLimits | None = None,
    settings: Settings | None = None,
    keys: Keys | None = None,
    key: str | None = None,
    port: int = 0,
) -> Iterator[Cluster]:
    """Run a gateway; its workers are stopped before it."""

    async def opened() -> Gateway:
        return Gateway(await open_store(str(where), limits or StoreLimits()), models, lease, stall)

    make: Callable[[], Any] = opened
    with running(make, settings, keys, routes.endpoints, port) as server:
        cluster = Cluster(server, key)
        try:
            yield cluster
        finally:
            cluster.close()
