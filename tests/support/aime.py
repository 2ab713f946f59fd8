"""A gateway with AIME's routes behind a real socket, and clients that send what AIME's programs send."""

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
def running_gateway(
    path: Path,
    definitions: Sequence[Definition] | None = None,
    keys: Keys | None = None,
    models: Sequence[str] = MODELS,
    server_settings: Settings | None = None,
    lease: float = 10.0,
) -> Iterator[Server]:
    """Run a gateway that keeps its jobs at ``path``."""
    definitions_shown = settings.shipped() if definitions is None else definitions

    async def make() -> Gateway:
        return Gateway(await open_store(str(path), StoreLimits()), models, lease)

    def routes(gateway: Gateway) -> Any:
        return [
            *clients.endpoints(gateway, definitions_shown),
            *workers.endpoints(gateway.leases, gateway, definitions_shown, lease),
        ]

    with running(make, server_settings, keys, routes) as server:
        yield server


def mixtral_definitions(**changes: Any) -> list[Definition]:
    """Return the definition of mixtral_chat with these changes, in a list."""
    return [replace(definition, **changes) for definition in settings.shipped() if definition.name == "mixtral_chat"]


OPEN_CLIENTS: list[httpx.Client] = []


def open_client(server: Server) -> httpx.Client:
    """Return a connection that is closed at the end of the test."""
    OPEN_CLIENTS.append(httpx.Client(base_url=server.url, timeout=30))
    return OPEN_CLIENTS[-1]


class Client:
    """Client that sends what AIME's Python client 0.8.9 sends."""

    def __init__(self, server: Server, endpoint: str = "mixtral_chat", key: str | None = None) -> None:
        self.http = open_client(server)
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

    def error_of(self, **params: Any) -> Any:
        """Return the error of a request that is refused with status 400."""
        answer = self.request(**params)
        assert answer.status_code == 400, answer.text
        content = answer.json()
        assert content.keys() == {"success", "error", "ep_version"} and content["success"] is False
        return content["error"]


class AimeWorker:
    """Worker that sends what AIME's worker interface 0.9.12 sends."""

    def __init__(self, server: Server, job_type: str = "mixtral", key: str = "k", name: str = "host#0_1xGPU") -> None:
        self.http = open_client(server)
        self.job_type, self.key, self.name = job_type, key, name
        self.identity = {"version": "AIME-API-Worker-Interface 0.9.12", "auth": name}

    def post(self, path: str, body: Any) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json() is not None
        return answer.json()

    def check(self) -> Any:
        return self.post("/worker_check_server_status", {"auth_key": self.key, "job_type": self.job_type})

    def request_jobs(self, limit: int = 1, **more: Any) -> Any:
        body = {
            "auth": self.name,
            "job_type": self.job_type,
            "auth_key": self.key,
            "version": self.identity["version"],
            "worker_version": 0,
            "request_timeout": 60,
            "max_job_batch": limit,
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

    def take_jobs(self, limit: int = 1, **more: Any) -> list[dict[str, Any]]:
        """Request jobs, which must be there, and return them."""
        answer = self.request_jobs(limit, **more)
        assert answer["cmd"] == "job", answer
        return list(answer["job_data"])

    def update(self, job: dict[str, Any], text: str | None, tokens: int = 0, context: int = 0) -> dict[str, Any]:
        data = {"text": text, "num_generated_tokens": tokens, "current_context_length": context, **self.identity}
        job_fields = {name: job[name] for name in ("job_id", *TIMES)}
        return {
            **job_fields,
            "job_type": self.job_type,
            "auth_key": self.key,
            "progress": tokens,
            "progress_data": data if text is not None else None,
        }

    def send_updates(self, *updates: dict[str, Any]) -> Any:
        return self.post("/worker_job_progress", list(updates))

    def finish(self, job: dict[str, Any], text: str | None = None, tokens: int = 0, **more: Any) -> Any:
        job_fields = {name: job[name] for name in ("job_id", *TIMES)}
        body = {**job_fields, **self.identity, "job_type": self.job_type, "auth_key": self.key, **more}
        if text is not None:
            definitions_shown = {"text": text, "num_generated_tokens": tokens, "current_context_length": tokens + 7}
            body |= definitions_shown | {"model_name": "Mixtral", "max_seq_len": 32000}
        return self.post("/worker_job_result", body)


@contextlib.contextmanager
def in_background(work: Callable[[], Any]) -> Iterator[Any]:
    """Call a function in a thread, and yield its future."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


def events(answer: httpx.Response) -> Iterator[Any]:
    """Yield the events of a stream."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])
