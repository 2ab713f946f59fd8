"""Jobs are accepted once, within limits, and stored from then on."""

from __future__ import annotations

import pytest

from moesaic.cluster.jobs import Job, QueueDepth, StoreLimits
from moesaic.errors import Conflict, InvalidParameter, Overloaded, Unavailable
from tests.support.stores import job, token_of

WHOLE = Job("a", "m", "generate", b"\x00\xff body", "tenant", 7, -3, "name", "digest")


def test_submitted_job_is_stored(store):
    assert store.submit(WHOLE) == "a"
    snapshot = store.snapshot("a")
    assert (snapshot.job, snapshot.state) == (WHOLE, "queued")
    assert (snapshot.fence, snapshot.worker, snapshot.attempts, snapshot.crashes, snapshot.logged, snapshot.result) == (
        0,
        "",
        0,
        0,
        0,
        b"",
    )
    assert store.check() == "ok"


def test_submitted_job_survives_a_restart(location):
    first = location.open()
    first.submit(WHOLE)
    first.close()
    assert location.open().snapshot("a").job == WHOLE


def test_repeated_id_returns_the_same_job(store):
    """A client that got no response repeats its request."""
    assert [store.submit(WHOLE), store.submit(WHOLE)] == ["a", "a"]
    with pytest.raises(Conflict):
        store.submit(job("a", digest="another"))
    assert store.depths() == {"m": QueueDepth(queued=1, cost=7)}


def test_repeated_idempotency_key_returns_the_same_job(store):
    assert store.submit(job("a", tenant="t", idempotency_key="n", digest="d")) == "a"
    assert store.submit(job("b", tenant="t", idempotency_key="n", digest="d")) == "a"
    assert store.snapshot("b") is None
    with pytest.raises(Conflict):
        store.submit(job("c", tenant="t", idempotency_key="n", digest="e"))


def test_idempotency_keys_are_per_tenant(store):
    assert store.submit(job("a", tenant="t", idempotency_key="n", digest="d")) == "a"
    assert store.submit(job("b", tenant="u", idempotency_key="n", digest="e")) == "b"
    assert store.submit(job("c", tenant="t", idempotency_key="", digest="e")) == "c"
    assert store.submit(job("d", tenant="t", idempotency_key="", digest="f")) == "d"


def test_concurrent_submits_with_one_key_are_one_job(store):
    ids = store.all(*(store.store.submit(job(f"j{n}", tenant="t", idempotency_key="n")) for n in range(1000)))
    assert len(set(ids)) == 1
    assert store.depths()["m"].queued == 1


def test_idempotency_key_outlives_its_job(store):
    store.submit(job("a", idempotency_key="n"))
    [lease] = store.lease("w", ["m"], 1)
    store.finish(token_of(lease), "done", b"")
    assert store.submit(job("b", idempotency_key="n")) == "a"


def test_tenant_limit(location):
    store = location.open(StoreLimits(queued_per_tenant=2))
    store.submit(job("a", tenant="t"))
    store.submit(job("b", tenant="t", priority=5))
    with pytest.raises(Overloaded):
        store.submit(job("c", tenant="t", model="other"))
    assert store.snapshot("c") is None
    store.submit(job("d", tenant="u"))
    store.lease_ids()
    store.submit(job("c", tenant="t"))
    assert store.submit(job("a", tenant="t")) == "a"  # repeating a job needs no room


@pytest.mark.parametrize("limits", [StoreLimits(queued=2), StoreLimits(queued_cost=20)])
def test_global_limits(location, limits):
    store = location.open(limits)
    store.submit(job("a", tenant="t", cost=10))
    store.submit(job("b", tenant="u", cost=10, model="other"))
    with pytest.raises(Unavailable):
        store.submit(job("c", tenant="v", cost=10))
    store.cancel("a")
    store.submit(job("c", tenant="v", cost=10))
    assert store.check() == "ok"


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""},
        {"id": "a\0"},
        {"tenant": "\ud800"},
        {"model": "\0"},
        {"idempotency_key": "\udfff"},
        {"cost": -1},
        {"cost": 2**63},
        {"priority": -(2**63)},
    ],
)
def test_unstorable_values_are_refused(store, change):
    with pytest.raises(InvalidParameter):
        store.submit(job(**{"job_id": "a", **change}))
    assert store.depths() == {}


def test_text_and_bytes_of_every_kind(store):
    text = "".join(map(chr, (1, 9, 10, 39, 34, 92, 0x2028, 0x1F600, 0xFFFF)))
    body = bytes(range(256)) * 4000
    store.submit(job("a", model=text, kind=text, tenant=text, idempotency_key=text, digest=text, body=body))
    assert store.snapshot("a").job == Job("a", text, text, body, text, 1, 0, text, text)
    [lease] = store.lease(text, [text], 1)
    assert lease.job == store.snapshot("a").job
    assert store.snapshot("a").worker == text


def test_unstorable_ids_are_unknown(store):
    for job_id in ("", "a\0", "\ud800"):
        assert store.snapshot(job_id) is None
        assert store.cancel(job_id) is None
        assert store.log(job_id) == []
        assert store.revive(job_id) is False
