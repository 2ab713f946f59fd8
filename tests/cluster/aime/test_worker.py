"""Our worker at AIME's server: a server with its behaviour and its faults, and at our own gateway."""

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
    monkeypatch.setattr(worker, "AGAIN", 0.02)
    monkeypatch.setattr(worker, "PACE", 0.02)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(15):
        while not true():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def working(
    backend: ScriptedBackend, server: AimeServer, slots: int = 4, **more: Any
) -> AsyncIterator[tuple[asyncio.Task[None], asyncio.Event]]:
    """Have a worker work for a server until the end of this."""
    stop = asyncio.Event()
    await server.start()
    work = worker.work(backend, server.url, JOB_TYPE, KEY, slots=slots, name="ours", stop=stop, **more)
    task = asyncio.create_task(work)
    try:
        yield task, stop
    finally:
        stop.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop()


def played(run: Callable[[], Any]) -> None:
    asyncio.run(run())


def test_a_job_is_fetched_told_of_and_answered():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(("Once", " upon", " a", " time"), pause=0.05)), AimeServer()
        context = '[{"role": "system", "content": "Be brief."}]'
        server.add("JID#1", chat_context=context, top_k=7, top_p=0, temperature=0, max_gen_tokens=3)
        async with working(backend, server):
            await until(lambda: "JID#1" in server.results)
        [ask] = backend.requests
        assert ask.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
        assert ask.sampling == {"temperature": 0, "top_k": 7, "max_tokens": 3} and not ask.continue_final
        texts = [each["progress_data"]["text"] for each in server.updates]
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
        assert (first["max_job_batch"], first["auth"], first["job_type"]) == (4, "ours", JOB_TYPE)

    played(run)


def test_places_are_kept_full():
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
        assert max(each["max_job_batch"] for each in server.job_requests) == 3

    played(run)


def test_one_job_that_lapsed_does_not_silence_the_others():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(["word "] * 500, pause=0.02)), AimeServer()
        for id in ("first", "lapses", "last"):
            server.add(id)
        async with working(backend, server):
            await until(lambda: len({each["job_id"] for each in server.updates}) == 3)
            for lapsed in ("lapses", "first"):  # one in the middle, then the first too
                server.states[lapsed] = "lapsed"
                for _ in range(3):
                    server.updates.clear()
                    await until(lambda: any(each["job_id"] == "last" for each in server.updates))

    played(run)


def test_a_server_that_goes_away_gets_its_answers_when_it_is_back():
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

    played(run)


def test_a_result_whose_reply_was_lost_is_not_sent_for_ever():
    async def run() -> None:
        backend, server = ScriptedBackend(), AimeServer()
        server.lose_replies = True
        server.add("J1")
        async with working(backend, server, slots=1):
            await until(lambda: server.deliveries > 1)
            server.lose_replies = False
            server.add("J2")
            await until(lambda: "J2" in server.results)  # so that the place was free again
        assert server.deliveries <= 2 + worker.TRIES

    played(run)


@pytest.mark.parametrize("job_type, key, said", [(JOB_TYPE, "wrong", "does not take"), ("nobody", KEY, "no job type")])
def test_what_can_never_be_ends_the_worker(job_type, key, said):
    async def run() -> None:
        server = AimeServer()
        await server.start()
        with pytest.raises(Unauthorized, match=said):
            await worker.work(ScriptedBackend(), server.url, job_type, key)
        await server.stop()

    played(run)


def test_a_worker_without_a_model_does_not_begin():
    with pytest.raises(NotFound, match="there is scripted, other"):
        asyncio.run(worker.work(ScriptedBackend(), "http://127.0.0.1:1", JOB_TYPE, KEY, model="nobody"))
    with pytest.raises(InvalidParameter, match="slots"):
        asyncio.run(worker.work(ScriptedBackend(), "http://127.0.0.1:1", JOB_TYPE, KEY, slots=0))


@pytest.mark.parametrize(
    "params, said",
    [
        ({"chat_context": "{"}, "chat_context: is no JSON"),
        ({"chat_context": [{"role": "robot", "content": "Hi"}]}, "has the role 'robot'"),
        ({"prompt_input": ""}, "there is nothing to answer"),
        ({"max_gen_tokens": -5}, "expected at least 1"),
        ({"top_k": "many"}, "expected a number"),
        ({"prompt_input": 5}, "must be strings"),
    ],
)
def test_what_cannot_be_answered_gets_an_error(params, said):
    async def run() -> None:
        server = AimeServer()
        server.one_shape = True
        server.add("J1", **params)
        async with working(ScriptedBackend(), server):
            await until(lambda: "J1" in server.results)
        assert said in server.results["J1"]["error"]

    played(run)


@pytest.mark.parametrize("script", [Script(refusal=Overloaded("full")), Script(error=Overloaded("full"))])
def test_what_the_model_refuses_gets_its_error(script):
    async def run() -> None:
        server = AimeServer()
        server.add("J1")
        async with working(ScriptedBackend(script), server):
            await until(lambda: "J1" in server.results)
        assert server.results["J1"]["error"] == "full"

    played(run)


def test_a_job_that_is_cancelled_frees_its_place():
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

    played(run)


def test_a_worker_that_stops_ends_what_runs():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(held=True)), AimeServer()
        server.add("J1")
        async with working(backend, server) as (task, stop):
            await until(lambda: server.updates)
            stop.set()
            backend.go.set()
            await task
            assert server.results["J1"]["text"] == "Hello, world!"

    played(run)


def test_a_worker_that_may_not_wait_leaves_no_job_unanswered():
    async def run() -> None:
        backend, server = ScriptedBackend(Script(held=True)), AimeServer()
        server.add("J1")
        async with working(backend, server, drain_seconds=0.05) as (task, stop):
            await until(lambda: server.updates)
            stop.set()
            await task
            assert "the worker was stopped" in server.results["J1"]["error"]

    played(run)


def test_it_works_for_our_gateway_as_well(office):
    async def run() -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(worker.work(ScriptedBackend(), office.url, JOB_TYPE, "any", stop=stop))
        client = Client(office)
        found = await asyncio.to_thread(lambda: client.request(wait=True).json())
        assert found["text"] == "Hello, world!" and found["prompt_length"] == 2
        stop.set()
        await task

    played(run)
