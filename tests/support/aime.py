"""A gateway with AIME's routes behind a real socket, and what AIME's programs send to it, field by field."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from moesaic.cluster.aime import clients, settings, workers
from moesaic.cluster.aime.settings import Definition
from moesaic.cluster.gateway import Gateway
from moesaic.cluster.jobs import StoreLimits
from moesaic.cluster.store import open_store
from moesaic.serve.keys import Keys
from moesaic.serve.settings import Settings
from tests.support.server import Server, running

MODELS = ("mixtral", "llama3")
TIMES = {"start_time", "start_time_compute"}


@contextlib.contextmanager
def gateway(
    path: Path,
    definitions: Sequence[Definition] | None = None,
    keys: Keys | None = None,
    models: Sequence[str] = MODELS,
    bounds: Settings | None = None,
    lease: float = 10.0,
) -> Iterator[Server]:
    """Run a gateway that keeps its jobs at ``path``."""
    shown = settings.shipped() if definitions is None else definitions

    async def make() -> Gateway:
        return Gateway(await open_store(str(path), StoreLimits()), models, lease)

    def routes(desk: Gateway) -> Any:
        return [*clients.endpoints(desk, shown), *workers.endpoints(desk.leases, desk, shown, lease)]

    with running(make, bounds, keys, routes) as server:
        yield server


def patient(**changes: Any) -> list[Definition]:
    """Return mixtral_chat, changed."""
    return [replace(each, **changes) for each in settings.shipped() if each.name == "mixtral_chat"]


OPEN: list[httpx.Client] = []


def opened(server: Server) -> httpx.Client:
    """Return a connection that is closed at the end of the test."""
    OPEN.append(httpx.Client(base_url=server.url, timeout=30))
    return OPEN[-1]


class Client:
    """What AIME's client in Python 0.8.9 sends."""

    def __init__(self, server: Server, endpoint: str = "mixtral_chat", key: str | None = None) -> None:
        self.http = opened(server)
        self.endpoint, self.key, self.session = endpoint, key, None

    def get(self, path: str, **query: Any) -> httpx.Response:
        return self.http.get(path, params={name: value for name, value in query.items() if value is not None})

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def request(self, *, wait: bool = False, **params: Any) -> httpx.Response:
        given = {"prompt_input": "Hello", **params}
        given |= {"client_session_auth_key": self.session, "key": self.key, "wait_for_result": wait}
        return self.post(f"/{self.endpoint}", given)

    def job(self, **params: Any) -> str:
        answer = self.request(**params)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["job_id"])

    def progress(self, job: str) -> httpx.Response:
        return self.get(f"/{self.endpoint}/progress", key=self.key, job_id=job)

    def refused(self, **params: Any) -> Any:
        """Return the error of a request that is refused with status 400."""
        answer = self.request(**params)
        assert answer.status_code == 400, answer.text
        found = answer.json()
        assert found.keys() == {"success", "error", "ep_version"} and found["success"] is False
        return found["error"]


class AimeWorker:
    """What AIME's worker interface 0.9.12 sends."""

    def __init__(self, server: Server, job_type: str = "mixtral", key: str = "k", name: str = "host#0_1xGPU") -> None:
        self.http = opened(server)
        self.job_type, self.key, self.name = job_type, key, name
        self.said = {"version": "AIME-API-Worker-Interface 0.9.12", "auth": name}

    def post(self, path: str, body: Any) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json() is not None
        return answer.json()

    def check(self) -> Any:
        return self.post("/worker_check_server_status", {"auth_key": self.key, "job_type": self.job_type})

    def ask(self, most: int = 1, **more: Any) -> Any:
        body = {
            "auth": self.name,
            "job_type": self.job_type,
            "auth_key": self.key,
            "version": self.said["version"],
            "worker_version": 0,
            "request_timeout": 60,
            "max_job_batch": most,
            "gpu_name": None,
            "num_gpus": 1,
            "model_label": None,
            "model_quantization": None,
            "model_size": None,
            "model_family": None,
            "model_type": None,
            "model_repo_name": None,
            "framework": None,
            "framework_version": None,
            "pytorch_version": None,
        }
        return self.post("/worker_job_request", body | more)

    def take(self, most: int = 1, **more: Any) -> list[dict[str, Any]]:
        """Return jobs; there must be some."""
        answer = self.ask(most, **more)
        assert answer["cmd"] == "job", answer
        return list(answer["job_data"])

    def update(self, job: dict[str, Any], text: str | None, tokens: int = 0, context: int = 0) -> dict[str, Any]:
        data = {"text": text, "num_generated_tokens": tokens, "current_context_length": context, **self.said}
        known = {name: job[name] for name in ("job_id", *TIMES)}
        return {
            **known,
            "job_type": self.job_type,
            "auth_key": self.key,
            "progress": tokens,
            "progress_data": data if text is not None else None,
        }

    def tell(self, *updates: dict[str, Any]) -> Any:
        return self.post("/worker_job_progress", list(updates))

    def finish(self, job: dict[str, Any], text: str | None = None, tokens: int = 0, **more: Any) -> Any:
        known = {name: job[name] for name in ("job_id", *TIMES)}
        body = {**known, **self.said, "job_type": self.job_type, "auth_key": self.key, **more}
        if text is not None:
            shown = {"text": text, "num_generated_tokens": tokens, "current_context_length": tokens + 7}
            body |= shown | {"model_name": "Mixtral", "max_seq_len": 32000}
        return self.post("/worker_job_result", body)


@contextlib.contextmanager
def meanwhile(work: Callable[[], Any]) -> Iterator[Any]:
    """Do something in another thread; ``result`` of what this gives waits for it."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


def events(answer: httpx.Response) -> Iterator[Any]:
    """Yield the events of a stream."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])
