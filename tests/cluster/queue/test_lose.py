"""Workers that are lost, and the job that kills them."""

from __future__ import annotations

import pytest

from moesaic.cluster.jobs import LeaseStatus, LeaseToken, QueueDepth, StoreLimits
from tests.support.stores import Sync, hold, job


def expire(store: Sync, *ids: str) -> list[str]:
    return store.expire(store.beats_of(*ids))


def fill(store: Sync, count: int, **changes) -> list[str]:
    ids = [f"j{n}" for n in range(count)]
    for job_id in ids:
        store.submit(job(job_id, **changes))
    return ids


def test_jobs_that_expire_together_are_split_in_halves(store):
    ids = fill(store, 5)
    store.take(5)
    assert expire(store, *ids) == []
    assert store.depths() == {"m": QueueDepth(queued=5, suspects=5, cost=5)}
    assert [store.snapshot(job_id).crashes for job_id in ids] == [1] * 5
    assert [store.snapshot(job_id).queue_position for job_id in ids] == [0, 1, 2, 3, 4]
    assert store.take(9) == []
    assert store.take(9, suspects=True) == ["j0", "j1", "j2"]
    assert store.take(9, suspects=True) == ["j3", "j4"]
    assert store.take(9, suspects=True) == []
    assert store.check() == "ok"


def test_large_suspect_group_is_leased_in_parts(store):
    fill(store, 8)
    store.take(8)
    expire(store, *(f"j{n}" for n in range(8)))
    assert store.take(3, suspects=True) == ["j0", "j1", "j2"]
    assert store.take(3, suspects=True) == ["j3"]
    assert store.take(3, suspects=True) == ["j4", "j5", "j6"]


def test_suspects_respect_models(store):
    fill(store, 2)
    store.submit(job("k", model="n"))
    store.take(9, models=["m", "n"])
    expire(store, "j0", "j1", "k")
    assert store.take(9, models=["n"], suspects=True) == ["k"]
    assert store.take(9, models=["m"], suspects=True) == ["j0", "j1"]


def test_released_suspect_stays_a_suspect(store):
    fill(store, 2)
    store.take(2)
    expire(store, "j0", "j1")
    [lease] = store.lease("w", ["m"], 2, suspects=True)
    store.release([hold(lease)])
    assert store.take(2) == []
    assert store.take(2, suspects=True) == ["j0"]
    assert store.snapshot("j0").crashes == 1


def test_suspect_can_finish(store):
    fill(store, 1)
    store.take()
    expire(store, "j0")
    [lease] = store.lease("w", ["m"], 1, suspects=True)
    assert store.finish(hold(lease), "done", b"fine")
    assert (store.snapshot("j0").state, store.snapshot("j0").crashes) == ("done", 1)


def test_lease_with_a_newer_heartbeat_does_not_expire(store):
    ids = fill(store, 3)
    holds = [hold(lease) for lease in store.lease("w", ["m"], 3)]
    active_leases = store.active_leases()
    store.renew([holds[0]])
    store.finish(holds[1], "done", b"")
    assert store.expire([*active_leases, LeaseStatus(LeaseToken("nobody's", 1), "w", 1)]) == []
    assert [store.snapshot(job_id).state for job_id in ids] == ["leased", "done", "queued"]
    assert store.snapshot("j2").crashes == 1
    assert store.expire(active_leases) == []
    assert store.expire([]) == []


def test_job_is_dead_at_the_crash_limit(place):
    store = place.open(StoreLimits(crashes=3))
    store.submit(job("a", idempotency_key="n"))
    for crashes in (1, 2):
        assert store.take(suspects=crashes > 1) == ["a"]
        assert expire(store, "a") == []
        assert (store.snapshot("a").state, store.snapshot("a").crashes) == ("queued", crashes)
    [lease] = store.lease("w", ["m"], 1, suspects=True)
    assert expire(store, "a") == ["a"]
    seen = store.snapshot("a")
    assert (seen.state, seen.crashes, seen.worker) == ("dead", 3, "w")
    assert store.renew([hold(lease)]) == {"a": "fenced"}
    assert store.finish(hold(lease), "done", b"") is False
    assert [store.cancel("a"), store.depths(), store.active_leases()] == ["dead", {}, []]
    assert store.check() == "ok"


def test_crash_by_the_network_is_forgiven(store):
    fill(store, 3)
    holds = [hold(lease) for lease in store.lease("w", ["m"], 3)]
    store.forgive_crash(holds)  # none is lost yet
    expire(store, "j0", "j1", "j2")
    assert store.take(2, suspects=True) == ["j0", "j1"]
    expire(store, "j0")
    store.forgive_crash([*holds, LeaseToken("nobody's", 1)])
    assert [store.snapshot(each.id).crashes for each in holds] == [1, 0, 0]
    assert store.depths() == {"m": QueueDepth(queued=2, leased=1, suspects=1, cost=2)}
    assert (store.take(9), store.take(9, suspects=True)) == (["j2"], ["j0"])
    store.release([beat.lease_token for beat in store.beats_of("j1")])
    assert store.take(9) == ["j1"]
    for each in holds:
        store.cancel(each.id)
    store.forgive_crash(holds)
    assert store.snapshot("j0").crashes == 1
    assert store.check() == "ok"


@pytest.mark.parametrize("poison", [0, 17, 63])
def test_one_poison_job_of_64_is_found_in_7_crashes(store, poison):
    """And the 63 others are done."""
    fill(store, 64)
    dead, crashes = [], 0
    while any(depth.queued for depth in store.depths().values()):
        leases = store.lease("w", ["m"], 64) or store.lease("w", ["m"], 64, suspects=True)
        if any(lease.job.id == f"j{poison}" for lease in leases):
            dead += store.expire(store.active_leases())
            crashes += 1
        else:
            assert all(store.finish(hold(lease), "done", b"") for lease in leases)
    assert (dead, crashes) == ([f"j{poison}"], 7)
    assert len(store.list_jobs("done")) == 63


def test_dead_job_can_be_revived(place):
    store = place.open(StoreLimits(crashes=1))
    store.submit(job("a", idempotency_key="n"))
    for n in range(3):
        store.submit(job(f"j{n}"))
    assert store.revive("a") is False
    [lease] = store.lease("w", ["m"], 1)
    assert expire(store, "a") == ["a"]
    assert store.revive("a") is True
    assert store.revive("a") is False
    assert store.revive("nobody's") is False
    seen = store.snapshot("a")
    assert (seen.state, seen.crashes) == ("queued", 0)
    assert store.take(9) == ["j0", "j1", "j2", "a"]
    assert store.snapshot("a").fence > lease.fence
    assert store.check() == "ok"
