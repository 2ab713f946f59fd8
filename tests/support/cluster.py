"""A gateway behind a real socket, and real workers that dial in to it; all on the gateway's loop, in a thread."""

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
"""Seconds for a token, where something is to happen in the middle of an answer."""


@dataclass
class Hand:
    """A worker."""

    site: Site
    worker: Worker
    backend: Any
    future: Future[None]

    def stop(self) -> None:
        """End it as if its process had been told to."""
        self.site.server.call(self.worker.stopped.set)
        with contextlib.suppress(MoesaicError):
            self.future.result(20)

    def cut(self) -> None:
        """End it in the middle of whatever it does."""
        self.future.cancel()

    def drain(self, seconds: float = 20.0) -> None:
        self.site.do(self.worker.drain(seconds))


class Site:
    """A gateway, its workers, and a client."""

    def __init__(self, server: Server, key: str | None = None) -> None:
        self.server, self.url = server, server.url
        self.port = int(server.url.rsplit(":", 1)[1])
        self.hands: list[Hand] = []
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(base_url=server.url, headers=headers, timeout=60, limits=limits)

    @property
    def gateway(self) -> Gateway:
        found: Gateway = self.server.backend
        return found

    def do(self, work: Coroutine[Any, Any, Any], seconds: float = 60) -> Any:
        """Await something on the gateway's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.server.loop).result(seconds)

    def hire(
        self,
        backend: Any = None,
        *,
        name: str = "",
        slots: int = 4,
        key: str | None = None,
        urls: Sequence[str] = (),
        wait: bool = True,
        **options: Any,
    ) -> Hand:
        """Have a worker come, and wait until it is there."""
        backend, name = backend or FakeBackend(), name or f"w{len(self.hands)}"

        async def made() -> Worker:
            return Worker(backend, urls or [self.url], name=name, key=key, slots=slots, **options)

        worker = self.do(made())
        future = asyncio.run_coroutine_threadsafe(worker.run(), self.server.loop)
        hand = Hand(self, worker, backend, future)
        self.hands.append(hand)
        if wait:
            eventually(lambda: worker.connected.is_set() or future.done())
        return hand

    def seen(self, job_id: str) -> JobSnapshot:
        """Return a job as the store has it."""
        found: JobSnapshot = self.do(self.gateway.store.snapshot(job_id))
        return found

    def depths(self) -> tuple[int, int]:
        """Return how much waits and runs."""
        depths = self.do(self.gateway.store.depths()).values()
        return sum(each.queued for each in depths), sum(each.leased for each in depths)

    def close(self) -> None:
        self.client.close()
        for hand in self.hands:
            hand.stop()


@contextlib.contextmanager
def site(
    where: Path | str,
    *,
    models: Sequence[str] = (),
    lease: float = 10.0,
    stall: float = 30.0,
    bounds: StoreLimits | None = None,
    settings: Settings | None = None,
    keys: Keys | None = None,
    key: str | None = None,
    port: int = 0,
) -> Iterator[Site]:
    """Run a gateway; its workers end before it does."""

    async def opened() -> Gateway:
        return Gateway(await open_store(str(where), bounds or StoreLimits()), models, lease, stall)

    make: Callable[[], Any] = opened
    with running(make, settings, keys, routes.endpoints, port) as server:
        found = Site(server, key)
        try:
            yield found
        finally:
            found.close()
