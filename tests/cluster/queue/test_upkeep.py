"""What is listed, told, counted in ticks and dropped."""

from __future__ import annotations

import pytest

from moesaic.cluster.jobs import LogRecord, QueueDepth, StoreLimits
from moesaic.errors import Conflict, Unavailable
from tests.support.stores import Sync, hold, job


def end(store: Sync, job_id: str, **changes) -> None:
    store.submit(job(job_id, **changes))
    [lease] = store.lease("w", ["m"], 1)
    store.append({hold(lease): LogRecord(0, 1, b"x")})
    assert store.finish(hold(lease), "done", b"result")


def ticks(store: Sync, count: int) -> None:
    now = store.tick(-1)
    for _ in range(count):
        now = store.tick(now)


def test_tick_advances_once_for_all_gateways(store):
    now = store.tick(-1)
    assert store.tick(-1) == now
    assert store.tick(now) == now + 1
    assert store.tick(now) == now + 1
    assert store.tick(now + 1) == now + 2


def test_ticks_survive_a_restart(place):
    first = place.open()
    ticks(first, 5)
    first.close()
    assert place.open().tick(-1) == 5


def test_ended_job_is_kept_for_its_retention(place):
    store = place.open(StoreLimits(retention_ticks=3, idempotency_ticks=5))
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


def test_oldest_ended_jobs_are_dropped_first(place):
    store = place.open(StoreLimits(max_ended=100))
    ids = [f"j{n}" for n in range(700)]
    store.all(*(store.store.submit(job(job_id)) for job_id in ids))
    store.all(*(store.store.cancel(job_id) for job_id in ids))
    end(store, "late")
    ticks(store, 1)
    assert len(store.list_jobs("cancelled", 9999)) == 99
    assert store.snapshot("late") is not None
    assert store.check() == "ok"


def test_active_jobs_are_never_dropped(place):
    store = place.open(StoreLimits(retention_ticks=1, idempotency_ticks=1, max_ended=0))
    store.submit(job("a", idempotency_key="n"))
    store.submit(job("b", idempotency_key="o"))
    [lease] = store.lease("w", ["m"], 1)
    ticks(store, 9)
    assert store.submit(job("c", idempotency_key="n")) == "a"
    assert store.submit(job("c", idempotency_key="o")) == "b"
    assert store.finish(hold(lease), "done", b"")
    assert store.take() == ["b"]


def test_revived_job_is_not_dropped(place):
    store = place.open(StoreLimits(crashes=1, retention_ticks=3, idempotency_ticks=3))
    store.submit(job("a", idempotency_key="n"))
    store.take()
    store.expire(store.active_leases())
    ticks(store, 2)
    store.revive("a")
    ticks(store, 9)
    assert store.snapshot("a").state == "queued"
    assert store.submit(job("b", idempotency_key="n")) == "a"


def test_idle_tenants_and_models_are_deleted(place):
    """Tenants and models that are gone do not fill the tables; those that count are not forgotten."""
    store = place.open()
    for n in range(20):
        end(store, f"j{n}", tenant=f"t{n}")
    store.submit(job("waits", tenant="t"))
    ticks(store, 1)
    store.submit(job("more", tenant="t"))
    assert store.take(2) == ["waits", "more"]
    assert store.check() == "ok"


def test_depths_count_by_model(store):
    for n in range(5):
        store.submit(job(f"a{n}", cost=3, priority=n % 2))
        store.submit(job(f"b{n}", model="n"))
    store.take(3)
    assert store.depths() == {"m": QueueDepth(queued=2, leased=3, cost=6), "n": QueueDepth(queued=5, cost=5)}


def test_lists_are_newest_first_without_bodies(store):
    for n in range(9):
        store.submit(job(f"j{n}", tenant="t", cost=4))
    store.take(4)
    end_of = store.list_jobs("queued")
    assert [seen.job.id for seen in end_of] == ["j8", "j7", "j6", "j5", "j4"]
    assert [seen.job.id for seen in store.list_jobs("leased", 2)] == ["j3", "j2"]
    assert {seen.job.body for seen in end_of} == {b""}
    assert (end_of[0].job.tenant, end_of[0].job.cost, end_of[0].state) == ("t", 4, "queued")
    assert store.list_jobs("dead") == []


def test_listeners_get_changes(place):
    store = place.open(StoreLimits(crashes=1))
    told: set[str] = set()

    def news() -> set[str]:
        found = set(told)
        told.clear()
        return found

    store.listen(told.update)
    store.submit(job("a"))
    assert news() == {""}
    [lease] = store.lease("w", ["m"], 1)
    assert news() == {"a"}
    store.renew([hold(lease)])
    store.snapshot("a")
    assert news() == set()
    store.append({hold(lease): LogRecord(0, 1, b"x")})
    assert news() == {"a"}
    store.release([hold(lease)])
    assert news() == {"", "a"}
    store.take()
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
    found = store.all(*waiting, store.store.close())
    assert found == [f"j{n}" for n in range(20)] + [None]
    store.close()
    with pytest.raises(Unavailable):
        store.submit(job("a"))


def test_failed_operation_does_not_affect_others(store):
    """Operations share a transaction, and nothing else."""
    store.submit(job("a", idempotency_key="n", digest="d"))
    leases = store.lease("w", ["m"], 1)
    done = store.all(
        store.store.submit(job("b")),
        store.store.submit(job("c", idempotency_key="n", digest="e")),
        store.store.finish(hold(leases[0]), "done", b"", LogRecord(5, 1, b"")),
        store.store.submit(job("d", model="\0")),
        store.store.submit(job("e", body=None)),
        store.store.submit(job("f")),
    )
    assert [done[0], done[5]] == ["b", "f"]
    assert all(isinstance(each, Exception) for each in done[1:5])
    assert [store.snapshot(job_id) is not None for job_id in "bcdef"] == [True, False, False, False, True]
    assert store.check() == "ok"
