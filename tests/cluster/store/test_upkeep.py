"""Lists, notifications, ticks, and the removal of old jobs."""

from __future__ import annotations

import pytest

from moesaic.cluster.jobs import LogRecord, QueueDepth, StoreLimits
from moesaic.errors import Conflict, Unavailable
from tests.support.stores import SyncStore, job, token_of


def end(store: SyncStore, job_id: str, **changes) -> None:
    store.submit(job(job_id, **changes))
    [lease] = store.lease("w", ["m"], 1)
    store.append({token_of(lease): LogRecord(0, 1, b"x")})
    assert store.finish(token_of(lease), "done", b"result")


def ticks(store: SyncStore, count: int) -> None:
    now = store.tick(-1)
    for _ in range(count):
        now = store.tick(now)


def test_tick_advances_once_for_all_gateways(store):
    now = store.tick(-1)
    assert store.tick(-1) == now
    assert store.tick(now) == now + 1
    assert store.tick(now) == now + 1
    assert store.tick(now + 1) == now + 2


def test_ticks_survive_a_restart(location):
    first = location.open()
    ticks(first, 5)
    first.close()
    assert location.open().tick(-1) == 5


def test_ended_job_is_kept_for_its_retention(location):
    store = location.open(StoreLimits(retention_ticks=3, idempotency_ticks=5))
    end(store, "a", idempotency_key="n", digest="d")
    store.submit(job("waits"))
    ticks(store, 3)
    assert (store.snapshot("a").result, store.log("a")) == (b"result", [LogRecord(0, 1, b"x")])
    ticks(store, 1)
    assert (store.snapshot("a"), store.log("a"), store.list_jobs("done")) == (None, [], [])
    ticks(store, 1)
    assert store.submit(job("b", idempotency_key="n", digest="d")) == "a"
    with pytest.raises(Conflict):
        store.submit(job("b", idempotency_key="n", digest="e"))
    ticks(store, 1)
    assert store.submit(job("b", idempotency_key="n", digest="e")) == "b"
    assert store.snapshot("waits").state == "queued"
    assert store.check() == "ok"


def test_oldest_ended_jobs_are_dropped_first(location):
    store = location.open(StoreLimits(max_ended=100))
    ids = [f"j{n}" for n in range(700)]
    store.all(*(store.store.submit(job(job_id)) for job_id in ids))
    store.all(*(store.store.cancel(job_id) for job_id in ids))
    end(store, "late")
    ticks(store, 1)
    assert len(store.list_jobs("cancelled", 9999)) == 99
    assert store.snapshot("late") is not None
    assert store.check() == "ok"


def test_active_jobs_are_never_dropped(location):
    store = location.open(StoreLimits(retention_ticks=1, idempotency_ticks=1, max_ended=0))
    store.submit(job("a", idempotency_key="n"))
    store.submit(job("b", idempotency_key="o"))
    [lease] = store.lease("w", ["m"], 1)
    ticks(store, 9)
    assert store.submit(job("c", idempotency_key="n")) == "a"
    assert store.submit(job("c", idempotency_key="o")) == "b"
    assert store.finish(token_of(lease), "done", b"")
    assert store.lease_ids() == ["b"]


def test_revived_job_is_not_dropped(location):
    store = location.open(StoreLimits(crashes=1, retention_ticks=3, idempotency_ticks=3))
    store.submit(job("a", idempotency_key="n"))
    store.lease_ids()
    store.expire(store.active_leases())
    ticks(store, 2)
    store.revive("a")
    ticks(store, 9)
    assert store.snapshot("a").state == "queued"
    assert store.submit(job("b", idempotency_key="n")) == "a"


def test_idle_tenants_and_models_are_deleted(location):
    """Tenants and models without jobs are deleted, and those with jobs are kept."""
    store = location.open()
    for n in range(20):
        end(store, f"j{n}", tenant=f"t{n}")
    store.submit(job("waits", tenant="t"))
    ticks(store, 1)
    store.submit(job("more", tenant="t"))
    assert store.lease_ids(2) == ["waits", "more"]
    assert store.check() == "ok"


def test_depths_count_by_model(store):
    for n in range(5):
        store.submit(job(f"a{n}", cost=3, priority=n % 2))
        store.submit(job(f"b{n}", model="n"))
    store.lease_ids(3)
    assert store.depths() == {"m": QueueDepth(queued=2, leased=3, cost=6), "n": QueueDepth(queued=5, cost=5)}


def test_lists_are_newest_first_without_bodies(store):
    for n in range(9):
        store.submit(job(f"j{n}", tenant="t", cost=4))
    store.lease_ids(4)
    queued = store.list_jobs("queued")
    assert [snapshot.job.id for snapshot in queued] == ["j8", "j7", "j6", "j5", "j4"]
    assert [snapshot.job.id for snapshot in store.list_jobs("leased", 2)] == ["j3", "j2"]
    assert {snapshot.job.body for snapshot in queued} == {b""}
    assert (queued[0].job.tenant, queued[0].job.cost, queued[0].state) == ("t", 4, "queued")
    assert store.list_jobs("dead") == []


def test_listeners_get_changes(location):
    store = location.open(StoreLimits(crashes=1))
    notified: set[str] = set()

    def news() -> set[str]:
        changes = set(notified)
        notified.clear()
        return changes

    store.listen(notified.update)
    store.submit(job("a"))
    assert news() == {""}
    [lease] = store.lease("w", ["m"], 1)
    assert news() == {"a"}
    store.renew([token_of(lease)])
    store.snapshot("a")
    assert news() == set()
    store.append({token_of(lease): LogRecord(0, 1, b"x")})
    assert news() == {"a"}
    store.release([token_of(lease)])
    assert news() == {"", "a"}
    store.lease_ids()
    news()
    store.expire(store.active_leases())
    assert news() == {"a"}
    store.revive("a")
    assert news() == {"", "a"}
    store.cancel("a")
    assert news() == {"a"}
    store.cancel("a")
    assert news() == set()


def test_closed_store_raises(store):
    waiting = [store.store.submit(job(f"j{n}")) for n in range(20)]
    results = store.all(*waiting, store.store.close())
    assert results == [f"j{n}" for n in range(20)] + [None]
    store.close()
    with pytest.raises(Unavailable):
        store.submit(job("a"))


def test_failed_operation_does_not_affect_others(store):
    """Operations that share a transaction do not affect each other."""
    store.submit(job("a", idempotency_key="n", digest="d"))
    leases = store.lease("w", ["m"], 1)
    results = store.all(
        store.store.submit(job("b")),
        store.store.submit(job("c", idempotency_key="n", digest="e")),
        store.store.finish(token_of(leases[0]), "done", b"", LogRecord(5, 1, b"")),
        store.store.submit(job("d", model="\0")),
        store.store.submit(job("e", body=None)),
        store.store.submit(job("f")),
    )
    assert [results[0], results[5]] == ["b", "f"]
    assert all(isinstance(result, Exception) for result in results[1:5])
    assert [store.snapshot(job_id) is not None for job_id in "bcdef"] == [True, False, False, False, True]
    assert store.check() == "ok"
