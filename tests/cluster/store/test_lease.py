"""Only the newest fence holds a lease."""

from __future__ import annotations

import pytest

from moesaic.cluster.jobs import LeaseStatus, LeaseToken, LogRecord, QueueDepth
from moesaic.errors import InvalidParameter
from tests.support.stores import job, token_of


def test_lease_contains_the_job(store):
    submitted = job("a", tenant="t", cost=3, priority=2, idempotency_key="n", digest="d")
    store.submit(submitted)
    [lease] = store.lease("w", ["m"], 5)
    assert (lease.job, lease.fence, lease.log) == (submitted, 1, ())
    snapshot = store.snapshot("a")
    assert (snapshot.state, snapshot.fence, snapshot.worker, snapshot.attempts) == ("leased", 1, "w", 1)
    assert store.depths() == {"m": QueueDepth(leased=1)}


def test_lease_respects_models_and_limit(store):
    for n in range(5):
        store.submit(job(f"a{n}"))
        store.submit(job(f"b{n}", model="n"))
    assert store.lease_ids(2) == ["a0", "a1"]
    assert store.lease_ids(2, models=["n", "n", "nobody's"]) == ["b0", "b1"]
    assert store.lease_ids(9, models=["nobody's"]) == []
    assert store.lease_ids(0) == []
    assert store.lease_ids(9, models=[]) == []
    assert sorted(store.lease_ids(9, models=["m", "n"])) == ["a2", "a3", "a4", "b2", "b3", "b4"]
    with pytest.raises(InvalidParameter):
        store.lease_ids(worker="\0")


def test_leased_job_is_not_leased_again(store):
    for n in range(50):
        store.submit(job(f"j{n}"))
    results = store.all(*(store.store.lease(f"w{n}", ["m"], 7) for n in range(10)))
    ids = [lease.job.id for leases in results for lease in leases]
    assert len(ids) == len(set(ids)) == 50


def test_fences_grow(store):
    store.submit(job("a"))
    fences = []
    for _ in range(4):
        [lease] = store.lease("w", ["m"], 1)
        fences.append(lease.fence)
        store.release([token_of(lease)])
    assert fences == sorted(set(fences))
    assert store.snapshot("a").attempts == 4


def test_renew_reports_the_state_of_each_lease(store):
    for job_id in "abcd":
        store.submit(job(job_id))
    a, b, c, d = (token_of(lease) for lease in store.lease("w", ["m"], 4))
    store.cancel("b")
    store.release([c])
    store.finish(d, "done", b"")
    lease_token = store.renew([a, b, c, d, LeaseToken("nobody's", 1), LeaseToken("a\0", 1)])
    assert lease_token == {
        "a": "ok",
        "b": "cancelled",
        "c": "fenced",
        "d": "fenced",
        "nobody's": "fenced",
        "a\0": "fenced",
    }
    assert store.renew([LeaseToken("a", a.fence + 1)]) == {"a": "fenced"}
    assert store.renew([a, LeaseToken("a", a.fence + 1)]) == {"a": "ok"}
    assert store.renew([]) == {}


def test_heartbeat_rises_with_each_call(store):
    store.submit(job("a"))
    [lease] = store.lease("w", ["m"], 1)
    statuses = [store.active_leases()]
    store.renew([token_of(lease)])
    statuses.append(store.active_leases())
    store.append({token_of(lease): LogRecord(0, 1, b"x")})
    statuses.append(store.active_leases())
    store.append({token_of(lease): LogRecord(7, 1, b"behind the end, and still a sign of life")})
    statuses.append(store.active_leases())
    store.renew([LeaseToken("a", 0)])
    assert store.active_leases() == statuses[-1]
    assert [status.lease_token for [status] in statuses] == [token_of(lease)] * 4
    assert [status.worker for [status] in statuses] == ["w"] * 4
    numbers = [status.heartbeat for [status] in statuses]
    assert numbers == sorted(set(numbers))
    store.release([token_of(lease)])
    store.lease("w", ["m"], 1)
    assert store.active_leases()[0].heartbeat > numbers[-1]


def test_active_leases_lists_live_leases_only(store):
    for job_id in "abcd":
        store.submit(job(job_id))
    leases = [token_of(lease) for lease in store.lease("w", ["m"], 3)]
    store.finish(leases[0], "failed", b"")
    store.cancel("b")
    assert [status.lease_token for status in store.active_leases()] == [leases[2]]


def test_released_job_goes_first_without_a_crash(store):
    for n in range(6):
        store.submit(job(f"j{n}"))
    leases = store.lease("w", ["m"], 3)
    store.release([token_of(lease) for lease in leases[1:]] + [LeaseToken("j5", 0), LeaseToken("nobody's", 1)])
    assert [store.snapshot(job_id).state for job_id in ("j0", "j1", "j2", "j5")] == [
        "leased",
        "queued",
        "queued",
        "queued",
    ]
    assert store.snapshot("j1").crashes == 0
    assert store.depths() == {"m": QueueDepth(queued=5, leased=1, cost=5)}
    assert store.lease_ids(9) == ["j1", "j2", "j3", "j4", "j5"]
    store.release([])


def test_stale_lease_writes_nothing(store):
    """After a lease was revoked, its holder cannot write. Everything else depends on this."""
    store.submit(job("a"))
    [first] = store.lease("one", ["m"], 1)
    stale = token_of(first)
    store.append({stale: LogRecord(0, 2, b"xy")})
    store.release([stale])
    for leased_again in (False, True):
        if leased_again:
            [second] = store.lease("two", ["m"], 1)
            assert second.log == (LogRecord(0, 2, b"xy"),)
        assert store.append({stale: LogRecord(2, 1, b"z")}) == {"a": None}
        assert store.finish(stale, "done", b"stale") is False
        assert store.renew([stale]) == {"a": "fenced"}
        assert store.expire([LeaseStatus(stale, "one", 99)]) == []
        store.release([stale])
        assert (store.snapshot("a").state, store.snapshot("a").logged) == ("leased" if leased_again else "queued", 2)
    assert store.append({stale: LogRecord(2, 1, b"z"), token_of(second): LogRecord(2, 1, b"u")}) == {"a": 3}
    assert store.finish(token_of(second), "done", b"fresh") is True
    assert store.finish(stale, "done", b"stale") is False
    assert (store.snapshot("a").result, store.log("a")[-1].blob) == (b"fresh", b"u")


def test_two_stores_share_their_state(location):
    """Two gateways share a store if its kind allows that."""
    if location.name == "sqlite":
        pytest.skip("one gateway only")
    first, second = location.open(), location.open()
    first.submit(job("a"))
    assert second.lease_ids() == ["a"]
    assert first.lease_ids() == []
    assert [status.worker for status in first.active_leases()] == ["w"]
