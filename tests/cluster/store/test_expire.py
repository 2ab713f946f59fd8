"""Expired leases: suspects, crashes, and the job that kills its workers."""

from __future__ import annotations

import pytest

from moesaic.cluster.jobs import LeaseStatus, LeaseToken, QueueDepth, StoreLimits
from tests.support.stores import SyncStore, job, token_of


def expire(store: SyncStore, *ids: str) -> list[str]:
    return store.expire(store.statuses_of(*ids))


def fill(store: SyncStore, count: int, **changes) -> list[str]:
    ids = [f"j{n}" for n in range(count)]
    for job_id in ids:
        store.submit(job(job_id, **changes))
    return ids


def test_jobs_that_expire_together_are_split_in_halves(store):
    ids = fill(store, 5)
    store.lease_ids(5)
    assert expire(store, *ids) == []
    assert store.depths() == {"m": QueueDepth(queued=5, suspects=5, cost=5)}
    assert [store.snapshot(job_id).crashes for job_id in ids] == [1] * 5
    assert [store.snapshot(job_id).queue_position for job_id in ids] == [0, 1, 2, 3, 4]
    assert store.lease_ids(9) == []
    assert store.lease_ids(9, suspects=True) == ["j0", "j1", "j2"]
    assert store.lease_ids(9, suspects=True) == ["j3", "j4"]
    assert store.lease_ids(9, suspects=True) == []
    assert store.check() == "ok"


def test_large_suspect_group_is_leased_in_parts(store):
    fill(store, 8)
    store.lease_ids(8)
    expire(store, *(f"j{n}" for n in range(8)))
    assert store.lease_ids(3, suspects=True) == ["j0", "j1", "j2"]
    assert store.lease_ids(3, suspects=True) == ["j3"]
    assert store.lease_ids(3, suspects=True) == ["j4", "j5", "j6"]


def test_suspects_respect_models(store):
    fill(store, 2)
    store.submit(job("k", model="n"))
    store.lease_ids(9, models=["m", "n"])
    expire(store, "j0", "j1", "k")
    assert store.lease_ids(9, models=["n"], suspects=True) == ["k"]
    assert store.lease_ids(9, models=["m"], suspects=True) == ["j0", "j1"]


def test_released_suspect_stays_a_suspect(store):
    fill(store, 2)
    store.lease_ids(2)
    expire(store, "j0", "j1")
    [lease] = store.lease("w", ["m"], 2, suspects=True)
    store.release([token_of(lease)])
    assert store.lease_ids(2) == []
    assert store.lease_ids(2, suspects=True) == ["j0"]
    assert store.snapshot("j0").crashes == 1


def test_suspect_can_finish(store):
    fill(store, 1)
    store.lease_ids()
    expire(store, "j0")
    [lease] = store.lease("w", ["m"], 1, suspects=True)
    assert store.finish(token_of(lease), "done", b"fine")
    assert (store.snapshot("j0").state, store.snapshot("j0").crashes) == ("done", 1)


def test_lease_with_a_newer_heartbeat_does_not_expire(store):
    ids = fill(store, 3)
    lease_tokens = [token_of(lease) for lease in store.lease("w", ["m"], 3)]
    active_leases = store.active_leases()
    store.renew([lease_tokens[0]])
    store.finish(lease_tokens[1], "done", b"")
    assert store.expire([*active_leases, LeaseStatus(LeaseToken("nobody's", 1), "w", 1)]) == []
    assert [store.snapshot(job_id).state for job_id in ids] == ["leased", "done", "queued"]
    assert store.snapshot("j2").crashes == 1
    assert store.expire(active_leases) == []
    assert store.expire([]) == []


def test_job_is_dead_at_the_crash_limit(location):
    store = location.open(StoreLimits(crashes=3))
    store.submit(job("a", idempotency_key="n"))
    for crashes in (1, 2):
        assert store.lease_ids(suspects=crashes > 1) == ["a"]
        assert expire(store, "a") == []
        assert (store.snapshot("a").state, store.snapshot("a").crashes) == ("queued", crashes)
    [lease] = store.lease("w", ["m"], 1, suspects=True)
    assert expire(store, "a") == ["a"]
    snapshot = store.snapshot("a")
    assert (snapshot.state, snapshot.crashes, snapshot.worker) == ("dead", 3, "w")
    assert store.renew([token_of(lease)]) == {"a": "fenced"}
    assert store.finish(token_of(lease), "done", b"") is False
    assert [store.cancel("a"), store.depths(), store.active_leases()] == ["dead", {}, []]
    assert store.check() == "ok"


def test_crash_by_the_network_is_forgiven(store):
    fill(store, 3)
    lease_tokens = [token_of(lease) for lease in store.lease("w", ["m"], 3)]
    store.forgive_crash(lease_tokens)  # no lease has expired yet
    expire(store, "j0", "j1", "j2")
    assert store.lease_ids(2, suspects=True) == ["j0", "j1"]
    expire(store, "j0")
    store.forgive_crash([*lease_tokens, LeaseToken("nobody's", 1)])
    assert [store.snapshot(lease_token.id).crashes for lease_token in lease_tokens] == [1, 0, 0]
    assert store.depths() == {"m": QueueDepth(queued=2, leased=1, suspects=1, cost=2)}
    assert (store.lease_ids(9), store.lease_ids(9, suspects=True)) == (["j2"], ["j0"])
    store.release([status.lease_token for status in store.statuses_of("j1")])
    assert store.lease_ids(9) == ["j1"]
    for lease_token in lease_tokens:
        store.cancel(lease_token.id)
    store.forgive_crash(lease_tokens)
    assert store.snapshot("j0").crashes == 1
    assert store.check() == "ok"


@pytest.mark.parametrize("poison", [0, 17, 63])
def test_one_poison_job_of_64_is_found_in_7_crashes(store, poison):
    """The 63 other jobs are done."""
    fill(store, 64)
    dead_ids, crashes = [], 0
    while any(depth.queued for depth in store.depths().values()):
        leases = store.lease("w", ["m"], 64) or store.lease("w", ["m"], 64, suspects=True)
        if any(lease.job.id == f"j{poison}" for lease in leases):
            dead_ids += store.expire(store.active_leases())
            crashes += 1
        else:
            assert all(store.finish(token_of(lease), "done", b"") for lease in leases)
    assert (dead_ids, crashes) == ([f"j{poison}"], 7)
    assert len(store.list_jobs("done")) == 63


def test_dead_job_can_be_revived(location):
    store = location.open(StoreLimits(crashes=1))
    store.submit(job("a", idempotency_key="n"))
    for n in range(3):
        store.submit(job(f"j{n}"))
    assert store.revive("a") is False
    [lease] = store.lease("w", ["m"], 1)
    assert expire(store, "a") == ["a"]
    assert store.revive("a") is True
    assert store.revive("a") is False
    assert store.revive("nobody's") is False
    snapshot = store.snapshot("a")
    assert (snapshot.state, snapshot.crashes) == ("queued", 0)
    assert store.lease_ids(9) == ["j0", "j1", "j2", "a"]
    assert store.snapshot("a").fence > lease.fence
    assert store.check() == "ok"
