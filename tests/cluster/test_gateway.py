"""A gateway and its workers, whole: real HTTP on both sides, and a store on disk."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from moesaic.backend import ModelStats
from moesaic.cluster import gateway as gateways
from moesaic.cluster import wire
from moesaic.serve import keys
from moesaic.serve.keys import Keys
from tests.support.backend import SEED, FakeBackend, answer
from tests.support.cluster import SLOW, Cluster, running_cluster
from tests.support.completions import Stream, ask, body, text
from tests.support.server import running
from tests.support.sizes import sizes
from tests.support.wait import eventually

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
DIALECTS = {
    "chat": ("/v1/chat/completions", "/v1/chat/completions", {**CHAT, "seed": 5, "n": 2}),
    "completions": ("/v1/completions", "/v1/completions", body("Hi", 5, n=3)),
    "tgi": ("/generate", "/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 5, "seed": 5}}),
    "anthropic": ("/v1/messages", "/v1/messages", CHAT),
}
VARYING_FIELDS = re.compile(r'"(id|created)":("[a-z]+[-_][0-9a-f]+"|\d{9,})')
"""Fields that differ in each reply."""


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "jobs.sqlite") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def direct() -> Iterator[httpx.Client]:
    """The same model behind a server of its own."""
    with running(FakeBackend) as server, httpx.Client(base_url=server.url) as client:
        yield client


def comparable_text(response: httpx.Response) -> str:
    return VARYING_FIELDS.sub("", response.text)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_api_answers_like_a_single_server(plain, direct, name, monkeypatch):
    monkeypatch.setattr(gateways.secrets, "randbits", lambda _: SEED)
    path, stream_path, request = DIALECTS[name]
    plain.start_worker()
    assert comparable_text(plain.client.post(path, json=request)) == comparable_text(direct.post(path, json=request))
    stream_request = request if path != stream_path else {**request, "stream": True}
    reply, expected = (client.post(stream_path, json=stream_request) for client in (plain.client, direct))
    assert words(reply.text) == words(expected.text) != ""
    assert reply.headers["content-type"] == expected.headers["content-type"]


def test_a_prompt_that_is_too_long_is_told_as_by_a_single_server(plain, direct):
    plain.start_worker()
    for path, request in (
        ("/v1/completions", {"prompt": "x" * 100_000}),
        ("/v1/completions", {"prompt": "x" * 100_000, "stream": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x" * 100_000}], "max_tokens": 3}),
        ("/generate", {"inputs": "x" * 100_000}),
    ):
        reply, expected = (client.post(path, json=request) for client in (plain.client, direct))
        assert (reply.status_code, reply.json()) == (expected.status_code, expected.json())
        assert reply.status_code in (400, 422) and "100000" in reply.text


def test_many_texts_are_embedded_by_several_jobs(plain):
    plain.start_worker()
    reply = plain.client.post("/v1/embeddings", json={"model": "fake", "input": ["Hi"] * 300}).json()
    assert [len(reply["data"]), reply["usage"]["prompt_tokens"]] == [300, 300]


def words(stream: str) -> str:
    """Return what a stream of any API says; which words come together in one event is a matter of time."""
    return "".join(re.findall(r'"(?:text|content|delta)":"([^"]*)"', stream))


def test_other_operations_run_on_workers(plain, direct):
    plain.start_worker()
    for path, request in (
        ("/tokenize", {"inputs": "Hi"}),
        ("/detokenize", {"model": "fake", "tokens": [72, 105]}),
        ("/v1/embeddings", {"model": "fake", "input": ["Hi", "there"]}),
        ("/v1/messages/count_tokens", CHAT),
        ("/v1/classify", {"model": "fake", "input": "Hi"}),
        ("/v1/models", None),
    ):
        reply, expected = (
            client.get(path) if request is None else client.post(path, json=request)
            for client in (plain.client, direct)
        )
        assert (reply.status_code, comparable_text(reply)) == (expected.status_code, comparable_text(expected)), path


def test_tgi_requests_are_one_durable_job_and_tokenizing_is_none(plain):
    plain.start_worker()
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 4, "truncate": 10}}
    assert plain.client.post("/generate", json=body).status_code == 200
    assert plain.client.post("/tokenize", json={"inputs": "Hi"}).status_code == 200
    jobs = plain.run(plain.gateway.store.list_jobs("done"))
    assert [(snapshot.job.kind, snapshot.job.model) for snapshot in jobs] == [("generate", "fake")]


@pytest.mark.parametrize(("prompt", "status"), [("x" * 5000, 400), ("NAN", 500)])
def test_model_errors_keep_status_and_message(plain, direct, prompt, status):
    plain.start_worker()
    reply, expected = ask(plain.client, prompt), ask(direct, prompt)
    assert reply.status_code == expected.status_code == status
    assert reply.json() == expected.json() != {}
    stream = Stream(plain.client, prompt).end()
    assert stream.error is not None and not stream.done


def test_unknown_model_differs_from_no_worker(plain):
    no_worker = ask(plain.client)
    assert no_worker.status_code == 503 and int(no_worker.headers["retry-after"]) >= 1
    assert "moesaic worker" in no_worker.text
    handle = plain.start_worker()
    unknown_model = plain.client.post("/v1/completions", json=body(model="other"))
    assert unknown_model.status_code == 404 and "'other'" in unknown_model.text
    assert text(plain.client.post("/v1/completions", json=body(model="fake-alias"))) == answer("Hi")
    handle.drain()
    eventually(lambda: not plain.gateway.workers.sessions)
    [card] = plain.gateway.models()
    assert (card.name, card.state) == ("fake", "unloaded")
    stream = Stream(plain.client)
    eventually(lambda: plain.depths() == (1, 0))
    plain.start_worker()
    assert stream.end().text == answer("Hi")  # a model that was there is waited for
    assert plain.gateway.models()[0].state == "loaded"


def test_model_named_at_start_is_accepted_before_a_worker(tmp_path):
    with running_cluster(tmp_path / "jobs.sqlite", models=["fake"]) as cluster:
        stream = Stream(cluster.client)
        eventually(lambda: cluster.depths() == (1, 0))
        eventually(lambda: cluster.gateway.stats().get("fake", ModelStats()).waiting == 1)
        assert 'moesaic_num_requests_waiting{model_name="fake"} 1.0' in cluster.client.get("/metrics").text
        cluster.start_worker()
        assert stream.end().text == answer("Hi")


def test_jobs_go_to_workers_that_offer_their_model(plain):
    worker_one, worker_two, other_worker_one = (
        plain.start_worker(FakeBackend(name), name=name) for name in ("one", "two", "one")
    )
    for model in ("one", "two") * 3:
        reply = plain.client.post("/v1/completions", json=body(f"of {model}", model=model))
        assert text(reply) == answer(f"of {model}")
    assert {request.model for request in worker_one.backend.requests + other_worker_one.backend.requests} <= {"one"}
    assert {request.model for request in worker_two.backend.requests} == {"two"}
    assert {card.name for card in plain.gateway.models()} == {"one", "two"}


def test_stats_sum_workers_and_never_decrease(plain):
    plain.gateway.leases.lease_seconds = 2.0  # so that workers say often how busy they are
    handles = [plain.start_worker(FakeBackend(seconds=SLOW)) for _ in range(2)]
    streams = [Stream(plain.client, f"{n}", 40) for n in range(6)]
    eventually(lambda: plain.gateway.stats()["fake"].running == 6)
    for stream in streams:
        assert stream.end().done
    eventually(lambda: plain.gateway.stats()["fake"].running == 0)
    steps = sum(handle.backend.steps for handle in handles)
    eventually(lambda: plain.gateway.stats()["fake"].steps == steps == 240)
    handles[0].drain()
    eventually(lambda: len(plain.gateway.workers.sessions) == 1)
    assert plain.gateway.stats()["fake"].steps == steps
    assert plain.gateway.leases.fenced == plain.gateway.leases.expired == 0


# The same request again


def test_idempotency_key_gives_one_answer(plain):
    handle = plain.start_worker()
    first, second = ask(plain.client, idempotency_key="k"), ask(plain.client, idempotency_key="k")
    assert comparable_text(first) == comparable_text(second) and text(first) == answer("Hi")
    assert [reply.headers["idempotency-replayed"] for reply in (first, second)] == ["false", "true"]
    assert first.headers["x-moesaic-job"] == second.headers["x-moesaic-job"]
    assert Stream(plain.client, idempotency_key="k").end().text == answer("Hi")  # however it is asked for
    assert len(handle.backend.requests) == 1
    conflict = ask(plain.client, "something else", idempotency_key="k")
    assert conflict.status_code == 409 and conflict.json()["error"]["message"]
    assert "idempotency-replayed" not in ask(plain.client).headers
    assert len(handle.backend.requests) == 2


def test_the_date_of_a_prompt_is_decided_once(plain, monkeypatch):
    """Another worker, or the same request again after midnight, has the prompt with the first date."""
    times = iter((datetime(2026, 12, 3, 23, 59, 59), datetime(2026, 12, 4), datetime(2026, 12, 4, 0, 0, 1)))

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return next(times)

    monkeypatch.setattr(gateways, "datetime", Clock)
    handle = plain.start_worker()
    body, key_headers = {**CHAT, "chat_template_kwargs": {"a": 1}}, {"Idempotency-Key": "k"}
    for headers, replayed in ((key_headers, "false"), (key_headers, "true"), ({}, None)):
        reply = plain.client.post("/v1/chat/completions", json=body, headers=headers)
        assert (reply.status_code, reply.headers.get("idempotency-replayed")) == (200, replayed)
    assert [request.now for request in handle.backend.requests] == ["2026-12-03T23:59:59", "2026-12-04T00:00:01"]
    assert handle.backend.requests[0].chat_template_kwargs == {"a": 1}


def test_idempotency_key_replays_failures(plain):
    handle = plain.start_worker()
    first, second = ask(plain.client, "NAN", idempotency_key="k"), ask(plain.client, "NAN", idempotency_key="k")
    assert first.status_code == second.status_code == 500 and first.json() == second.json()
    assert len(handle.backend.requests) == 1


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of aiohttp's: it is torn down with hundreds open
@pytest.mark.parametrize("count", sizes(200, 1000))
def test_many_concurrent_requests_are_one_job(plain, count):
    """F19."""
    handle = plain.start_worker(FakeBackend(seconds=0.02))

    async def send_all() -> list[tuple[str, str, str]]:
        headers = {"idempotency-key": "k"}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def send() -> tuple[str, str, str]:
                async with session.post(plain.url + "/v1/completions", json=body(), headers=headers) as reply:
                    completion = (await reply.json())["choices"][0]["text"]
                    return completion, reply.headers["x-moesaic-job"], reply.headers["idempotency-replayed"]

            return await asyncio.gather(*(send() for _ in range(count)))

    replies = asyncio.run(send_all())
    assert {completion for completion, _, _ in replies} == {answer("Hi")}
    assert len({job for _, job, _ in replies}) == 1
    assert [replayed for _, _, replayed in replies].count("false") == 1
    assert len(handle.backend.requests) == 1


# Coming back


def events(client: httpx.Client, job: str, after: int | None = None) -> list[tuple[int | None, Any]]:
    headers = {} if after is None else {"last-event-id": str(after)}
    reply = client.get(f"/v1/jobs/{job}/events", headers=headers)
    assert reply.status_code == 200, reply.text
    entries = []
    for block in reply.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        entries.append((int(lines["id"]) if "id" in lines else None, lines["data"]))
    return entries


def test_job_progress_and_events(plain):
    plain.start_worker(FakeBackend(seconds=SLOW))
    stream = Stream(plain.client, count=10)
    eventually(lambda: len(stream.pieces) > 2)
    job = plain.client.get(f"/v1/jobs/{stream.job}").json()
    assert (job["state"], job["model"], job["queue_position"]) == ("leased", "fake", 0)
    assert answer("Hi", count=10).startswith(job["texts"][0]) and job["tokens"][0] >= 2
    entries = events(plain.client, stream.job)  # until its end
    assert stream.end().done
    assert [number for number, _ in entries] == [*range(12), None]
    assert entries[-1][1] == "[DONE]"
    kinds = [json.loads(data)[0] for _, data in entries[:-1]]
    assert kinds == ["b", *["p"] * 10, "e"]
    assert "".join(json.loads(data)[2] for _, data in entries[1:-2]) == answer("Hi", count=10)
    assert events(plain.client, stream.job, after=4) == entries[5:]
    assert events(plain.client, stream.job, after=11) == entries[12:]
    ended_job = plain.client.get(f"/v1/jobs/{stream.job}").json()
    assert (ended_job["state"], ended_job["texts"], ended_job["tokens"]) == ("done", [answer("Hi", count=10)], [10])
    assert plain.client.delete(f"/v1/jobs/{stream.job}").json()["state"] == "done"
    for path in ("/v1/jobs/none", "/v1/jobs/none/events"):
        assert plain.client.get(path).status_code == 404


def test_cancelled_job_stops_at_its_worker(plain):
    handle = plain.start_worker(FakeBackend(seconds=SLOW))
    stream = Stream(plain.client, count=2000)
    eventually(lambda: stream.pieces)
    assert plain.client.delete(f"/v1/jobs/{stream.job}").json()["state"] == "cancelled"
    eventually(lambda: not handle.backend.running)
    assert stream.end().error["message"] == "the request was cancelled" and not stream.done
    assert plain.snapshot(stream.job).state == "cancelled"
    assert plain.client.get(f"/v1/jobs/{stream.job}").json()["error"]["type"] == "Cancelled"
    assert ask(plain.client).status_code == 200
    assert plain.depths() == (0, 0) and not plain.gateway.workers.sessions["w0"].leases


@pytest.mark.parametrize("slots", [1, 4])
def test_disconnect_cancels_the_job(plain, slots):
    """Whether it runs or waits."""
    handle = plain.start_worker(FakeBackend(seconds=SLOW), slots=slots)
    first = Stream(plain.client, "first", 2000)
    eventually(lambda: first.pieces)
    with pytest.raises(httpx.ReadTimeout):
        plain.client.post("/v1/completions", json=body("second", 2000), timeout=0.5)
    first.disconnect()
    eventually(lambda: plain.depths() == (0, 0) and not handle.backend.running)
    assert plain.snapshot(first.job).state == "cancelled"
    first.end()
    assert [snapshot.state for snapshot in plain.run(plain.gateway.store.list_jobs("cancelled"))] == ["cancelled"] * 2


def test_disconnect_with_idempotency_key_keeps_the_job(plain):
    handle = plain.start_worker(FakeBackend(seconds=SLOW))
    stream = Stream(plain.client, "back", 10, idempotency_key="k")
    eventually(lambda: stream.pieces)
    stream.disconnect()
    stream.end()
    assert text(ask(plain.client, "back", 10, idempotency_key="k")) == answer("back", count=10)
    assert len(handle.backend.requests) == 1


# Keys


WORKER, OTHER, ANNA, BERT = ("worker-key", "other-worker-key", "annas-key", "berts-key")
KEYS = (
    keys.Key("rack", keys.digest(WORKER), worker=True, models=("fake",)),
    keys.Key("other", keys.digest(OTHER), worker=True),
    keys.Key("anna", keys.digest(ANNA)),
    keys.Key("bert", keys.digest(BERT)),
)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "jobs.sqlite", keys=Keys(KEYS), key=ANNA) as cluster:
        yield cluster


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_jobs_are_private_to_their_key(guarded):
    guarded.start_worker(FakeBackend(seconds=SLOW), key=WORKER)
    stream = Stream(guarded.client, count=10)
    eventually(lambda: stream.pieces)
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        reply = guarded.client.request(method, f"/v1/jobs/{stream.job}{path}", headers=bearer(BERT))
        assert reply.status_code == 404
        missing_reply = guarded.client.request(method, f"/v1/jobs/{'x' * len(stream.job)}{path}", headers=bearer(BERT))
        assert missing_reply.text.replace("x" * len(stream.job), stream.job) == reply.text
    assert stream.end().done
    assert events(guarded.client, stream.job)[-1][1] == "[DONE]"
    own_reply = guarded.client.post("/v1/completions", json=body(), headers={"idempotency-key": "k"})
    other_reply = guarded.client.post("/v1/completions", json=body(), headers=bearer(BERT) | {"idempotency-key": "k"})
    assert own_reply.headers["x-moesaic-job"] != other_reply.headers["x-moesaic-job"]


def test_worker_keys_open_only_worker_routes(guarded):
    registration = wire.RegisterRequest("w", (), 1)
    for key, path, request, status in (
        (ANNA, "/worker/register", registration, 403),
        (WORKER, "/v1/completions", body(), 403),
        (WORKER, "/v1/jobs/x", None, 403),
        ("wrong", "/worker/register", registration, 401),
        (WORKER, "/worker/register", registration, 400),
    ):
        content = None if request is None else wire.msgspec.json.encode(request)
        method = "GET" if request is None else "POST"
        headers = bearer(key) | {"content-type": "application/json"}
        reply = guarded.client.request(method, path, content=content, headers=headers)
        assert reply.status_code == status, (path, reply.text)


def test_refused_worker_stops_with_the_reason(guarded):
    for key, backend, reason in (
        ("wrong", FakeBackend(), "valid API key"),
        (ANNA, FakeBackend(), "worker's key"),
        (WORKER, FakeBackend("another"), "may not offer another"),
        (None, FakeBackend(), "valid API key"),
    ):
        handle = guarded.start_worker(backend, key=key)
        with pytest.raises(Exception, match=reason):
            handle.future.result(20)
    assert not guarded.gateway.workers.sessions
    assert guarded.start_worker(FakeBackend("another"), key=OTHER).worker.connected.is_set()


# Ends and beginnings


def test_job_ids_are_no_flags(plain, monkeypatch):
    """A command line takes what begins with a hyphen for a flag."""
    drawn = iter(["-flag", "-another", "fine"])
    monkeypatch.setattr("moesaic.cluster.gateway.secrets.token_urlsafe", lambda _: next(drawn))
    plain.start_worker()
    assert ask(plain.client).status_code == 200 and next(drawn, None) is None
    assert plain.snapshot("fine").state == "done"


def test_draining_worker_finishes_its_jobs_and_takes_no_more(plain):
    handle = plain.start_worker(FakeBackend(seconds=SLOW), slots=2)
    streams = [Stream(plain.client, f"{n}", 10) for n in range(4)]
    eventually(lambda: len(handle.backend.running) == 2)
    handle.drain()
    eventually(lambda: plain.depths() == (2, 0))
    assert sum(stream.done for stream in streams) == 2
    assert {snapshot.crashes for snapshot in plain.run(plain.gateway.store.list_jobs("queued"))} == {0}
    plain.start_worker()
    assert sorted(stream.end().text for stream in streams) == sorted(answer(f"{n}", count=10) for n in range(4))
    assert len(handle.backend.requests) == 2 and plain.gateway.leases.expired == 0


def test_drain_timeout_releases_jobs_without_a_crash(plain):
    handle = plain.start_worker(FakeBackend(seconds=SLOW))
    stream = Stream(plain.client, count=30)
    eventually(lambda: len(stream.pieces) > 3)
    handle.drain(0.0)
    [snapshot] = plain.run(plain.gateway.store.list_jobs("queued"))
    assert (snapshot.crashes, snapshot.attempts) == (0, 1) and snapshot.logged > 3
    second = plain.start_worker()
    assert stream.end().text == answer("Hi", count=30)
    assert second.backend.steps < 30, "it was not begun again"
    assert plain.gateway.leases.expired == 0


def test_draining_gateway_finishes_running_jobs(plain):
    plain.start_worker(FakeBackend(seconds=SLOW))
    stream = Stream(plain.client, count=10)
    eventually(lambda: stream.pieces)
    plain.server.call_sync(lambda: setattr(plain.server.app.state, "draining", True))
    refused = ask(plain.client)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert plain.client.get("/ready").status_code == 503
    assert stream.end().text == answer("Hi", count=10) and stream.done


def test_workers_and_readers_survive_a_gateway_restart(tmp_path):
    """The worker lives on another loop than both gateways do."""
    backend, slots = FakeBackend(seconds=SLOW), 4
    with running_cluster(tmp_path / "beside.sqlite") as other_cluster:
        with running_cluster(tmp_path / "jobs.sqlite") as first:
            handle = other_cluster.start_worker(backend, urls=[first.url], slots=slots)
            streams = [Stream(first.client, f"{n}", 40, idempotency_key=f"k{n}") for n in range(slots)]
            eventually(lambda: all(len(stream.pieces) > 3 for stream in streams))
        for stream in streams:
            assert not stream.end().done
        assert not handle.future.done() and len(backend.running) == slots
        eventually(lambda: backend.steps > 15 * slots)  # nobody is there, and it goes on
        with running_cluster(tmp_path / "jobs.sqlite", port=first.port) as second:
            eventually(lambda: second.gateway.workers.models)  # before the worker is back
            new_streams = [Stream(second.client, f"{n}", 40, idempotency_key=f"k{n}") for n in range(slots)]
            for n, stream in enumerate(new_streams):
                assert stream.end().text == answer(f"{n}", count=40) and stream.done
            assert len(backend.requests) == slots and backend.steps == 40 * slots, "nothing was computed twice"
            assert second.gateway.leases.expired == second.gateway.leases.fenced == 0
            handle.stop()


def test_ended_answers_survive_a_restart(tmp_path):
    path = tmp_path / "jobs.sqlite"
    with running_cluster(path) as first:
        first.start_worker()
        reply = ask(first.client, idempotency_key="k")
        failure = ask(first.client, "NAN", idempotency_key="n")
    with running_cluster(path) as second:
        second.start_worker()
        second_reply = ask(second.client, idempotency_key="k")
        assert (
            comparable_text(second_reply) == comparable_text(reply)
            and second_reply.headers["idempotency-replayed"] == "true"
        )
        assert ask(second.client, "NAN", idempotency_key="n").json() == failure.json()
        assert events(second.client, reply.headers["x-moesaic-job"])[-1][1] == "[DONE]"


def test_ended_jobs_leave_nothing_in_memory(plain):
    plain.start_worker()
    for n in range(20):
        ask(plain.client, f"{n}")
    assert not plain.gateway.workers.sessions["w0"].leases
    eventually(lambda: not plain.gateway.jobs.jobs)
    assert plain.run(plain.gateway.store.check()) == "ok"
