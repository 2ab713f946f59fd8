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
from tests.support.cluster import SLOW, Cluster, running_cluster
from tests.support.completions import Stream, ask, in_parallel, text
from tests.support.proxy import Proxy
from tests.support.sizes import sizes
from tests.support.wait import eventually


@contextlib.contextmanager
def running_fork_server(cluster: Cluster, folder: Path, **options: Any) -> Iterator[WorkerForkServer]:
    fork_server = WorkerForkServer(cluster.url, folder / "log", **options)
    try:
        yield fork_server
    finally:
        fork_server.close()


# Workers


def test_killed_workers_answer_continues_without_gap_or_repeat(tmp_path):
    with (
        running_cluster(tmp_path / "jobs.sqlite", lease=1.0) as cluster,
        running_fork_server(cluster, tmp_path, seconds=SLOW) as fork_server,
    ):
        fork_server.spawn("w0")
        eventually(lambda: cluster.gateway.workers.sessions)
        streams = [Stream(cluster.client, f"{n}", 24, n=1 + n) for n in range(3)]
        eventually(lambda: all(len(stream.pieces) > 5 for stream in streams))
        fork_server.signal("w0", signal.SIGKILL)
        eventually(lambda: cluster.gateway.leases.expired == 3)
        for n, stream in enumerate(streams):
            assert answer(f"{n}", count=24).startswith(stream.text) or n
        fork_server.spawn("w2")
        for n, stream in enumerate(streams):
            assert sorted(stream.end().text.split()) == sorted(
                "".join(answer(f"{n}", count=24, index=index) for index in range(1 + n)).split()
            )
            assert stream.done
        assert streams[0].text == answer("0", count=24)
        snapshot = cluster.snapshot(streams[0].job)
        assert (snapshot.attempts, snapshot.crashes, snapshot.state) == (2, 1, "done")


def test_results_of_a_paused_worker_are_refused(tmp_path):
    """w1 does not stop when it is told to: the fence alone stands between its tokens and the job."""
    with (
        running_cluster(tmp_path / "jobs.sqlite", lease=1.0) as cluster,
        running_fork_server(cluster, tmp_path, seconds=SLOW) as fork_server,
    ):
        fork_server.spawn("w1")
        eventually(lambda: cluster.gateway.workers.sessions)
        stream = Stream(cluster.client, count=40)
        eventually(lambda: len(stream.pieces) > 5)
        fork_server.signal("w1", signal.SIGSTOP)
        fork_server.spawn("w2")
        eventually(lambda: cluster.gateway.leases.expired == 1)
        piece_count = len(stream.pieces)
        eventually(lambda: len(stream.pieces) > piece_count)
        fork_server.signal("w1", signal.SIGCONT)
        assert stream.end().text == answer("Hi", count=40) and stream.done
        eventually(lambda: cluster.gateway.leases.fenced > 0)
        eventually(lambda: "result refused" in fork_server.log.read_text())
        assert cluster.snapshot(stream.job).attempts == 2


def test_stalled_engine_loses_its_jobs_and_gets_no_more(tmp_path):
    limits = StoreLimits(crashes=1)
    with running_cluster(tmp_path / "jobs.sqlite", lease=1.0, stall=1.0, limits=limits) as cluster:
        handle = cluster.start_worker()
        hung_stream = Stream(cluster.client, "HANG").end()
        assert (
            hung_stream.error is not None
            and "every worker that ran" in hung_stream.error["message"]
            and not hung_stream.done
        )
        assert cluster.gateway.workers.sessions["w0"].stalled
        waiting_stream = Stream(cluster.client, "Hi")
        eventually(lambda: cluster.depths() == (1, 0))
        time.sleep(0.5)  # it is asked to, and does not get it
        assert len(handle.backend.requests) == 1
        cluster.start_worker()
        assert waiting_stream.end().text == answer("Hi")


def test_worker_with_a_stalled_engine_stops(tmp_path):
    with running_cluster(tmp_path / "jobs.sqlite", lease=1.0) as cluster:
        handle = cluster.start_worker(stall_seconds=1.0)
        stream = Stream(cluster.client, "HANG", idempotency_key="k")
        with pytest.raises(EngineStopped, match="no step"):
            handle.future.result(30)
        eventually(lambda: cluster.gateway.leases.expired == 1)
        stream.disconnect()
        cluster.client.delete(f"/v1/jobs/{cluster.run(cluster.gateway.store.list_jobs('queued'))[0].job.id}")
        stream.end()


@pytest.mark.parametrize("fault", ["EXIT", pytest.param("SEGFAULT", marks=pytest.mark.slow), "HANG"])
@pytest.mark.parametrize(("count", "workers"), sizes((16, 5), (64, 7)))
def test_one_poisoned_job_costs_few_workers(tmp_path, fault, count, workers):
    """F10. Suspects are leased in halves: one poisoned job among 16 costs five workers, and among 64 seven."""
    all_ended = threading.Event()
    worker_count = 1

    def supervise(fork_server: WorkerForkServer) -> None:
        nonlocal worker_count
        while not all_ended.wait(0.02):
            if not fork_server.lives(f"w{2 * worker_count}"):
                worker_count += 1
                fork_server.spawn(f"w{2 * worker_count}")

    with (
        running_cluster(tmp_path / "jobs.sqlite", lease=1.0, models=["fake"]) as cluster,
        running_fork_server(cluster, tmp_path, slots=count, seconds=0.01, stall=1.0) as fork_server,
    ):
        poison = count // 2 + 5
        prompts = [fault if n == poison else f"job {n}" for n in range(count)]
        streams = [Stream(cluster.client, prompt, 8) for prompt in prompts]
        eventually(lambda: cluster.depths() == (count, 0))
        fork_server.spawn("w2")
        supervisor = threading.Thread(target=supervise, args=(fork_server,))
        supervisor.start()
        try:
            for stream in streams:
                stream.end()
        finally:
            all_ended.set()
            supervisor.join()
        for n, stream in enumerate(streams):
            if n != poison:
                assert stream.text == answer(prompts[n], count=8) and stream.done
        poisoned_stream = streams[poison]
        assert (
            poisoned_stream.error is not None
            and "every worker that ran" in poisoned_stream.error["message"]
            and not poisoned_stream.done
        )
        assert cluster.snapshot(poisoned_stream.job).state == "dead"
        assert worker_count - 1 <= workers
        [snapshot] = cluster.run(cluster.gateway.store.list_jobs("dead"))
        job = cluster.client.get(f"/v1/jobs/{snapshot.job.id}").json()
        assert (job["state"], job["error"]["type"]) == ("dead", "PoisonedJob")


def test_failing_job_does_not_affect_others(tmp_path):
    with running_cluster(tmp_path / "jobs.sqlite") as cluster:
        handle = cluster.start_worker(FakeBackend(seconds=0.01), slots=16)
        prompts = ["NAN" if n == 5 else f"{n}" for n in range(16)]
        replies = in_parallel(16, lambda n: ask(cluster.client, prompts[n]))
        assert [reply.status_code for reply in replies] == [500 if n == 5 else 200 for n in range(16)]
        assert [text(reply) for n, reply in enumerate(replies) if n != 5] == [
            answer(prompt) for prompt in prompts if prompt != "NAN"
        ]
        assert len(handle.backend.requests) == 16 and cluster.gateway.leases.expired == 0


# The store


def pragma(cluster: Cluster, sql: str) -> Any:
    def operation() -> Any:
        rows = yield Statement(f"PRAGMA {sql}")
        return Outcome(rows)

    return cluster.run(cluster.gateway.store.run(operation))


def test_full_disk_refuses_new_jobs_and_finishes_running_ones(tmp_path):
    with running_cluster(tmp_path / "jobs.sqlite", lease=2.0) as cluster:
        handle = cluster.start_worker(FakeBackend(seconds=SLOW))
        stream = Stream(cluster.client, count=30)
        eventually(lambda: stream.pieces)
        pragma(cluster, f"max_page_count = {pragma(cluster, 'page_count')[0][0]}")
        reply = ask(cluster.client, "x" * 100_000)
        assert reply.status_code == 503 and "full" in reply.text
        assert int(reply.headers["retry-after"]) >= 1
        piece_count = len(stream.pieces)
        eventually(lambda: len(stream.pieces) > piece_count + 10)  # nothing of it can be written, and it is told
        eventually(lambda: not handle.backend.running)
        assert not handle.future.done()
        pragma(cluster, "max_page_count = 1000000")
        assert stream.end().text == answer("Hi", count=30) and stream.done
        assert len(handle.backend.requests) == 1 and cluster.gateway.leases.expired == 0
        assert ask(cluster.client).status_code == 200
        assert cluster.run(cluster.gateway.store.check()) == "ok"


def test_pause_of_the_gateway_expires_no_lease(tmp_path):
    """The first check after a pause sees the heartbeats of before the pause, because no worker could renew in it."""
    with running_cluster(tmp_path / "jobs.sqlite", lease=1.0) as cluster:
        handle = cluster.start_worker(FakeBackend(seconds=SLOW))
        stream = Stream(cluster.client, count=40)
        eventually(lambda: stream.pieces)

        async def pause() -> None:
            await cluster.gateway.leases.expire_silent()
            time.sleep(1.5)  # it blocks the gateway's loop, and with it the worker
            await cluster.gateway.leases.expire_silent()

        cluster.run(pause())
        assert stream.end().text == answer("Hi", count=40) and stream.done
        assert cluster.gateway.leases.expired == 0 and len(handle.backend.requests) == 1


# The clock


@pytest.mark.parametrize("days", [1, -1])
def test_wall_clock_jumps_have_no_effect(tmp_path, monkeypatch, days):
    """F13."""
    with running_cluster(tmp_path / "jobs.sqlite", lease=1.0) as cluster:
        cluster.start_worker(FakeBackend(seconds=SLOW))
        stream = Stream(cluster.client, count=25)
        eventually(lambda: stream.pieces)
        now, seconds = time.time, cluster.gateway.leases.mean_job_seconds
        monkeypatch.setattr(time, "time", lambda: now() + 86400 * days)
        assert stream.end().text == answer("Hi", count=25) and stream.done
        assert text(ask(cluster.client, idempotency_key="k")) == answer("Hi")
        assert cluster.gateway.leases.expired == cluster.gateway.leases.fenced == 0
        assert abs(cluster.gateway.leases.mean_job_seconds - seconds) < 10
        assert cluster.client.get(f"/v1/jobs/{stream.job}").json()["state"] == "done"


# Too much


def test_overload_is_refused_at_once_and_accepted_jobs_finish(tmp_path):
    """L6: five times as many requests as there is room for."""
    limits = StoreLimits(queued=15, queued_per_tenant=15)
    with running_cluster(tmp_path / "jobs.sqlite", limits=limits) as cluster:
        cluster.start_worker(FakeBackend(seconds=0.02), slots=4)
        replies = in_parallel(95, lambda n: ask(cluster.client, f"{n}"))
        refused = [reply for reply in replies if reply.status_code != 200]
        assert len(refused) >= 50
        for n, reply in enumerate(replies):
            if reply.status_code == 200:
                assert text(reply) == answer(f"{n}")
            else:
                assert reply.status_code in (429, 503) and 1 <= int(reply.headers["retry-after"]) <= 100
                assert reply.elapsed.total_seconds() < 10
        assert cluster.depths() == (0, 0)


def test_small_tenant_does_not_wait_behind_large_backlog(tmp_path):
    """L7: of 150 jobs that stand in line, a few go before each one of somebody else's."""
    key_names = ("anna", "bert", "worker")
    api_keys = tuple(keys.Key(name, keys.digest(name), worker=name == "worker") for name in key_names)
    slots = 4
    with running_cluster(tmp_path / "jobs.sqlite", keys=Keys(api_keys), key="anna", models=["fake"]) as cluster:
        job_ids = [cluster.run(cluster.gateway.submit(_ask(f"a{n}", "anna"))) for n in range(150)]
        handle = cluster.start_worker(FakeBackend(seconds=0.005), slots=slots, key="worker")
        waits = []
        for n in range(6):
            before = len(handle.backend.requests)
            reply = cluster.client.post(
                "/v1/completions",
                json={"model": "fake", "prompt": f"b{n}", "max_tokens": 4},
                headers={"authorization": "Bearer bert"},
            )
            assert reply.status_code == 200
            [position] = [
                position for position, request in enumerate(handle.backend.requests) if request.prompt == f"b{n}"
            ]
            waits.append(position - before)
            assert len(handle.backend.requests) < 150, "there was nobody to wait for any more"
        assert max(waits) <= 4 * slots, waits
        for job_id in job_ids:
            cluster.run(cluster.gateway.cancel(job_id, "anna"))


def _ask(prompt: str, tenant: str) -> Any:
    from moesaic.backend import GenerationRequest

    return GenerationRequest("fake", prompt=prompt, sampling={"max_tokens": 4, "seed": 1}, tenant=tenant)


@pytest.mark.parametrize(("count", "jobs"), sizes((50, 10), (200, 40)))
def test_many_workers_reconnect_without_a_storm(tmp_path, monkeypatch, count, jobs):
    """F15."""
    started_leases = list[tuple[str, int]]()
    tries, lease = 0, 40.0  # all workers share one process with the gateways, so they need long to register
    start, register = Worker._start, Worker._register

    def record_start(self: Worker, lease: Any) -> None:
        started_leases.append((lease.id, lease.fence))
        start(self, lease)

    async def count_attempt(self: Worker) -> None:
        nonlocal tries
        tries += 1
        await register(self)

    monkeypatch.setattr(Worker, "_start", record_start)
    monkeypatch.setattr(Worker, "_register", count_attempt)
    path = tmp_path / "jobs.sqlite"
    with running_cluster(tmp_path / "beside.sqlite") as other_cluster:
        with running_cluster(path, lease=lease) as first:
            handles = [
                other_cluster.start_worker(FakeBackend(seconds=SLOW), urls=[first.url], slots=1, wait=False)
                for _ in range(count)
            ]
            eventually(lambda: len(first.gateway.workers.sessions) == count)
            streams = [Stream(first.client, f"{n}", 60, idempotency_key=f"k{n}") for n in range(jobs)]
            eventually(lambda: len(started_leases) == jobs)
            tries, closed = 0, time.monotonic()
        for stream in streams:
            stream.end()
        time.sleep(1.5)
        attempts = 8 + 2 * (time.monotonic() - closed)  # the pauses between attempts grow to about a second
        assert tries <= attempts * count, "the workers reconnect without pauses"
        with running_cluster(path, lease=lease, port=first.port) as second:
            eventually(lambda: len(second.gateway.workers.sessions) == count, 2 * lease)
            new_streams = [Stream(second.client, f"{n}", 60, idempotency_key=f"k{n}") for n in range(jobs)]
            for n, stream in enumerate(new_streams):
                assert stream.end().text == answer(f"{n}", count=60) and stream.done
            assert len(started_leases) == len(set(started_leases)), "two were given one lease"
            assert second.gateway.leases.expired == 0
            for handle in handles:
                other_cluster.server.call(handle.worker.stopped.set)


def test_pauses_between_attempts_stay_short_of_a_lease(tmp_path, monkeypatch):
    """Else the leases of a worker would expire although its gateway is back after a long outage."""
    pauses = list[float]()

    def record_pause(low: float, high: float) -> float:
        pauses.append(high)
        return 0.001

    with running_cluster(tmp_path / "jobs.sqlite", lease=5.0) as cluster:
        monkeypatch.setattr("moesaic.cluster.worker.agent.random.uniform", record_pause)
        handle = cluster.start_worker(FakeBackend(), urls=[cluster.url])
        handle.worker._gateways = ["http://127.0.0.1:1"]
        cluster.run(cluster.gateway.leases.unregister(handle.worker._name))
        eventually(lambda: len(pauses) >= 12)
    assert pauses[0] < pauses[2] < 1.0 == max(pauses)


# TLS


CA, OTHER = trustme.CA(), trustme.CA()


def context(certificate: trustme.LeafCert, tls_version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(ssl_context)
    if tls_version:
        ssl_context.set_ciphers("ALL:@SECLEVEL=0")
        ssl_context.minimum_version = ssl_context.maximum_version = tls_version
    return ssl_context


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
    "sound": (lambda: context(CA.issue_cert("127.0.0.1")), "https", "the gateway responded with status 503"),
}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", TLS)
def test_worker_refuses_untrusted_gateways(name, tmp_path, caplog):
    """F16. The last, sound, is talked to, and refuses by itself."""
    make_context, scheme, pattern = TLS[name]
    CA.cert_pem.write_to_path(tmp_path / "ca.pem")
    trusted = client_options.trusted(tmp_path / "ca.pem")
    received = bytearray()
    tries = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            received.extend(await reader.read(100))
            writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
            await writer.drain()
        writer.close()

    async def main() -> None:
        nonlocal tries
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=make_context())
        port = server.sockets[0].getsockname()[1]
        worker = Worker(FakeBackend(), [f"{scheme}://127.0.0.1:{port}"], name="w", key="secret", ssl=trusted)
        log_disconnect = worker._log_disconnect

        def count_attempt(error: BaseException) -> None:
            nonlocal tries
            tries += 1
            log_disconnect(error)

        worker._log_disconnect = count_attempt  # type: ignore[method-assign]
        worker_task = asyncio.ensure_future(worker.run())
        await asyncio.sleep(0.4)
        async with asyncio.timeout(20):
            while not tries:
                await asyncio.sleep(0.01)
        assert not worker_task.done() and not worker.connected.is_set()
        worker.stopped.set()
        await worker_task
        server.close()

    asyncio.run(main())
    warnings = [
        record for record in caplog.records if record.message.startswith("no gateway") and record.levelname == "WARNING"
    ]
    import re

    assert 1 <= len(warnings) <= 2 and re.search(pattern, warnings[0].__dict__["why"]), [
        warning.__dict__["why"] for warning in warnings
    ]
    assert 1 <= tries <= 12
    assert (b"secret" in bytes(received) or b"POST /worker" in bytes(received)) == (name == "sound")


# The network


@pytest.mark.parametrize("mode", ["delay", "drop", "split", "silent"])
def test_bad_network_causes_no_gap_or_repeat(tmp_path, mode):
    """F3."""
    with running_cluster(tmp_path / "jobs.sqlite", lease=1.0) as cluster:
        proxy = Proxy(cluster.server.url and cluster.port)
        url = cluster.run(proxy.start())
        handles = [cluster.start_worker(FakeBackend(seconds=0.01), urls=[url], slots=8) for _ in range(2)]
        proxy.mode = mode
        streams = [Stream(cluster.client, f"{n}", 40) for n in range(16)]
        if mode == "silent":
            time.sleep(2.5)
            proxy.mode = "good"
        for n, stream in enumerate(streams):
            assert stream.end().text == answer(f"{n}", count=40) and stream.done, stream.error
        assert mode != "drop" or proxy.dropped > 3
        proxy.mode = "good"
        for handle in handles:
            assert not handle.future.done()
            handle.stop()
        cluster.run(proxy.stop())
        assert cluster.run(cluster.gateway.store.check()) == "ok"
