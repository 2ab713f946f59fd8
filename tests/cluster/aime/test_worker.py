"""A Moesaic worker at AIME's server, simulated with its faults, and at a Moesaic gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from moesaic.cluster.aime import worker
from moesaic.errors import InvalidParameter, NotFound, Overloaded, Unauthorized
from tests.support.aime import Client
from tests.support.aime_server import JOB_TYPE, KEY, AimeServer
from tests.support.backend import Script, ScriptedBackend


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(worker, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(worker, "UPDATE_SECONDS", 0.02)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(15):
        while not true():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def working(
    backend: ScriptedBackend, server: AimeServer, slots: int = 4, **more: Any
) -> AsyncIterator[tuple[asyncio.Task[None], asyncio.Event]]:
    """Run a worker for a server inside the block."""
    stop = asyncio.Event()
    await server.start()
    work = worker.work(backend, server.url, JOB_TYPE, KEY, slots=slots, name="worker", stop=stop, **more)
    task = asyncio.create_task(work)
    try:
        yield task, stop
    finally:
        stop.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop()


def run_async(run: Callable[[], Any]) -> None:
    asyncio.run(run())


def test_job_is_fetched_reported_and_answered():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(("Once", " upon", " a", " time"), pause=0.05)), AimeServer()
        context = '[{"role": "system", "content": "Be brief."}]'
        server.add("JID#1", chat_context=context, top_k=7, top_p=0, temperature=0, max_gen_tokens=3)
        async with working(backend, server):
            await until(lambda: "JID#1" in server.results)
        [ask] = backend.requests
        assert ask.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
        assert ask.sampling == {"temperature": 0, "top_k": 7, "max_tokens": 3} and not ask.continue_final
        texts = [request["progress_data"]["text"] for request in server.updates]
        assert texts == sorted(texts, key=len) and all("Once upon a".startswith(text) for text in texts)
        assert server.updates[0].keys() == {
            *("job_id", "start_time", "start_time_compute", "job_type", "auth_key", "auth", "version"),
            *("progress", "progress_data"),
        }
        result = server.results["JID#1"]
        assert (result["text"], result["num_generated_tokens"], result["prompt_length"]) == ("Once upon a", 3, 2)
        assert (result["model_name"], result["max_seq_len"], result["current_context_length"]) == ("scripted", 100, 5)
        assert result["metrics"] == {"in_num_tokens": 2, "out_num_tokens": 3} and "error" not in result
        assert result["start_time"] and result["start_time_compute"] and result["prompt_input"] == "Hi"
        assert result["arrival_time"] <= result["finished_time"]
        first = server.job_requests[0]
        assert (first["max_job_batch"], first["auth"], first["job_type"]) == (4, "worker", JOB_TYPE)

    run_async(run)


def test_free_slots_are_refilled():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(held=True)), AimeServer()
        for place in range(5):
            server.add(f"J{place}")
        async with working(backend, server, slots=3):
            await until(lambda: len(backend.requests) == 3)
            assert list(server.states.values()).count("processing") == 3
            backend.go.set()
            await until(lambda: len(server.results) == 5)
            server.add("late")
            await until(lambda: "late" in server.results)
        assert max(request["max_job_batch"] for request in server.job_requests) == 3

    run_async(run)


def test_expired_job_does_not_block_updates_of_others():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(["word "] * 500, pause=0.02)), AimeServer()
        for job_id in ("first", "lapses", "last"):
            server.add(job_id)
        async with working(backend, server):
            await until(lambda: len({request["job_id"] for request in server.updates}) == 3)
            for lapsed in ("lapses", "first"):  # one in the middle, then the first too
                server.states[lapsed] = "lapsed"
                for _ in range(3):
                    server.updates.clear()
                    await until(lambda: any(request["job_id"] == "last" for request in server.updates))

    run_async(run)


def test_results_are_sent_after_a_server_outage():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(held=True)), AimeServer()
        server.add("J1")
        async with working(backend, server) as (task, _):
            await until(lambda: server.updates)
            await server.stop()
            backend.go.set()
            await asyncio.sleep(0.1)
            await server.start()
            await until(lambda: "J1" in server.results)
            assert server.results["J1"]["text"] == "Hello, world!"
            server.add("J2")
            await until(lambda: "J2" in server.results)
            assert not task.done()

    run_async(run)


def test_result_attempts_are_limited():
    async def run() -> None:
        backend, server = ScriptedBackend(), AimeServer()
        server.lose_replies = True
        server.add("J1")
        async with working(backend, server, slots=1):
            await until(lambda: server.deliveries > 1)
            server.lose_replies = False
            server.add("J2")
            await until(lambda: "J2" in server.results)  # the slot was free again
        assert server.deliveries <= 2 + worker.MAX_RESULT_ATTEMPTS

    run_async(run)


@pytest.mark.parametrize(
    "job_type, key, message", [(JOB_TYPE, "wrong", "rejects this key"), ("nobody", KEY, "no job type")]
)
def test_rejected_key_or_job_type_stops_the_worker(job_type, key, message):
    async def run() -> None:
        server = AimeServer()
        await server.start()
        with pytest.raises(Unauthorized, match=message):
            await worker.work(ScriptedBackend(), server.url, job_type, key)
        await server.stop()

    run_async(run)


def test_worker_needs_a_model_and_slots():
    with pytest.raises(NotFound, match="available models: scripted, other"):
        asyncio.run(worker.work(ScriptedBackend(), "http://127.0.0.1:1", JOB_TYPE, KEY, model="nobody"))
    with pytest.raises(InvalidParameter, match="slots"):
        asyncio.run(worker.work(ScriptedBackend(), "http://127.0.0.1:1", JOB_TYPE, KEY, slots=0))


@pytest.mark.parametrize(
    "params, message",
    [
        ({"chat_context": "{"}, "chat_context: is not valid JSON"),
        ({"chat_context": [{"role": "robot", "content": "Hi"}]}, "has the role 'robot'"),
        ({"prompt_input": ""}, "there is nothing to answer"),
        ({"max_gen_tokens": -5}, "expected at least 1"),
        ({"top_k": "many"}, "expected a number"),
        ({"prompt_input": 5}, "must be strings"),
    ],
)
def test_invalid_parameters_get_an_error(params, message):
    async def run() -> None:
        server = AimeServer()
        server.one_shape = True
        server.add("J1", **params)
        async with working(ScriptedBackend(), server):
            await until(lambda: "J1" in server.results)
        assert message in server.results["J1"]["error"]

    run_async(run)


@pytest.mark.parametrize("script", [Script(refusal=Overloaded("full")), Script(error=Overloaded("full"))])
def test_backend_error_is_reported(script):
    async def run() -> None:
        server = AimeServer()
        server.add("J1")
        async with working(ScriptedBackend(script), server):
            await until(lambda: "J1" in server.results)
        assert server.results["J1"]["error"] == "full"

    run_async(run)


def test_cancelled_job_frees_its_slot():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(held=True)), AimeServer()
        server.add("J1")
        server.cancel.add("J1")
        async with working(backend, server, slots=1):
            await until(lambda: "J1" in server.results)
            assert server.results["J1"]["error"] == "the job was cancelled" and backend.cancelled == 1
            backend.go.set()
            server.add("J2")
            await until(lambda: "J2" in server.results)

    run_async(run)


def test_stopped_worker_finishes_running_jobs():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(held=True)), AimeServer()
        server.add("J1")
        async with working(backend, server) as (task, stop):
            await until(lambda: server.updates)
            stop.set()
            backend.go.set()
            await task
            assert server.results["J1"]["text"] == "Hello, world!"

    run_async(run)


def test_stop_without_drain_reports_an_error_for_each_job():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(held=True)), AimeServer()
        server.add("J1")
        async with working(backend, server, drain_seconds=0.05) as (task, stop):
            await until(lambda: server.updates)
            stop.set()
            await task
            assert "the worker was stopped" in server.results["J1"]["error"]

    run_async(run)


def test_worker_runs_jobs_of_a_moesaic_gateway(gateway_server):
    async def run() -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(worker.work(ScriptedBackend(), gateway_server.url, JOB_TYPE, "any", stop=stop))
        client = Client(gateway_server)
        result = await asyncio.to_thread(lambda: client.request(wait=True).json())
        assert result["text"] == "Hello, world!" and result["prompt_length"] == 2
        stop.set()
        await task

    run_async(run)
