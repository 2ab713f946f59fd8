"""Tool calls through a gateway: as from a single server, also where another worker continues a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from moesaic.backend import Delta, Event, GenerationRequest
from moesaic.llm import LLM
from moesaic.local_backend import LocalBackend
from tests.support.cluster import Cluster, WorkerHandle, running_cluster
from tests.support.tool_answers import APIS, CUT, ask
from tests.support.wait import eventually


class HeldStream:
    """The events of a local model with its first tokens; the stream then waits until it is cancelled."""

    job = None

    def __init__(self, stream: Any, tokens: int) -> None:
        self._stream, self._tokens = stream, tokens

    async def __aiter__(self) -> AsyncIterator[Event]:
        tokens = 0
        async for event in self._stream:
            yield event
            tokens += len(event.tokens) if isinstance(event, Delta) else 0
            if tokens == self._tokens:
                await asyncio.Event().wait()

    def ready(self) -> list[Event]:
        return []

    def cancel(self) -> None:
        self._stream.cancel()


class HeldBackend(LocalBackend):
    """A local model whose answers stop after ``tokens`` tokens."""

    tokens = 0

    async def generate(self, request: GenerationRequest) -> Any:
        return HeldStream(await super().generate(request), self.tokens)


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "jobs.sqlite") as cluster:
        yield cluster


@pytest.fixture
def direct(tales) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tales.url) as client:
        yield client


def start_worker(cluster: Cluster, kind: type[LocalBackend]) -> WorkerHandle:
    """Have a worker come with the model tales."""

    async def made() -> LocalBackend:
        return kind(LLM.load("tales"))

    return cluster.start_worker(cluster.run(made()))


def close(cluster: Cluster, handle: WorkerHandle) -> None:
    cluster.run(handle.backend.close())


def test_cut_calls_are_as_from_a_single_server(plain, direct):
    handle = start_worker(plain, LocalBackend)
    for api in APIS:
        whole, streamed = ask(plain.client, api, 20), ask(plain.client, api, 20, stream=True)
        assert (whole.reason in CUT, whole.text) == (True, "")
        assert whole == ask(direct, api, 20)
        other = ask(direct, api, 20, stream=True)
        assert (streamed.reason, streamed.text, streamed.calls) == (other.reason, other.text, other.calls)
    close(plain, handle)


@pytest.mark.parametrize(("tokens", "stream"), [(7, False), (17, True)])
def test_another_worker_continues_a_call(plain, direct, tokens, stream):
    first = start_worker(plain, HeldBackend)
    first.backend.tokens = tokens
    with ThreadPoolExecutor(len(APIS)) as pool:
        answers = {api: pool.submit(ask, plain.client, api, 40, stream=stream) for api in APIS}
        eventually(lambda: logged(plain) == [tokens + 1] * len(APIS))
        first.drain(0.0)
        second = start_worker(plain, LocalBackend)
        for api, answer in answers.items():
            other = ask(direct, api, 40, stream=stream)
            cluster = answer.result(60)
            assert (cluster.reason, cluster.text, cluster.calls) == (other.reason, "", other.calls)
            assert cluster.reason in CUT
    for handle in (first, second):
        close(plain, handle)


def logged(cluster: Cluster) -> list[int]:
    """Return the number of events on disk of each running job: the beginning, and one for each token."""
    return [seen.logged for seen in cluster.run(cluster.gateway.store.list_jobs("leased"))]
