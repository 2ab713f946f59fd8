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
from moesaic.cluster import gateway as gateways
from moesaic.cluster import protocol as wire
from moesaic.cluster import queue, work, worker
from moesaic.cluster.desk import Recruit
from moesaic.cluster.gateway import Gateway
from moesaic.cluster.jobs import Beat, Bounds, Hold, Job, Record, Seen
from moesaic.cluster.live import Following, Live
from moesaic.cluster.silence import Silence
from moesaic.errors import NotFound, Overloaded, Unavailable
from tests.support.backend import FakeBackend, answer
from tests.support.cluster import site
from tests.support.completions import Stream
from tests.support.wait import eventually

RECRUIT = Recruit("w", (ModelInfo("fake"),), slots=4, run="1")
ASK = GenerationRequest("fake", prompt="Hi", sampling={"max_tokens": 3})
EVENTS: list[Event] = [
    PromptDone(0),
    *(Delta(0, f"{n}", (TokenInfo(n, f"{n}"),)) for n in range(3)),
    Finished(0, "length", 2, 3),
]


@asynccontextmanager
async def gateway(folder: Path, lease: float = 600.0) -> AsyncIterator[Gateway]:
    made = Gateway(await queue.open(str(folder / "jobs.sqlite"), Bounds()), ["fake"], lease)
    try:
        await made.enlist(RECRUIT)
        yield made
    finally:
        await made.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


async def leased(found: Gateway) -> tuple[Any, Hold]:
    following = await found.generate(ASK)
    [lease] = (await found.lease("w", 1, 5)).leases
    return following, Hold(lease.job.id, lease.fence)


async def read(following: Any) -> list[Event]:
    return [event async for event in following]


async def look(found: Gateway, hold: Hold) -> Seen:
    seen = await found.store.look(hold.id)
    assert seen is not None
    return seen


@pytest.mark.parametrize("steps", range(6))
def test_an_end_that_was_written_is_told_though_the_worker_has_left(tmp_path, steps):
    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, hold = await leased(found)
            telling = asyncio.ensure_future(found.finish("w", hold, 0, EVENTS))
            for _ in range(steps):
                await asyncio.sleep(0)
            telling.cancel()
            await asyncio.wait([telling])
            if steps:
                assert await read(following) == EVENTS
                assert not found.crew["w"].holds
            else:  # finish() had not begun: the worker still holds the job
                assert (await look(found, hold)).state == "leased"
                assert found.crew["w"].holds
                following.cancel()

    run(main)


@pytest.mark.parametrize("steps", [*range(8), None])
def test_a_lease_that_nobody_heard_of_is_given_back_without_blame(tmp_path, steps):
    async def main() -> None:
        async with gateway(tmp_path) as found:
            following = await found.generate(ASK)
            asking = asyncio.ensure_future(found.lease("w", 1, 5))
            if steps is None:
                await asyncio.wait([asking])
            for _ in range(steps or 0):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking])
            if steps in (0, 1, None):  # in between, either may come first
                assert asking.cancelled() == (steps is not None)
            if asking.cancelled():
                [lease] = (await found.lease("w", 1, 5)).leases
            else:  # lease() had returned: the worker heard of the job and holds it
                [lease] = asking.result().leases
                assert found.crew["w"].holds
            seen = await found.store.look(lease.job.id)
            assert seen is not None and (seen.state, seen.crashes) == ("leased", 0)
            following.cancel()

    run(main)


def test_a_question_that_another_has_replaced_is_given_nothing(tmp_path):
    """The connection of the first was lost in silence: what it was given nobody would hear of."""

    async def main() -> None:
        async with gateway(tmp_path) as found:
            asking = asyncio.ensure_future(found.lease("w", 1, 20))
            await asyncio.sleep(0.05)
            following = await found.generate(ASK)
            found.join(RECRUIT)
            assert (await asking).leases == ()
            assert len((await found.lease("w", 1, 5)).leases) == 1
            following.cancel()

    run(main)


def test_an_end_is_told_once_it_counts(tmp_path):
    """Whoever has heard all of an answer leaves, which would take back a job that has not ended."""

    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, hold = await leased(found)
            await found.take("w", {hold: (0, EVENTS)})
            assert following.ready() == EVENTS[:-1]
            reading = asyncio.ensure_future(read(following))
            assert await found.finish("w", hold, len(EVENTS), [])
            assert await reading == EVENTS[-1:]

    run(main)


@pytest.mark.parametrize("stalled", [False, True])
def test_what_was_lost_with_a_worker_that_lives_is_not_to_blame(tmp_path, stalled):
    """It was the network's doing; unless its engine stood still."""

    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, hold = await leased(found)
            found.crew["w"].stalled = stalled
            await found._lose(await found.store.beats())
            assert (await look(found, hold)).crashes == 1
            assert await found.enlist(RECRUIT, [hold]) == {hold.id: None}
            assert (await look(found, hold)).crashes == stalled
            assert (await found.store.depths())["fake"].suspects == stalled
            following.cancel()

    run(main)


def test_a_network_that_fails_again_and_again_makes_no_poison(tmp_path):
    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, hold = await leased(found)
            for _ in range(2 * Bounds().crashes):
                await found.dismiss("w")
                await found.enlist(RECRUIT, [hold])
                [lease] = (await found.lease("w", 1, 5)).leases
                hold = Hold(lease.job.id, lease.fence)
            assert await found.finish("w", hold, 0, EVENTS)
            assert await read(following) == EVENTS

    run(main)


@pytest.mark.parametrize("shared", [False, True])
def test_who_left_may_be_reading_at_another_gateway(tmp_path, shared, monkeypatch):
    for name in ("LOOK_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(gateways, name, 0.0)

    async def main() -> None:
        async with gateway(tmp_path) as found:
            found.store.shared = shared
            following = await found.generate(replace(ASK, idempotency_key="k"))
            following.cancel()
            [id] = found.lives
            await found._sweep()
            await asyncio.sleep(0.1)
            assert (await look(found, Hold(id, 0))).state == ("queued" if shared else "cancelled")
            assert not (shared and found.lives)

    run(main)


def test_a_job_that_ended_unheard_of_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(gateways, "LOOK_SECONDS", 0.0)

    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, hold = await leased(found)
            reading = asyncio.ensure_future(read(following))
            found.store._news.clear()
            await found.store.finish(hold, "done", b"", Record(0, len(EVENTS), wire.pack_events(EVENTS)))
            found.lives[hold.id].worker = ""
            await found._sweep()
            assert await reading == EVENTS

    run(main)


def test_a_write_whose_answer_was_lost_is_not_written_again(tmp_path):
    """More is on disk than the gateway knows to be there."""

    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, hold = await leased(found)
            await found.take("w", {hold: (0, EVENTS[:3])})
            await found.store.append({hold: Record(0, 2, wire.pack_events(EVENTS[:2]))})
            with pytest.raises(Unavailable, match="say it again"):
                await found.finish("w", hold, 3, EVENTS[3:])
            assert await found.finish("w", hold, 3, EVENTS[3:])
            assert await read(following) == EVENTS
            assert await found.store.check() == "ok"

    run(main)


def test_a_worker_that_is_dismissed_while_it_speaks_is_told_to_enlist(tmp_path):
    async def main() -> None:
        async with gateway(tmp_path) as found:
            following, hold = await leased(found)
            found.lives.clear()  # as after a restart: the store has to be asked
            speaking = asyncio.ensure_future(found.take("w", {hold: (0, EVENTS[:2])}))
            await asyncio.sleep(0)
            found.forget("w")
            assert await speaking == {hold.id: (2, 0)}
            with pytest.raises(NotFound, match="enlist"):
                await found.take("w", {hold: (2, EVENTS[2:])})
            following.cancel()

    run(main)


def test_an_answer_that_went_on_otherwise_is_not_mixed_with_what_was_told():
    """This gateway was cut off, and told more than the next worker was given to go on from."""

    async def main() -> None:
        live = Live("id", "fake", "")
        live.extend(0, EVENTS[:3])
        live.kept = 1
        reader, later = Following(live, lambda: None), Following(live, lambda: None)
        assert reader.ready() == EVENTS[:3]
        live.agree(1, EVENTS[1:4])  # the same, and more
        assert reader.ready() == EVENTS[3:4]
        other = [Delta(0, "1 and 2", (TokenInfo(1, "1"), TokenInfo(2, "2"))), EVENTS[-1]]
        live.agree(2, other)
        live.end()
        assert reader.ready() == []
        for each in (reader, later):
            with pytest.raises(Unavailable, match="from the start"):
                await read(each)
        assert await read(Following(live, lambda: None)) == [*EVENTS[:2], *other]

    run(main)


def test_only_who_was_listened_to_is_silent():
    now = 0.0
    silence = Silence(10.0, lambda: now)
    one, two = Beat(Hold("a", 1), "w", 5), Beat(Hold("b", 1), "v", 5)

    def at(time: float, *beats: Beat) -> list[Beat]:
        nonlocal now
        now = time
        return silence.of(beats)

    assert at(0, one, two) == at(6, one, two) == []
    two = Beat(Hold("b", 1), "v", 6)
    assert at(11, one, two) == [one]
    assert at(30, one, two) == []  # nobody looked for 19 seconds
    assert at(38, one, two) == [] and at(41, one, two) == [one, two]
    silence.forgive()
    assert at(42, one, two) == []


def test_what_is_too_long_for_a_message_comes_in_several(tmp_path, monkeypatch):
    """An event that is too long by itself fails its job, not the worker; so does an outcome."""
    monkeypatch.setattr(worker, "MESSAGE_BYTES", 300)

    class Large(FakeBackend):
        async def embed(self, model: str, texts: Any) -> tuple[list[list[float]], int]:
            return [[0.5] * 200], 1

    with site(tmp_path / "jobs.sqlite") as found:
        hand = found.hire(Large())
        streams = [Stream(found.client, f"{n}", 50) for n in range(3)]
        for n, stream in enumerate(streams):
            assert stream.end().text == answer(f"{n}", count=50) and stream.done
        large = found.client.post("/v1/embeddings", json={"model": "fake", "input": "Hi"})
        assert large.status_code == 413 and "larger than a message" in large.text
        monkeypatch.setattr(worker, "MESSAGE_BYTES", 20)
        assert found.client.post("/v1/completions", json={"model": "fake", "prompt": "Hi"}).status_code == 413
        assert not hand.future.done() and not hand.backend.running


def test_what_no_worker_knows_how_to_do_fails(tmp_path):
    with site(tmp_path / "jobs.sqlite") as found:
        hand = found.hire()
        found.do(found.gateway.store.submit(Job("x", "fake", "dance", b"{}")))
        eventually(lambda: found.seen("x").state == "failed")
        assert b"how to dance" in found.seen("x").result and found.seen("x").attempts == 1
        assert not hand.future.done()


def test_what_is_given_back_is_so_though_a_gateway_could_not_hear_it_at_first(tmp_path, monkeypatch):
    class Full(FakeBackend):
        async def generate(self, request: GenerationRequest) -> Any:
            if not self.requests:
                self.requests.append(request)
                raise Overloaded("not now")
            return await super().generate(request)

    with site(tmp_path / "jobs.sqlite", lease=1.0) as found:
        release, asked = found.gateway.release, []

        async def deaf(*args: Any, **named: Any) -> None:
            asked.append(args)
            if len(asked) == 1:
                raise Unavailable("the disk is full")
            await release(*args, **named)

        monkeypatch.setattr(found.gateway, "release", deaf)
        found.hire(Full())
        stream = Stream(found.client, "Hi", 3)
        assert stream.end().text == answer("Hi", count=3)
        assert asked[0] == asked[1] and found.seen(stream.job).crashes == 0


def test_an_end_that_no_connection_was_left_for_is_told_by_the_next():
    async def main() -> None:
        made = worker.Worker(FakeBackend(), ["http://127.0.0.1:1"], name="w")
        made._begin(wire.Leased("id", 1, "ask", "fake", msgspec.Raw(wire.pack_ask(ASK))))
        job = made._works["id"]
        assert job.task is not None
        await job.task
        async with aiohttp.ClientSession() as made._http:
            sending = asyncio.ensure_future(made._send())
            while not job.ending:
                await asyncio.sleep(0)
            [telling] = (task for task in asyncio.all_tasks() if "Worker._end" in repr(task))
            assert inspect.getcoroutinestate(telling.get_coro()) == inspect.CORO_CREATED
            for task in (telling, sending):  # as when the end of another job cannot be told just then
                task.cancel()
            await asyncio.wait([sending])
            made._url = "http://127.0.0.1:1"
            with pytest.raises(aiohttp.ClientError):
                await made._enlist()
        assert made._works["id"] is job and not job.ending

    run(main)


def test_news_of_an_older_lease_do_not_stop_the_newer_one():
    async def main() -> None:
        made = worker.Worker(FakeBackend(seconds=60), ["http://127.0.0.1:1"], name="w")
        lease = wire.Leased("id", 1, "ask", "fake", msgspec.Raw(wire.pack_ask(ASK)))
        made._begin(lease)
        older = made._works["id"]
        made._begin(msgspec.structs.replace(lease, fence=2))
        made._learn([older], {"id": None})
        made._forget(older)
        newer = made._works["id"]
        assert newer.lease.fence == 2 and newer.task is not None and not newer.task.cancelling()
        made._learn([newer], {"id": None})
        assert not made._works and newer.task.cancelling()

    run(main)


def test_of_what_is_on_disk_a_worker_keeps_no_more_than_a_bound(monkeypatch):
    monkeypatch.setattr(work, "KEPT_BYTES", 10 * work.EVENT_BYTES)
    job = work.Work(wire.Leased("id", 1, "ask", "fake", msgspec.Raw(b"{}")))
    job.events = [wire.to_wire(Delta(0, f"{n}")) for n in range(30)]
    job.acknowledge(20, 5)
    assert (job.first, job.known, len(job.events)) == (5, 20, 25) and job.unsent()[0].text == "20"
    job.acknowledge(8, 5)  # another gateway, which knows less
    assert job.unsent()[0].text == "8"
    job.acknowledge(10**9, 10**9)  # or nonsense
    assert job.unsent() == [] and job.first == 30
