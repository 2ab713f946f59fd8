"""What comes between two steps of a gateway: whoever asked leaves, a write's answer is lost, a store is away."""

from __future__ import annotations

import asyncio
import inspect
import time
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
async def open_gateway(folder: Path, lease: float = 600.0) -> AsyncIterator[Gateway]:
    gateway = Gateway(await open_store(str(folder / "jobs.sqlite"), StoreLimits()), ["fake"], lease)
    try:
        await gateway.leases.register(INFO)
        yield gateway
    finally:
        await gateway.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


async def leased(gateway: Gateway) -> tuple[Any, LeaseToken]:
    subscription = await gateway.generate(REQUEST)
    [lease] = (await gateway.leases.lease("w", 1, 5)).leases
    return subscription, LeaseToken(lease.job.id, lease.fence)


async def read(subscription: Any) -> list[Event]:
    return [event async for event in subscription]


async def look(gateway: Gateway, lease_token: LeaseToken) -> JobSnapshot:
    snapshot = await gateway.store.snapshot(lease_token.id)
    assert snapshot is not None
    return snapshot


@pytest.mark.parametrize("steps", range(6))
def test_finish_completes_though_the_request_is_cancelled(tmp_path, steps):
    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            subscription, lease_token = await leased(gateway)
            finish_task = asyncio.ensure_future(gateway.leases.finish("w", lease_token, 0, EVENTS))
            for _ in range(steps):
                await asyncio.sleep(0)
            finish_task.cancel()
            await asyncio.wait([finish_task])
            if steps:
                assert await read(subscription) == EVENTS
                assert not gateway.workers.sessions["w"].leases
            else:  # finish() had not begun: the worker still holds the job
                assert (await look(gateway, lease_token)).state == "leased"
                assert gateway.workers.sessions["w"].leases
                subscription.cancel()

    run(main)


@pytest.mark.parametrize("steps", [*range(8), None])
def test_undelivered_lease_is_released_without_a_crash(tmp_path, steps):
    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            subscription = await gateway.generate(REQUEST)
            lease_task = asyncio.ensure_future(gateway.leases.lease("w", 1, 5))
            if steps is None:
                await asyncio.wait([lease_task])
            for _ in range(steps or 0):
                await asyncio.sleep(0)
            lease_task.cancel()
            await asyncio.wait([lease_task])
            if steps in (0, 1, None):  # in between, either may come first
                assert lease_task.cancelled() == (steps is not None)
            if lease_task.cancelled():
                [lease] = (await gateway.leases.lease("w", 1, 5)).leases
            else:  # lease() had returned: the worker heard of the job and holds it
                [lease] = lease_task.result().leases
                assert gateway.workers.sessions["w"].leases
            snapshot = await gateway.store.snapshot(lease.job.id)
            assert snapshot is not None and (snapshot.state, snapshot.crashes) == ("leased", 0)
            subscription.cancel()

    run(main)


def test_replaced_poll_gets_no_lease(tmp_path):
    """The connection of the first was lost in silence: what it was given nobody would hear of."""

    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            lease_task = asyncio.ensure_future(gateway.leases.lease("w", 1, 20))
            await asyncio.sleep(0.05)
            subscription = await gateway.generate(REQUEST)
            gateway.workers.register(INFO)
            assert (await lease_task).leases == ()
            assert len((await gateway.leases.lease("w", 1, 5)).leases) == 1
            subscription.cancel()

    run(main)


def test_finished_event_is_visible_once_accepted(tmp_path):
    """Whoever has heard all of an answer leaves, which would take back a job that has not ended."""

    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            subscription, lease_token = await leased(gateway)
            await gateway.leases.append_events("w", {lease_token: (0, EVENTS)})
            assert subscription.ready() == EVENTS[:-1]
            read_task = asyncio.ensure_future(read(subscription))
            assert await gateway.leases.finish("w", lease_token, len(EVENTS), [])
            assert await read_task == EVENTS[-1:]

    run(main)


@pytest.mark.parametrize("stalled", [False, True])
def test_crash_is_forgiven_when_the_worker_is_alive(tmp_path, stalled):
    """It was the network's doing; unless its engine stood still."""

    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            subscription, lease_token = await leased(gateway)
            gateway.workers.sessions["w"].stalled = stalled
            await gateway.leases.expire(await gateway.store.active_leases())
            assert (await look(gateway, lease_token)).crashes == 1
            assert await gateway.leases.register(INFO, [lease_token]) == {lease_token.id: None}
            assert (await look(gateway, lease_token)).crashes == stalled
            assert (await gateway.store.depths())["fake"].suspects == stalled
            subscription.cancel()

    run(main)


def test_leases_that_a_leaving_worker_never_received_are_no_crash(tmp_path):
    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            subscription, lease_token = await leased(gateway)
            await gateway.leases.release("w", [], leaving=True)
            await gateway.leases.unregister("w")
            job = await look(gateway, lease_token)
            assert (job.state, job.crashes) == ("queued", 0) and gateway.leases.expired == 0
            subscription.cancel()

    run(main)


def test_repeated_network_failures_kill_no_job(tmp_path):
    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            subscription, lease_token = await leased(gateway)
            for _ in range(2 * StoreLimits().crashes):
                await gateway.leases.unregister("w")
                await gateway.leases.register(INFO, [lease_token])
                [lease] = (await gateway.leases.lease("w", 1, 5)).leases
                lease_token = LeaseToken(lease.job.id, lease.fence)
            assert await gateway.leases.finish("w", lease_token, 0, EVENTS)
            assert await read(subscription) == EVENTS

    run(main)


@pytest.mark.parametrize("shared", [False, True])
def test_abandoned_job_is_cancelled_unless_shared(tmp_path, shared, monkeypatch):
    for name in ("POLL_SECONDS", "RECONNECT_SECONDS"):
        monkeypatch.setattr(active_jobs, name, 0.0)

    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            gateway.store.database.shared = shared
            subscription = await gateway.generate(replace(REQUEST, idempotency_key="k"))
            subscription.cancel()
            [job_id] = gateway.jobs.jobs
            await gateway.jobs.sweep()
            await asyncio.sleep(0.1)
            assert (await look(gateway, LeaseToken(job_id, 0))).state == ("queued" if shared else "cancelled")
            assert not (shared and gateway.jobs.jobs)

    run(main)


def test_job_end_is_found_by_polling(tmp_path, monkeypatch):
    monkeypatch.setattr(active_jobs, "POLL_SECONDS", 0.0)

    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            subscription, lease_token = await leased(gateway)
            read_task = asyncio.ensure_future(read(subscription))
            gateway.store.database.listeners.clear()
            await gateway.store.finish(lease_token, "done", b"", LogRecord(0, len(EVENTS), wire.pack_events(EVENTS)))
            gateway.jobs.jobs[lease_token.id].worker = ""
            await gateway.jobs.sweep()
            assert await read_task == EVENTS

    run(main)


def test_events_are_not_written_twice_after_a_lost_response(tmp_path):
    """More is on disk than the gateway knows to be there."""

    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            subscription, lease_token = await leased(gateway)
            await gateway.leases.append_events("w", {lease_token: (0, EVENTS[:3])})
            await gateway.store.append({lease_token: LogRecord(0, 2, wire.pack_events(EVENTS[:2]))})
            with pytest.raises(Unavailable, match="send the request again"):
                await gateway.leases.finish("w", lease_token, 3, EVENTS[3:])
            assert await gateway.leases.finish("w", lease_token, 3, EVENTS[3:])
            assert await read(subscription) == EVENTS
            assert await gateway.store.check() == "ok"

    run(main)


def test_worker_unregistered_during_a_request_must_register(tmp_path):
    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            subscription, lease_token = await leased(gateway)
            gateway.jobs.jobs.clear()  # as after a restart: the store has to be asked
            append_task = asyncio.ensure_future(gateway.leases.append_events("w", {lease_token: (0, EVENTS[:2])}))
            await asyncio.sleep(0)
            gateway.workers.unregister("w")
            assert await append_task == {lease_token.id: (2, 0)}
            with pytest.raises(NotFound, match="register"):
                await gateway.leases.append_events("w", {lease_token: (2, EVENTS[2:])})
            subscription.cancel()

    run(main)


def test_diverging_answer_ends_its_subscriptions():
    """This gateway was cut off, and told more than the next worker was given to go on from."""

    async def main() -> None:
        job = ActiveJob("id", "fake", "")
        job.extend(0, EVENTS[:3])
        job.persisted = 1
        first, second = Subscription(job, lambda: None), Subscription(job, lambda: None)
        assert first.ready() == EVENTS[:3]
        job.reconcile(1, EVENTS[1:4])  # the same, and more
        assert first.ready() == EVENTS[3:4]
        other_events = [Delta(0, "1 and 2", (TokenInfo(1, "1"), TokenInfo(2, "2"))), EVENTS[-1]]
        job.reconcile(2, other_events)
        job.finish()
        assert first.ready() == []
        for subscription in (first, second):
            with pytest.raises(Unavailable, match="from the start"):
                await read(subscription)
        assert await read(Subscription(job, lambda: None)) == [*EVENTS[:2], *other_events]

    run(main)


def test_lease_timeouts_restart_after_a_pause():
    now = 0.0
    timeouts = LeaseTimeouts(10.0, lambda: now)
    first, second = LeaseStatus(LeaseToken("a", 1), "w", 5), LeaseStatus(LeaseToken("b", 1), "v", 5)

    def timed_out_at(seconds: float, *active_leases: LeaseStatus) -> list[LeaseStatus]:
        nonlocal now
        now = seconds
        return timeouts.timed_out(active_leases)

    assert timed_out_at(0, first, second) == timed_out_at(6, first, second) == []
    second = LeaseStatus(LeaseToken("b", 1), "v", 6)
    assert timed_out_at(11, first, second) == [first]
    assert timed_out_at(30, first, second) == []  # nobody looked for 19 seconds
    assert timed_out_at(38, first, second) == [] and timed_out_at(41, first, second) == [first, second]
    timeouts.restart()
    assert timed_out_at(42, first, second) == []


def test_first_check_after_a_pause_expires_no_lease(tmp_path):
    async def main() -> None:
        async with open_gateway(tmp_path, lease=0.5) as gateway:
            subscription, _ = await leased(gateway)
            await gateway.leases.expire_silent()
            time.sleep(0.7)  # it blocks the loop of the gateway
            await gateway.leases.expire_silent()
            assert gateway.leases.expired == 0
            subscription.cancel()

    run(main)


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
        reply = cluster.client.post("/v1/embeddings", json={"model": "fake", "input": "Hi"})
        assert reply.status_code == 413 and "larger than a message" in reply.text
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
        release, calls = cluster.gateway.leases.release, []

        async def fail_once(*args: Any, **named: Any) -> None:
            calls.append(args)
            if len(calls) == 1:
                raise Unavailable("the disk is full")
            await release(*args, **named)

        monkeypatch.setattr(cluster.gateway.leases, "release", fail_once)
        cluster.start_worker(Full())
        stream = Stream(cluster.client, "Hi", 3)
        assert stream.end().text == answer("Hi", count=3)
        assert calls[0] == calls[1] and cluster.snapshot(stream.job).crashes == 0


def test_finish_is_sent_by_the_next_connection():
    async def main() -> None:
        worker = agent.Worker(FakeBackend(), ["http://127.0.0.1:1"], name="w")
        worker._start(wire.LeasedJob("id", 1, "generate", "fake", msgspec.Raw(wire.pack_request(REQUEST))))
        job = worker._jobs["id"]
        assert job.task is not None
        await job.task
        async with worker._connection:
            send_task = asyncio.ensure_future(worker._send())
            while not job.finishing:
                await asyncio.sleep(0)
            [finish_task] = (task for task in asyncio.all_tasks() if "Worker._finish" in repr(task))
            assert inspect.getcoroutinestate(finish_task.get_coro()) == inspect.CORO_CREATED
            for task in (finish_task, send_task):  # as when the end of another job cannot be told just then
                task.cancel()
            await asyncio.wait([send_task])
            worker._connection.url = "http://127.0.0.1:1"
            with pytest.raises(aiohttp.ClientError):
                await worker._register()
        assert worker._jobs["id"] is job and not job.finishing

    run(main)


def test_stale_acknowledgement_does_not_cancel_a_newer_lease():
    async def main() -> None:
        worker = agent.Worker(FakeBackend(seconds=60), ["http://127.0.0.1:1"], name="w")
        lease = wire.LeasedJob("id", 1, "generate", "fake", msgspec.Raw(wire.pack_request(REQUEST)))
        worker._start(lease)
        older_job = worker._jobs["id"]
        worker._start(msgspec.structs.replace(lease, fence=2))
        worker._acknowledge([older_job], {"id": None})
        worker._remove(older_job)
        newer_job = worker._jobs["id"]
        assert newer_job.lease.fence == 2 and newer_job.task is not None and not newer_job.task.cancelling()
        worker._acknowledge([newer_job], {"id": None})
        assert not worker._jobs and newer_job.task.cancelling()

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
        gateway = Gateway(await open_store(str(tmp_path / "jobs.sqlite"), StoreLimits()), ["fake"], 600.0)
        gateway.store.database.shared = shared
        query_task = asyncio.ensure_future(gateway.detokenize("fake", [72]))
        await asyncio.sleep(0.3)
        if shared:
            assert [job.job.kind for job in await gateway.store.list_jobs("queued")] == ["detokenize"]
            query_task.cancel()
            await asyncio.wait([query_task])
        else:
            with pytest.raises(Unavailable, match="no worker"):
                await query_task
        await gateway.close()

    run(main)


def test_a_query_follows_its_worker_and_fails_with_it(tmp_path):
    info = replace(INFO, answers_queries=True)

    async def main() -> None:
        async with open_gateway(tmp_path) as gateway:
            await gateway.leases.register(info)
            first, second = (asyncio.ensure_future(gateway.detokenize("fake", [n])) for n in (72, 105))
            queried = (await gateway.leases.lease("w", 0, 5)).queries
            assert [query.kind for query in queried] == ["detokenize"] * 2
            assert (await gateway.leases.lease("w", 0, 0)).queries == ()
            await gateway.leases.register(info)  # the same process: its connection was lost with the query in it
            assert (await gateway.leases.lease("w", 0, 5)).queries == queried
            await gateway.leases.answer_query("w", queried[0].id, "H")
            await gateway.leases.answer_query("w", queried[0].id, "again")
            assert await first == "H"
            await gateway.leases.unregister("w")
            with pytest.raises(Unavailable, match="lost"):
                await second

    run(main)
