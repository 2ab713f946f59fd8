"""What a worker may not do: no message of a wrong owner, fence or place changes a job or breaks the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moesaic.backend import ModelInfo
from moesaic.cluster.jobs import LeaseStatus, LeaseToken
from moesaic.cluster.protocols import WorkerInfo
from moesaic.serve import keys
from moesaic.serve.keys import Keys
from tests.support.backend import SEED, answer, text, token
from tests.support.cluster import Cluster, running_cluster
from tests.support.completions import Stream
from tests.support.wait import eventually

GOOD, THIEF, ANNA = "good-key", "thiefs-key", "annas-key"
KEYS = (
    keys.Key("good", keys.digest(GOOD), worker=True),
    keys.Key("thief", keys.digest(THIEF), worker=True),
    keys.Key("anna", keys.digest(ANNA)),
)
COUNT = 6
TOLD = 3
"""Pieces that have come of the job that the messages are about."""


def piece(position: int) -> list[Any]:
    token_id = token("Hi", SEED, 0, position)
    return ["p", 0, text([token_id]), [[token_id, text([token_id])]]]


class Scene:
    """A job in the middle of its answer, leased by hand; and a worker that would like to have it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        for key, name in ((GOOD, "w"), (THIEF, "w")):
            self.send(key, "register", {"name": name, "models": [{"name": "fake"}], "slots": 1 if key == GOOD else 8})
        self.stream = Stream(cluster.client, count=COUNT)
        eventually(lambda: cluster.depths()[0])
        [lease] = self.send(GOOD, "lease", {"name": "w", "free_slots": 1, "wait_seconds": 5})["leases"]
        self.id, self.fence = lease["id"], lease["fence"]
        self.tell(0, [["b", 0, [], 2], *map(piece, range(TOLD))])
        eventually(lambda: cluster.snapshot(self.id).logged == 1 + TOLD)

    def post(self, key: str, operation: str, body: Any) -> Any:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return self.cluster.client.post(f"/worker/{operation}", content=content, headers=headers)

    def send(self, key: str, operation: str, body: Any) -> Any:
        reply = self.post(key, operation, body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def tell(self, start: int, events: list[Any]) -> Any:
        return self.send(GOOD, "events", {"name": "w", "batches": [[self.id, self.fence, start, events]]})

    def state(self) -> Any:
        snapshot = self.cluster.snapshot(self.id)
        job = self.cluster.gateway.jobs.jobs[self.id]
        log = self.cluster.run(self.cluster.gateway.store.log(self.id))
        return snapshot, log, list(job.events), job.worker, job.ended

    def lease_status(self) -> LeaseStatus:
        [status] = self.cluster.run(self.cluster.gateway.store.active_leases())
        return status


@pytest.fixture(scope="module")
def scene(module_path: Path) -> Iterator[Scene]:
    path = module_path / "jobs.sqlite"
    with running_cluster(path, lease=600.0, keys=Keys(KEYS), key=ANNA) as cluster:
        scene = Scene(cluster)
        yield scene
        scene.tell(1 + TOLD, [piece(position) for position in range(TOLD, COUNT)])
        request = {"name": "w", "id": scene.id, "fence": scene.fence, "start": 1 + COUNT}
        end = ["e", 0, "length", 2, COUNT]
        assert scene.send(GOOD, "finish", request | {"events": [end]}) == {"accepted": True}
        assert scene.send(GOOD, "finish", request | {"events": [end]}) == {"accepted": True}  # said again
        assert scene.stream.end().text == answer("Hi", count=COUNT) and scene.stream.done


numbers = st.integers(-2, 6) | st.integers() | st.sampled_from([2**53, 2**63, 2**70])
events = st.lists(
    st.sampled_from([piece(0), piece(5), ["b", 0], ["e", 0, "stop", 1, 1]])
    | st.tuples(st.sampled_from("bpex"), numbers).map(list),
    max_size=3,
)


@st.composite
def wrong(draw: st.DrawFn) -> tuple[str, str, str, Any, Any, list[Any]]:
    """A key, a route, what is wrong with the claim, a fence and a start that may be absurd, and events."""
    operation = draw(st.sampled_from(["events", "finish", "renew", "release"]))
    flaw = draw(st.sampled_from(["owner", "fence", "id", *["start"] * (operation in ("events", "finish"))]))
    key = THIEF if flaw == "owner" else draw(st.sampled_from([GOOD, THIEF]))
    return key, operation, flaw, draw(numbers), draw(numbers), draw(events)


@given(wrong())
@example((THIEF, "renew", "owner", 1, 0, []))
@example((THIEF, "release", "owner", 1, 0, []))
@example((THIEF, "finish", "owner", 1, 4, [["e", 0, "stop", 1, 1]]))
@example((THIEF, "events", "owner", 1, 4, [piece(3)]))
@example((GOOD, "finish", "start", 1, 9, [["e", 0, "stop", 1, 1]]))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_only_the_newest_fence_can_change_a_job(scene, message):
    key, operation, flaw, fence, start, claimed_events = message
    job_id = "x" * 24 if flaw == "id" else scene.id
    if flaw != "fence":
        fence = scene.fence
    elif fence == scene.fence:
        fence += 1
    if flaw == "start":
        start = abs(start) + 2 + TOLD  # behind what is known
    before, status = scene.state(), scene.lease_status()
    body = {
        "events": {"name": "w", "batches": [[job_id, fence, start, claimed_events]]},
        "finish": {"name": "w", "id": job_id, "fence": fence, "start": start, "events": claimed_events},
        "renew": {"name": "w", "leases": [[job_id, fence]], "stats": {}},
        "release": {"name": "w", "leases": [[job_id, fence]]},
    }[operation]
    reply = scene.post(key, operation, body)
    assert reply.status_code in (200, 400, 409), reply.text
    if reply.status_code == 200 and operation == "renew" and flaw != "start":
        assert reply.json() == {"states": {job_id: "fenced"}}
    if reply.status_code == 200 and operation == "finish":
        assert reply.json() == {"accepted": False}
    assert scene.state() == before
    if key == THIEF or operation != "events":
        assert scene.lease_status() == status, "another's lease was kept alive"


junk = st.recursive(
    st.none() | st.booleans() | numbers | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    *("name", "models", "slots", "about", "leases", "instance", "free_slots", "wait_seconds", "stats"),
    *("batches", "id", "fence", "start", "outcome"),
)
bodies = (
    st.binary(max_size=40)
    | junk
    | st.dictionaries(st.sampled_from(FIELDS), junk | st.just("t"), max_size=5)
    | st.fixed_dictionaries({"name": st.just("t"), "models": st.just([{"name": "f"}]), "slots": numbers})
    | st.fixed_dictionaries({"name": st.just("t"), "free_slots": numbers, "wait_seconds": st.just(0)})
)


@given(st.sampled_from(["register", "lease", "renew", "events", "finish", "answer", "release"]), bodies)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_invalid_messages_are_refused_without_effect(scene, operation, body):
    before = scene.state()
    if operation == "lease" and isinstance(body, dict):
        body = body | {"wait_seconds": 0}
    reply = scene.post(THIEF, operation, body)
    assert reply.status_code in (200, 400, 404, 409, 413, 415), (body, reply.text)
    assert scene.state() == before


@pytest.mark.parametrize(
    "body, reason",
    [
        (b'{"name":"w","batches":[["a",1,0,[["p",0,"",[],[],%b]]]]}' % (b"[" * 5000 + b"]" * 5000), "nested too deep"),
        (b'{"name":"w","batches":[["a",1,0,[["p",0,"\\ud800"]]]]}', "is not JSON"),
        (b'{"name":"w","batches":[["a",1,0,[["p",0,"\xff"]]]]}', "is not JSON"),
        (b'{"name":"w","batches":[["a",1,0,[["p",0,"",[[NaN,""]]]]]]}', "is not JSON"),
        (b'{"name":"w","batches":[["a",1,0,[["p",-1]]]]}', "batches[0][3][0]"),
        (b'{"name":"w","batches":[],"more":1}', "more"),
        (b'{"name":"w"', "is not JSON"),
    ],
)
def test_invalid_events_are_refused(scene, body, reason):
    before = scene.state()
    reply = scene.post(GOOD, "events", body)
    assert reply.status_code == 400 and reason in reply.text
    assert scene.state() == before


def test_worker_names_are_separate_per_key(scene):
    assert set(scene.cluster.gateway.workers.sessions) >= {"good/w", "thief/w"}
    assert scene.send(THIEF, "register", {"name": "good/w", "models": [{"name": "fake"}]})["acknowledged"] == {}
    assert "thief/good/w" in scene.cluster.gateway.workers.sessions
    assert scene.lease_status().worker == "good/w"


def test_registering_again_gives_no_extra_slots(tmp_path):
    """As the same process, or another of that name: what it still has counts."""
    with running_cluster(tmp_path / "jobs.sqlite", lease=600.0) as cluster:
        gateway, card = cluster.gateway, ModelInfo("fake")
        info = WorkerInfo("w", (card,), slots=2, instance="1")
        cluster.run(gateway.leases.register(info))
        streams = [Stream(cluster.client, f"{n}") for n in range(4)]
        eventually(lambda: cluster.depths() == (4, 0))
        leases = cluster.run(gateway.leases.lease("w", 2, 0)).leases
        lease_tokens = [LeaseToken(lease.job.id, lease.fence) for lease in leases]
        assert len(lease_tokens) == 2
        for instance in ("1", "2"):
            acknowledged = cluster.run(
                gateway.leases.register(WorkerInfo("w", (card,), slots=2, instance=instance), lease_tokens)
            )
            assert acknowledged == {lease_token.id: (0, 0) for lease_token in lease_tokens}
            assert cluster.run(gateway.leases.lease("w", 2, 0)).leases == ()
        assert cluster.depths() == (2, 2)
        # An answer that never reached the process: nobody is to blame, and another process's loss is one.
        cluster.run(gateway.leases.register(WorkerInfo("w", (card,), slots=2, instance="2"), lease_tokens[:1]))
        assert cluster.snapshot(lease_tokens[1].id).crashes == 0 and gateway.leases.expired == 0
        cluster.run(gateway.leases.register(WorkerInfo("w", (card,), slots=2, instance="3")))
        assert cluster.snapshot(lease_tokens[0].id).crashes == 1 and gateway.leases.expired == 1
        for stream in streams:
            cluster.client.delete(f"/v1/jobs/{stream.job}" if stream.headers else "/v1/jobs/x")
        for snapshot in cluster.run(gateway.store.list_jobs("queued")):
            cluster.run(gateway.cancel(snapshot.job.id, ""))
        for stream in streams:
            stream.end()
