"""A gateway with keys, workers in processes, and an administrator's requests."""

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
class ManagedCluster:
    """A running gateway, and the means to start workers and send requests."""

    server: Server
    key_file: Path
    """The file with the keys."""
    key_texts: dict[str, str]
    """The texts of the keys, by name."""
    fork_server: WorkerForkServer = field(repr=False)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def gateway(self) -> Gateway:
        return self.server.app.services.backend  # type: ignore[return-value]

    def spawn(self, name: str) -> int:
        """Start a worker whose name is a letter and a number; return its process id when it is registered."""
        process = self.fork_server.spawn(name)
        eventually(lambda: f"rack/{name}" in self.gateway.workers.sessions)
        return process

    def call(self, method: str, path: str, body: Any = None, key: str = "ops") -> httpx.Response:
        """Send a request with one of the keys; "" sends none."""
        headers = {"authorization": f"Bearer {self.key_texts[key]}"} if key else {}
        return httpx.request(method, self.url + path, json=body, headers=headers, timeout=60)

    def get(self, path: str) -> Any:
        return self.ok("GET", path)

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        """Send an administrator's request, which must succeed, and return the response."""
        answer = self.call(method, f"/admin/{path}", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask(self, prompt: str, tokens: int = 5, idempotency_key: str = "") -> httpx.Response:
        """Send a client's request and wait for the response."""
        body = {"model": "fake", "prompt": prompt, "max_tokens": tokens, "seed": 1}
        headers = {"authorization": f"Bearer {self.key_texts['anna']}"} | (
            {"idempotency-key": idempotency_key} if idempotency_key else {}
        )
        return httpx.post(self.url + "/v1/completions", json=body, headers=headers, timeout=60)

    def ask_in_background(
        self, prompt: str, tokens: int = 5, idempotency_key: str = ""
    ) -> Callable[[], httpx.Response]:
        """Send a client's request in a thread; return a function that waits for the response."""
        responses: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: responses.append(self.ask(prompt, tokens, idempotency_key)))
        thread.start()

        def answer() -> httpx.Response:
            thread.join(60)
            return responses[0]

        return answer


@contextlib.contextmanager
def running_cluster(
    folder: Path,
    *,
    slots: int = 2,
    step: float = 0.01,
    lease: float = 1.0,
    crashes: int = 1,
    settings: Settings | None = None,
) -> Iterator[ManagedCluster]:
    """Run a gateway with a SQLite store.

    Workers that are started have ``slots`` slots and take ``step`` seconds for a token. A job is dead after
    ``crashes`` crashes.
    """
    key_texts, key_list = {}, []
    kinds: dict[str, Any] = {"ops": {"admin": True}, "rack": {"worker": True}, "anna": {"concurrent": 50}}
    for name, limits in kinds.items():
        key_texts[name], key = keys.new(name, **limits)
        key_list.append(key)
    key_file = folder / "keys.json"
    keys.write(key_file, tuple(key_list))

    async def made() -> Gateway:
        return Gateway(await open_store(str(folder / "jobs.sqlite"), StoreLimits(crashes=crashes)), ["fake"], lease)

    def offered(gateway: Gateway) -> Any:
        definitions = aime.shipped()
        aime_routes = (
            *clients.endpoints(gateway, definitions),
            *workers.endpoints(gateway.leases, gateway, definitions, lease),
        )
        return (*routes.endpoints(gateway), *aime_routes, *admin.endpoints(gateway))

    who = keys.Keys(tuple(key_list), source=lambda: keys.read(key_file))
    with running(made, settings, who, offered, figures=ClusterCollector) as server:
        fork_server = WorkerForkServer(server.url, folder / "log", slots=slots, seconds=step, key=key_texts["rack"])
        try:
            yield ManagedCluster(server, key_file, key_texts, fork_server)
        finally:
            fork_server.close()
