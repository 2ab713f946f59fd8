"""A gateway with keys, workers that are processes, and somebody who administers them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.worker_forkserver import WorkerForkServer
from moesaic.cluster import admin, routes
from moesaic.cluster.aime import clients, workers
from moesaic.cluster.aime import settings as aime
from moesaic.cluster.gateway import Gateway
from moesaic.cluster.jobs import StoreLimits
from moesaic.cluster.metrics import ClusterCollector
from moesaic.cluster.store import open_store
from moesaic.serve import keys
from moesaic.serve.settings import Settings
from tests.support.server import Server, running
from tests.support.wait import eventually


@dataclass
class Site:
    """What runs, and what a test does with it."""

    server: Server
    file: Path
    """Where the keys are."""
    written: dict[str, str]
    """The keys themselves, by name."""
    nursery: WorkerForkServer = field(repr=False)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def gateway(self) -> Gateway:
        return self.server.app.services.backend  # type: ignore[return-value]

    def spawn(self, name: str) -> int:
        """Start a worker, w and a number; return its process number when the gateway knows it."""
        process = self.nursery.spawn(name)
        eventually(lambda: f"rack/{name}" in self.gateway.workers.sessions)
        return process

    def call(self, method: str, path: str, body: Any = None, key: str = "ops") -> httpx.Response:
        """Ask for something in the name of one of the keys; "" is nobody."""
        headers = {"authorization": f"Bearer {self.written[key]}"} if key else {}
        return httpx.request(method, self.url + path, json=body, headers=headers, timeout=60)

    def get(self, path: str) -> Any:
        return self.ok("GET", path)

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        """Do something as an administrator and return what is said."""
        answer = self.call(method, f"/admin/{path}", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask(self, prompt: str, tokens: int = 5, once: str = "") -> httpx.Response:
        """Ask the model as a client and wait for the answer."""
        body = {"model": "fake", "prompt": prompt, "max_tokens": tokens, "seed": 1}
        headers = {"authorization": f"Bearer {self.written['anna']}"} | ({"idempotency-key": once} if once else {})
        return httpx.post(self.url + "/v1/completions", json=body, headers=headers, timeout=60)

    def asking(self, prompt: str, tokens: int = 5, once: str = "") -> Callable[[], httpx.Response]:
        """Do so beside; return what waits for the answer."""
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(self.ask(prompt, tokens, once)))
        thread.start()

        def answer() -> httpx.Response:
            thread.join(60)
            return found[0]

        return answer


@contextlib.contextmanager
def site(
    folder: Path,
    *,
    slots: int = 2,
    step: float = 0.01,
    lease: float = 1.0,
    crashes: int = 1,
    settings: Settings | None = None,
) -> Iterator[Site]:
    """Run a gateway over a file, and let workers be started: so many slots, so many seconds for a token; a
    job that so many died of is dead."""
    written, kept = {}, []
    kinds: dict[str, Any] = {"ops": {"admin": True}, "rack": {"worker": True}, "anna": {"concurrent": 50}}
    for name, limits in kinds.items():
        written[name], key = keys.new(name, **limits)
        kept.append(key)
    file = folder / "keys.json"
    keys.write(file, tuple(kept))

    async def made() -> Gateway:
        return Gateway(await open_store(str(folder / "jobs.sqlite"), StoreLimits(crashes=crashes)), ["fake"], lease)

    def offered(gateway: Gateway) -> Any:
        known = aime.shipped()
        theirs = (*clients.endpoints(gateway, known), *workers.endpoints(gateway.leases, gateway, known, lease))
        return (*routes.endpoints(gateway), *theirs, *admin.endpoints(gateway))

    who = keys.Keys(tuple(kept), source=lambda: keys.read(file))
    with running(made, settings, who, offered, figures=ClusterCollector) as server:
        nursery = WorkerForkServer(server.url, folder / "log", slots=slots, seconds=step, key=written["rack"])
        try:
            yield Site(server, file, written, nursery)
        finally:
            nursery.close()
