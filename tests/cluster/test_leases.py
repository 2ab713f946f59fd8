"""What comes between two steps of a gateway: whoever asked leaves, a write's answer is lost, a store is away."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from moesaic.backend import Delta, Event, Finished, GenerationRequest, ModelInfo, PromptDone, TokenInfo
from moesaic.cluster import active_jobs, queries, wire
from moesaic.cluster.active_job import ActiveJob, Subscription
from moesaic.cluster.gateway import Gateway
from moesaic.cluster.jobs import Job, JobSnapshot, LeaseStatus, LeaseToken, LogRecord, StoreLimits
from moesaic.cluster.lease_timeouts import LeaseTimeouts
from moesaic.cluster.protocols import WorkerInfo
from moesaic.cluster.store import open_store
from moesaic.cluster.worker import agent, running_job
from moesaic.errors import NotFound, Overloaded, Unavailable
from tests.support.backend import FakeBackend, answer
from tests.support.cluster import running_cluster
from tests.support.completions import Stream
from tests.support.wait import eventually

INFO = WorkerInfo("w", (ModelInfo("fake"),), slots=4, instance="1")
REQUEST = GenerationRequest("fake", prompt="Hi", sampling={"max_tokens": 3})
EVENTS: list[Event] = [
    PromptDone(0),
    *(Delta(0, f"{n}", (TokenInfo(n, f"{n}"),)) for n in range(3)),
    Finished(0, "length", 2, 3),
]


@asynccontextmanager
async def gateway(folder: Path, lease: float = 600.0) -> AsyncIterator[Gateway]:
    made = Gateway(await open_store(str(folder / "jobs.sqlite"), StoreLimits()), ["fake"], lease)
    try:
        await made.leases.register(INFO)
        yield made
    finally:
        await made.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


async def leased(found: Gateway) -> tuple[Any, LeaseToken]:
    following = await found.generate(REQUEST)
    [lease] = (await found.leases.lease("w", 1, 5)).leases
    return following, LeaseToken(lease.job.id, lease.fence)


async def read(following: Any) -> list[Event]:
    return [event async for event in following]


async def look(found: Gateway, lease_token: LeaseToken) -> JobSnapshot:
    seen = await found.store.snapshot(lease_token.id)
    assert seen is not None
    return seen


@pytest.mark.parametrize("steps", range(6))
def test_finish_completes_though_the_request_is_cancelled(tmp_path, steps):
    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, lease_token = await leased(found)
            telling = asyncio.ensure_future(found.leases.finish("w", lease_token, 0, EVENTS))
            for _ in range(steps):
                await asyncio.sleep(0)
            telling.cancel()
            await asyncio.wait([telling])
            if steps:
                assert await read(following) == EVENTS
                assert not found.workers.sessions["w"].leases
            else:  # finish() had not begun: the worker still holds the job
                assert (await look(found, lease_token)).state == "leased"
                assert found.workers.sessions["w"].leases
                following.cancel()

    run(main)


@pytest.mark.parametrize("steps", [*range(8), None])
def test_undelivered_lease_is_released_without_a_crash(tmp_path, steps):
    async def main() -> None:
        async with gateway(tmp_path) as found:
            following = await found.generate(REQUEST)
            asking = asyncio.ensure_future(found.leases.lease("w", 1, 5))
            if steps is None:
                await asyncio.wait([asking])
            for _ in range(steps or 0):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking])
            if steps in (0, 1, None):  # in between, either may come first
                assert asking.cancelled() == (steps is not None)
            if asking.cancelled():
                [lease] = (await found.leases.lease("w", 1, 5)).leases
            else:  # lease() had returned: the worker heard of the job and holds it
                [lease] = asking.result().leases
                assert found.workers.sessions["w"].leases
            seen = await found.store.snapshot(lease.job.id)
            assert seen is not None and (seen.state, seen.crashes) == ("leased", 0)
            following.cancel()

    run(main)


def test_replaced_poll_gets_no_lease(tmp_path):
    """The connection of the first was lost in silence: what it was given nobody would hear of."""

    async def main() -> None:
        async with gateway(tmp_path) as found:
            asking = asyncio.ensure_future(found.leases.lease("w", 1, 20))
            await asyncio.sleep(0.05)
            following = await found.generate(REQUEST)
            found.workers.register(INFO)
            assert (await asking).leases == ()
            assert len((await found.leases.lease("w", 1, 5)).leases) == 1
            following.cancel()

    run(main)


def test_finished_event_is_visible_once_accepted(tmp_path):
    """Whoever has heard all of an answer leaves, which would take back a job that has not ended."""

    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, lease_token = await leased(found)
            await found.leases.append_events("w", {lease_token: (0, EVENTS)})
            assert following.ready() == EVENTS[:-1]
            reading = asyncio.ensure_future(read(following))
            assert await found.leases.finish("w", lease_token, len(EVENTS), [])
            assert await reading == EVENTS[-1:]

    run(main)


@pytest.mark.parametrize("stalled", [False, True])
def test_crash_is_forgiven_when_the_worker_is_alive(tmp_path, stalled):
    """It was the network's doing; unless its engine stood still."""

    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, lease_token = await leased(found)
            found.workers.sessions["w"].stalled = stalled
            await found.leases.expire(await found.store.active_leases())
            assert (await look(found, lease_token)).crashes == 1
            assert await found.leases.register(INFO, [lease_token]) == {lease_token.id: None}
            assert (await look(found, lease_token)).crashes == stalled
            assert (await found.store.depths())["fake"].suspects == stalled
            following.cancel()

    run(main)


def test_repeated_network_failures_kill_no_job(tmp_path):
    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, lease_token = await leased(found)
            for _ in range(2 * StoreLimits().crashes):
                await found.leases.unregister("w")
                await found.leases.register(INFO, [lease_token])
                [lease] = (await found.leases.lease("w", 1, 5)).leases
                lease_token = LeaseToken(lease.job.id, lease.fence)
            assert await found.leases.finish("w", lease_token, 0, EVENTS)
            assert await read(following) == EVENTS

    run(main)


@pytest.mark.parametrize("shared", [False, True])
def test_abandoned_job_is_cancelled_unless_shared(tmp_path, shared, monkeypatch):
    for name in ("POLL_SECONDS", "RECONNECT_SECONDS"):
        monkeypatch.setattr(active_jobs, name, 0.0)

    async def main() -> None:
        async with gateway(tmp_path) as found:
            found.store.database.shared = shared
            following = await found.generate(replace(REQUEST, idempotency_key="k"))
            following.cancel()
            [job_id] = found.jobs.jobs
            await found.jobs.sweep()
            await asyncio.sleep(0.1)
            assert (await look(found, LeaseToken(job_id, 0))).state == ("queued" if shared else "cancelled")
            assert not (shared and found.jobs.jobs)

    run(main)


def test_job_end_is_found_by_polling(tmp_path, monkeypatch):
    monkeypatch.setattr(active_jobs, "POLL_SECONDS", 0.0)

    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, lease_token = await leased(found)
            reading = asyncio.ensure_future(read(following))
            found.store.database.listeners.clear()
            await found.store.finish(lease_token, "done", b"", LogRecord(0, len(EVENTS), wire.pack_events(EVENTS)))
            found.jobs.jobs[lease_token.id].worker = ""
            await found.jobs.sweep()
            assert await reading == EVENTS

    run(main)


def test_events_are_not_written_twice_after_a_lost_response(tmp_path):
    """More is on disk than the gateway knows to be there."""

    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, lease_token = await leased(found)
            await found.leases.append_events("w", {lease_token: (0, EVENTS[:3])})
            await found.store.append({lease_token: LogRecord(0, 2, wire.pack_events(EVENTS[:2]))})
            with pytest.raises(Unavailable, match="send the request again"):
                await found.leases.finish("w", lease_token, 3, EVENTS[3:])
            assert await found.leases.finish("w", lease_token, 3, EVENTS[3:])
            assert await read(following) == EVENTS
            assert await found.store.check() == "ok"

    run(main)


def test_worker_unregistered_during_a_request_must_register(tmp_path):
    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, lease_token = await leased(found)
            found.jobs.jobs.clear()  # as after a restart: the store has to be asked
            speaking = asyncio.ensure_future(found.leases.append_events("w", {lease_token: (0, EVENTS[:2])}))
            await asyncio.sleep(0)
            found.workers.unregister("w")
            assert await speaking == {lease_token.id: (2, 0)}
            with pytest.raises(NotFound, match="register"):
                await found.leases.append_events("w", {lease_token: (2, EVENTS[2:])})
            following.cancel()

    run(main)


def test_diverging_answer_ends_its_subscriptions():
    """This gateway was cut off, and told more than the next worker was given to go on from."""

    async def main() -> None:
        live = ActiveJob("id", "fake", "")
        live.extend(0, EVENTS[:3])
        live.persisted = 1
        reader, later = Subscription(live, lambda: None), Subscription(live, lambda: None)
        assert reader.ready() == EVENTS[:3]
        live.reconcile(1, EVENTS[1:4])  # the same, and more
        assert reader.ready() == EVENTS[3:4]
        other = [Delta(0, "1 and 2", (TokenInfo(1, "1"), TokenInfo(2, "2"))), EVENTS[-1]]
        live.reconcile(2, other)
        live.finish()
        assert reader.ready() == []
        for each in (reader, later):
            with pytest.raises(Unavailable, match="from the start"):
                await read(each)
        assert await read(Subscription(live, lambda: None)) == [*EVENTS[:2], *other]

    run(main)


def test_lease_timeouts_restart_after_a_pause():
    now = 0.0
    timeouts = LeaseTimeouts(10.0, lambda: now)
    one, two = LeaseStatus(LeaseToken("a", 1), "w", 5), LeaseStatus(LeaseToken("b", 1), "v", 5)

    def at(time: float, *active_leases: LeaseStatus) -> list[LeaseStatus]:
        nonlocal now
        now = time
        return timeouts.timed_out(active_leases)

    assert at(0, one, two) == at(6, one, two) == []
    two = LeaseStatus(LeaseToken("b", 1), "v", 6)
    assert at(11, one, two) == [one]
    assert at(30, one, two) == []  # nobody looked for 19 seconds
    assert at(38, one, two) == [] and at(41, one, two) == [one, two]
    timeouts.restart()
    assert at(42, one, two) == []


def test_long_messages_are_split(tmp_path, monkeypatch):
    """An event that is too long by itself fails its job, not the worker; so does an outcome."""
    monkeypatch.setattr(agent, "MESSAGE_BYTES", 300)

    class Large(FakeBackend):
        async def embed(self, model: str, texts: Any, truncate: int | None = None) -> tuple[list[list[float]], int]:
            return [[0.5] * 200], 1

    with running_cluster(tmp_path / "jobs.sqlite") as cluster:
        handle = cluster.start_worker(Large())
        streams = [Stream(cluster.client, f"{n}", 50) for n in range(3)]
        for n, stream in enumerate(streams):
            assert stream.end().text == answer(f"{n}", count=50) and stream.done
        large = cluster.client.post("/v1/embeddings", json={"model": "fake", "input": "Hi"})
        assert large.status_code == 413 and "larger than a message" in large.text
        monkeypatch.setattr(agent, "MESSAGE_BYTES", 20)
        assert cluster.client.post("/v1/completions", json={"model": "fake", "prompt": "Hi"}).status_code == 413
        assert not handle.future.done() and not handle.backend.running


def test_unknown_operation_fails(tmp_path):
    with running_cluster(tmp_path / "jobs.sqlite") as cluster:
        handle = cluster.start_worker()
        cluster.run(cluster.gateway.store.submit(Job("x", "fake", "dance", b"{}")))
        eventually(lambda: cluster.snapshot("x").state == "failed")
        assert b"operation dance" in cluster.snapshot("x").result and cluster.snapshot("x").attempts == 1
        assert not handle.future.done()


def test_release_is_retried_until_acknowledged(tmp_path, monkeypatch):
    class Full(FakeBackend):
        async def generate(self, request: GenerationRequest) -> Any:
            if not self.requests:
                self.requests.append(request)
                raise Overloaded("not now")
            return await super().generate(request)

    with running_cluster(tmp_path / "jobs.sqlite", lease=1.0) as cluster:
        release, asked = cluster.gateway.leases.release, []

        async def deaf(*args: Any, **named: Any) -> None:
            asked.append(args)
            if len(asked) == 1:
                raise Unavailable("the disk is full")
            await release(*args, **named)

        monkeypatch.setattr(cluster.gateway.leases, "release", deaf)
        cluster.start_worker(Full())
        stream = Stream(cluster.client, "Hi", 3)
        assert stream.end().text == answer("Hi", count=3)
        assert asked[0] == asked[1] and cluster.snapshot(stream.job).crashes == 0


def test_finish_is_sent_by_the_next_connection():
    async def main() -> None:
        made = agent.Worker(FakeBackend(), ["http://127.0.0.1:1"], name="w")
        made._start(wire.LeasedJob("id", 1, "generate", "fake", msgspec.Raw(wire.pack_request(REQUEST))))
        job = made._jobs["id"]
        assert job.task is not None
        await job.task
        async with made._connection:
            sending = asyncio.ensure_future(made._send())
            while not job.finishing:
                await asyncio.sleep(0)
            [telling] = (task for task in asyncio.all_tasks() if "Worker._finish" in repr(task))
            assert inspect.getcoroutinestate(telling.get_coro()) == inspect.CORO_CREATED
            for task in (telling, sending):  # as when the end of another job cannot be told just then
                task.cancel()
            await asyncio.wait([sending])
            made._connection.url = "http://127.0.0.1:1"
            with pytest.raises(aiohttp.ClientError):
                await made._register()
        assert made._jobs["id"] is job and not job.finishing

    run(main)


def test_stale_acknowledgement_does_not_cancel_a_newer_lease():
    async def main() -> None:
        made = agent.Worker(FakeBackend(seconds=60), ["http://127.0.0.1:1"], name="w")
        lease = wire.LeasedJob("id", 1, "generate", "fake", msgspec.Raw(wire.pack_request(REQUEST)))
        made._start(lease)
        older = made._jobs["id"]
        made._start(msgspec.structs.replace(lease, fence=2))
        made._acknowledge([older], {"id": None})
        made._remove(older)
        newer = made._jobs["id"]
        assert newer.lease.fence == 2 and newer.task is not None and not newer.task.cancelling()
        made._acknowledge([newer], {"id": None})
        assert not made._jobs and newer.task.cancelling()

    run(main)


def test_persisted_events_are_dropped_beyond_a_limit(monkeypatch):
    monkeypatch.setattr(running_job, "MAX_UNACKNOWLEDGED_BYTES", 10 * running_job.EVENT_BYTES)
    job = running_job.RunningJob(wire.LeasedJob("id", 1, "generate", "fake", msgspec.Raw(b"{}")))
    job.events = [Delta(0, f"{n}") for n in range(30)]
    job.acknowledge(20, 5)
    assert (job.first, job.received, len(job.events)) == (5, 20, 25) and job.unsent()[0].text == "20"
    job.acknowledge(8, 5)  # another gateway, which knows less
    assert job.unsent()[0].text == "8"
    job.acknowledge(10**9, 10**9)  # or nonsense
    assert job.unsent() == [] and job.first == 30


def test_a_query_is_answered_without_a_job(tmp_path):
    with running_cluster(tmp_path / "jobs.sqlite", models=["fake"]) as cluster:
        cluster.start_worker()
        tokens = cluster.run(cluster.gateway.tokenize(GenerationRequest("fake", prompt="Hi")))
        assert [token.id for token in tokens] == [72, 105]
        assert cluster.run(cluster.gateway.detokenize("fake", [72, 105])) == "Hi"
        assert cluster.depths() == (0, 0) and not cluster.gateway.jobs.jobs
        assert cluster.run(cluster.gateway.store.list_jobs("done")) == []


@pytest.mark.parametrize("shared", [False, True])
def test_a_query_without_a_worker(tmp_path, shared, monkeypatch):
    """On a shared store, a worker of another gateway may do it as a job."""
    monkeypatch.setattr(queries, "WORKER_SECONDS", 0.05)

    async def main() -> None:
        made = Gateway(await open_store(str(tmp_path / "jobs.sqlite"), StoreLimits()), ["fake"], 600.0)
        made.store.database.shared = shared
        asking = asyncio.ensure_future(made.detokenize("fake", [72]))
        await asyncio.sleep(0.3)
        if shared:
            assert [job.job.kind for job in await made.store.list_jobs("queued")] == ["detokenize"]
            asking.cancel()
            await asyncio.wait([asking])
        else:
            with pytest.raises(Unavailable, match="no worker"):
                await asking
        await made.close()

    run(main)


def test_a_query_follows_its_worker_and_fails_with_it(tmp_path):
    info = replace(INFO, answers_queries=True)

    async def main() -> None:
        async with gateway(tmp_path) as found:
            await found.leases.register(info)
            first, second = (asyncio.ensure_future(found.detokenize("fake", [n])) for n in (72, 105))
            queried = (await found.leases.lease("w", 0, 5)).queries
            assert [query.kind for query in queried] == ["detokenize"] * 2
            assert (await found.leases.lease("w", 0, 0)).queries == ()
            await found.leases.register(info)  # the same process: its connection was lost with the query in it
            assert (await found.leases.lease("w", 0, 5)).queries == queried
            await found.leases.answer_query("w", queried[0].id, "H")
            await found.leases.answer_query("w", queried[0].id, "again")
            assert await first == "H"
            await found.leases.unregister("w")
            with pytest.raises(Unavailable, match="lost"):
                await second

    run(main)
