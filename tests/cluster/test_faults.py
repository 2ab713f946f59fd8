"""Workers, gateways, disks, clocks and networks that fail: what was accepted is answered, whole and once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from benchmarks.worker_forkserver import WorkerForkServer
from moesaic.cli import client_options
from moesaic.cluster.jobs import StoreLimits
from moesaic.cluster.store._program import Outcome, Statement
from moesaic.cluster.worker.agent import Worker
from moesaic.errors import EngineStopped
from moesaic.serve import keys
from moesaic.serve.keys import Keys
from tests.support.backend import FakeBackend, answer
from tests.support.cluster import SLOW, Site, site
from tests.support.completions import Stream, ask, text, together
from tests.support.proxy import Proxy
from tests.support.sizes import sizes
from tests.support.wait import eventually


@contextlib.contextmanager
def nursed(found: Site, folder: Path, **options: Any) -> Iterator[WorkerForkServer]:
    nursery = WorkerForkServer(found.url, folder / "log", **options)
    try:
        yield nursery
    finally:
        nursery.close()


# Workers


def test_killed_workers_answer_continues_without_gap_or_repeat(tmp_path):
    with site(tmp_path / "jobs.sqlite", lease=1.0) as found, nursed(found, tmp_path, seconds=SLOW) as nursery:
        nursery.spawn("w0")
        eventually(lambda: found.gateway.workers.sessions)
        streams = [Stream(found.client, f"{n}", 24, n=1 + n) for n in range(3)]
        eventually(lambda: all(len(stream.pieces) > 5 for stream in streams))
        nursery.signal("w0", signal.SIGKILL)
        eventually(lambda: found.gateway.leases.expired == 3)
        for n, stream in enumerate(streams):
            assert answer(f"{n}", count=24).startswith(stream.text) or n
        nursery.spawn("w2")
        for n, stream in enumerate(streams):
            assert sorted(stream.end().text.split()) == sorted(
                "".join(answer(f"{n}", count=24, index=index) for index in range(1 + n)).split()
            )
            assert stream.done
        assert streams[0].text == answer("0", count=24)
        seen = found.seen(streams[0].job)
        assert (seen.attempts, seen.crashes, seen.state) == (2, 1, "done")


def test_results_of_a_paused_worker_are_refused(tmp_path):
    """w1 does not stop when it is told to: the fence alone stands between its tokens and the job."""
    with site(tmp_path / "jobs.sqlite", lease=1.0) as found, nursed(found, tmp_path, seconds=SLOW) as nursery:
        nursery.spawn("w1")
        eventually(lambda: found.gateway.workers.sessions)
        stream = Stream(found.client, count=40)
        eventually(lambda: len(stream.pieces) > 5)
        nursery.signal("w1", signal.SIGSTOP)
        nursery.spawn("w2")
        eventually(lambda: found.gateway.leases.expired == 1)
        heard = len(stream.pieces)
        eventually(lambda: len(stream.pieces) > heard)
        nursery.signal("w1", signal.SIGCONT)
        assert stream.end().text == answer("Hi", count=40) and stream.done
        eventually(lambda: found.gateway.leases.fenced > 0)
        eventually(lambda: "result refused" in nursery.log.read_text())
        assert found.seen(stream.job).attempts == 2


def test_stalled_engine_loses_its_jobs_and_gets_no_more(tmp_path):
    bounds = StoreLimits(crashes=1)
    with site(tmp_path / "jobs.sqlite", lease=1.0, stall=1.0, bounds=bounds) as found:
        hand = found.hire()
        hung = Stream(found.client, "HANG").end()
        assert hung.error is not None and "every worker that ran" in hung.error["message"] and not hung.done
        assert found.gateway.workers.sessions["w0"].stalled
        waiting = Stream(found.client, "Hi")
        eventually(lambda: found.depths() == (1, 0))
        time.sleep(0.5)  # it is asked to, and does not get it
        assert len(hand.backend.requests) == 1
        found.hire()
        assert waiting.end().text == answer("Hi")


def test_worker_with_a_stalled_engine_stops(tmp_path):
    with site(tmp_path / "jobs.sqlite", lease=1.0) as found:
        hand = found.hire(stall_seconds=1.0)
        stream = Stream(found.client, "HANG", once="k")
        with pytest.raises(EngineStopped, match="no step"):
            hand.future.result(30)
        eventually(lambda: found.gateway.leases.expired == 1)
        stream.leave()
        found.client.delete(f"/v1/jobs/{found.do(found.gateway.store.list_jobs('queued'))[0].job.id}")
        stream.end()


@pytest.mark.parametrize("how", ["EXIT", pytest.param("SEGFAULT", marks=pytest.mark.slow), "HANG"])
@pytest.mark.parametrize(("count", "workers"), sizes((16, 5), (64, 7)))
def test_one_poisoned_job_costs_few_workers(tmp_path, how, count, workers):
    """F10. Suspects are leased in halves: one poisoned job among 16 costs five workers, and among 64 seven."""
    found_all = threading.Event()
    made = 1

    def supervise(nursery: WorkerForkServer) -> None:
        nonlocal made
        while not found_all.wait(0.02):
            if not nursery.lives(f"w{2 * made}"):
                made += 1
                nursery.spawn(f"w{2 * made}")

    with (
        site(tmp_path / "jobs.sqlite", lease=1.0, models=["fake"]) as found,
        nursed(found, tmp_path, slots=count, seconds=0.01, stall=1.0) as nursery,
    ):
        poison = count // 2 + 5
        prompts = [how if n == poison else f"job {n}" for n in range(count)]
        streams = [Stream(found.client, prompt, 8) for prompt in prompts]
        eventually(lambda: found.depths() == (count, 0))
        nursery.spawn("w2")
        supervisor = threading.Thread(target=supervise, args=(nursery,))
        supervisor.start()
        try:
            for stream in streams:
                stream.end()
        finally:
            found_all.set()
            supervisor.join()
        for n, stream in enumerate(streams):
            if n != poison:
                assert stream.text == answer(prompts[n], count=8) and stream.done
        bad = streams[poison]
        assert bad.error is not None and "every worker that ran" in bad.error["message"] and not bad.done
        assert found.seen(bad.job).state == "dead"
        assert made - 1 <= workers
        [dead] = found.do(found.gateway.store.list_jobs("dead"))
        again = found.client.get(f"/v1/jobs/{dead.job.id}").json()
        assert (again["state"], again["error"]["type"]) == ("dead", "PoisonedJob")


def test_failing_job_does_not_affect_others(tmp_path):
    with site(tmp_path / "jobs.sqlite") as found:
        hand = found.hire(FakeBackend(seconds=0.01), slots=16)
        prompts = ["NAN" if n == 5 else f"{n}" for n in range(16)]
        replies = together(16, lambda n: ask(found.client, prompts[n]))
        assert [each.status_code for each in replies] == [500 if n == 5 else 200 for n in range(16)]
        assert [text(each) for n, each in enumerate(replies) if n != 5] == [answer(p) for p in prompts if p != "NAN"]
        assert len(hand.backend.requests) == 16 and found.gateway.leases.expired == 0


# The store


def pragma(found: Site, sql: str) -> Any:
    def operation() -> Any:
        rows = yield Statement(f"PRAGMA {sql}")
        return Outcome(rows)

    return found.do(found.gateway.store.run(operation))


def test_full_disk_refuses_new_jobs_and_finishes_running_ones(tmp_path):
    with site(tmp_path / "jobs.sqlite", lease=2.0) as found:
        hand = found.hire(FakeBackend(seconds=SLOW))
        stream = Stream(found.client, count=30)
        eventually(lambda: stream.pieces)
        pragma(found, f"max_page_count = {pragma(found, 'page_count')[0][0]}")
        refused = ask(found.client, "x" * 100_000)
        assert refused.status_code == 503 and "full" in refused.text
        assert int(refused.headers["retry-after"]) >= 1
        heard = len(stream.pieces)
        eventually(lambda: len(stream.pieces) > heard + 10)  # nothing of it can be written, and it is told
        eventually(lambda: not hand.backend.running)
        assert not hand.future.done()
        pragma(found, "max_page_count = 1000000")
        assert stream.end().text == answer("Hi", count=30) and stream.done
        assert len(hand.backend.requests) == 1 and found.gateway.leases.expired == 0
        assert ask(found.client).status_code == 200
        assert found.do(found.gateway.store.check()) == "ok"


def test_pause_of_the_gateway_expires_no_lease(tmp_path):
    """Nor does a gateway that stood still: no beat was seen, and none could be."""
    with site(tmp_path / "jobs.sqlite", lease=1.0) as found:
        hand = found.hire(FakeBackend(seconds=SLOW))
        stream = Stream(found.client, count=40)
        eventually(lambda: stream.pieces)
        found.server.call(lambda: time.sleep(2.0))  # everything here: the gateway's loop itself
        assert stream.end().text == answer("Hi", count=40) and stream.done
        assert found.gateway.leases.expired == 0 and len(hand.backend.requests) == 1


# The clock


@pytest.mark.parametrize("days", [1, -1])
def test_wall_clock_jumps_have_no_effect(tmp_path, monkeypatch, days):
    """F13."""
    with site(tmp_path / "jobs.sqlite", lease=1.0) as found:
        found.hire(FakeBackend(seconds=SLOW))
        stream = Stream(found.client, count=25)
        eventually(lambda: stream.pieces)
        now, seconds = time.time, found.gateway.leases.mean_job_seconds
        monkeypatch.setattr(time, "time", lambda: now() + 86400 * days)
        assert stream.end().text == answer("Hi", count=25) and stream.done
        assert text(ask(found.client, once="k")) == answer("Hi")
        assert found.gateway.leases.expired == found.gateway.leases.fenced == 0
        assert abs(found.gateway.leases.mean_job_seconds - seconds) < 10
        assert found.client.get(f"/v1/jobs/{stream.job}").json()["state"] == "done"


# Too much


def test_overload_is_refused_at_once_and_accepted_jobs_finish(tmp_path):
    """L6: five times as many requests as there is room for."""
    bounds = StoreLimits(queued=15, queued_per_tenant=15)
    with site(tmp_path / "jobs.sqlite", bounds=bounds) as found:
        found.hire(FakeBackend(seconds=0.02), slots=4)
        replies = together(95, lambda n: ask(found.client, f"{n}"))
        refused = [each for each in replies if each.status_code != 200]
        assert len(refused) >= 50
        for n, each in enumerate(replies):
            if each.status_code == 200:
                assert text(each) == answer(f"{n}")
            else:
                assert each.status_code in (429, 503) and 1 <= int(each.headers["retry-after"]) <= 100
                assert each.elapsed.total_seconds() < 10
        assert found.depths() == (0, 0)


def test_small_tenant_does_not_wait_behind_large_backlog(tmp_path):
    """L7: of 150 jobs that stand in line, a few go before each one of somebody else's."""
    who = ("anna", "bert", "worker")
    listed = tuple(keys.Key(name, keys.digest(name), worker=name == "worker") for name in who)
    slots = 4
    with site(tmp_path / "jobs.sqlite", keys=Keys(listed), key="anna", models=["fake"]) as found:
        asked = [found.do(found.gateway.submit(_ask(f"a{n}", "anna"))) for n in range(150)]
        hand = found.hire(FakeBackend(seconds=0.005), slots=slots, key="worker")
        waits = []
        for n in range(6):
            before = len(hand.backend.requests)
            reply = found.client.post(
                "/v1/completions",
                json={"model": "fake", "prompt": f"b{n}", "max_tokens": 4},
                headers={"authorization": "Bearer bert"},
            )
            assert reply.status_code == 200
            [place] = [place for place, each in enumerate(hand.backend.requests) if each.prompt == f"b{n}"]
            waits.append(place - before)
            assert len(hand.backend.requests) < 150, "there was nobody to wait for any more"
        assert max(waits) <= 4 * slots, waits
        for job_id in asked:
            found.do(found.gateway.cancel(job_id, "anna"))


def _ask(prompt: str, tenant: str) -> Any:
    from moesaic.backend import GenerationRequest

    return GenerationRequest("fake", prompt=prompt, sampling={"max_tokens": 4, "seed": 1}, tenant=tenant)


@pytest.mark.parametrize(("count", "jobs"), sizes((50, 10), (200, 40)))
def test_many_workers_reconnect_without_a_storm(tmp_path, monkeypatch, count, jobs):
    """F15."""
    begun = list[tuple[str, int]]()
    tries = 0
    was, register = Worker._start, Worker._register

    def begin(self: Worker, lease: Any) -> None:
        begun.append((lease.id, lease.fence))
        was(self, lease)

    async def counted(self: Worker) -> None:
        nonlocal tries
        tries += 1
        await register(self)

    monkeypatch.setattr(Worker, "_start", begin)
    monkeypatch.setattr(Worker, "_register", counted)
    where = tmp_path / "jobs.sqlite"
    with site(tmp_path / "beside.sqlite") as beside:
        with site(where) as first:
            hands = [
                beside.hire(FakeBackend(seconds=SLOW), urls=[first.url], slots=1, wait=False) for _ in range(count)
            ]
            eventually(lambda: len(first.gateway.workers.sessions) == count)
            streams = [Stream(first.client, f"{n}", 60, once=f"k{n}") for n in range(jobs)]
            eventually(lambda: len(begun) == jobs)
            tries, closed = 0, time.monotonic()
        for stream in streams:
            stream.end()
        time.sleep(1.5)
        attempts = 8 + 2 * (time.monotonic() - closed)  # the pauses between attempts grow to about a second
        assert tries <= attempts * count, "the workers reconnect without pauses"
        with site(where, port=first.port) as second:
            eventually(lambda: len(second.gateway.workers.sessions) == count, 40)
            again = [Stream(second.client, f"{n}", 60, once=f"k{n}") for n in range(jobs)]
            for n, stream in enumerate(again):
                assert stream.end().text == answer(f"{n}", count=60) and stream.done
            assert len(begun) == len(set(begun)), "two were given one lease"
            assert second.gateway.leases.expired == 0
            for hand in hands:
                beside.server.call(hand.worker.stopped.set)


# TLS


CA, OTHER = trustme.CA(), trustme.CA()


def context(certificate: trustme.LeafCert, newest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    out = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(out)
    if newest:
        out.set_ciphers("ALL:@SECLEVEL=0")
        out.minimum_version = out.maximum_version = newest
    return out


def expired() -> trustme.LeafCert:
    from datetime import UTC, datetime

    return CA.issue_cert(
        "127.0.0.1", not_before=datetime(2020, 1, 1, tzinfo=UTC), not_after=datetime(2021, 1, 1, tzinfo=UTC)
    )


TLS = {
    "expired": (lambda: context(expired()), "https", "expired"),
    "self-signed": (lambda: context(OTHER.issue_cert("127.0.0.1")), "https", "CERTIFICATE_VERIFY_FAILED"),
    "wrong host": (lambda: context(CA.issue_cert("example.org")), "https", "IP address mismatch"),
    "TLS 1.1": (lambda: context(CA.issue_cert("127.0.0.1"), ssl.TLSVersion.TLSv1_1), "https", "SSL"),
    "plaintext to TLS": (lambda: context(CA.issue_cert("127.0.0.1")), "http", "Disconnected|reset|HTTP"),
    "TLS to plaintext": (lambda: None, "https", "SSL|WRONG_VERSION"),
    "sound": (lambda: context(CA.issue_cert("127.0.0.1")), "https", "the gateway answered 503"),
}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", TLS)
def test_worker_refuses_untrusted_gateways(name, tmp_path, caplog):
    """F16. The last, sound, is talked to, and refuses by itself."""
    make, scheme, why = TLS[name]
    CA.cert_pem.write_to_path(tmp_path / "ca.pem")
    trusted = client_options.trusted(tmp_path / "ca.pem")
    spoken = bytearray()
    tries = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            spoken.extend(await reader.read(100))
            writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
            await writer.drain()
        writer.close()

    async def main() -> None:
        nonlocal tries
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=make())
        port = server.sockets[0].getsockname()[1]
        worker = Worker(FakeBackend(), [f"{scheme}://127.0.0.1:{port}"], name="w", key="secret", ssl=trusted)
        lost = worker._log_disconnect

        def counted(error: BaseException) -> None:
            nonlocal tries
            tries += 1
            lost(error)

        worker._log_disconnect = counted  # type: ignore[method-assign]
        working = asyncio.ensure_future(worker.run())
        await asyncio.sleep(0.4)
        async with asyncio.timeout(20):
            while not tries:
                await asyncio.sleep(0.01)
        assert not working.done() and not worker.connected.is_set()
        worker.stopped.set()
        await working
        server.close()

    asyncio.run(main())
    said = [
        record for record in caplog.records if record.message.startswith("no gateway") and record.levelname == "WARNING"
    ]
    import re

    assert 1 <= len(said) <= 2 and re.search(why, said[0].__dict__["why"]), [each.__dict__["why"] for each in said]
    assert 1 <= tries <= 12
    assert (b"secret" in bytes(spoken) or b"POST /worker" in bytes(spoken)) == (name == "sound")


# The network


@pytest.mark.parametrize("mode", ["delay", "drop", "split", "silent"])
def test_bad_network_causes_no_gap_or_repeat(tmp_path, mode):
    """F3."""
    with site(tmp_path / "jobs.sqlite", lease=1.0) as found:
        proxy = Proxy(found.server.url and found.port)
        url = found.do(proxy.start())
        hands = [found.hire(FakeBackend(seconds=0.01), urls=[url], slots=8) for _ in range(2)]
        proxy.mode = mode
        streams = [Stream(found.client, f"{n}", 40) for n in range(16)]
        if mode == "silent":
            time.sleep(2.5)
            proxy.mode = "good"
        for n, stream in enumerate(streams):
            assert stream.end().text == answer(f"{n}", count=40) and stream.done, stream.error
        assert mode != "drop" or proxy.dropped > 3
        proxy.mode = "good"
        for hand in hands:
            assert not hand.future.done()
            hand.stop()
        found.do(proxy.stop())
        assert found.do(found.gateway.store.check()) == "ok"
