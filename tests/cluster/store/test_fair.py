"""The order of leases: by priority, then fair between tenants, then by submission."""

from __future__ import annotations

import random

from moesaic.cluster.jobs import StoreLimits
from tests.support.stores import SyncStore, job, token_of


def serve(store: SyncStore, count: int, models: tuple[str, ...] = ("m",)) -> str:
    """Lease and finish jobs one by one, and return the first letters of their ids."""
    served = ""
    for _ in range(count):
        for lease in store.lease("w", models, 1):
            served += lease.job.id[0]
            store.finish(token_of(lease), "done", b"")
    return served


def fill(store: SyncStore, job_id: str, count: int, **changes) -> None:
    for n in range(count):
        store.submit(job(f"{job_id}{n}", tenant=job_id, **changes))


def test_jobs_of_a_tenant_are_leased_in_order(store):
    fill(store, "a", 20, cost=3)
    assert store.lease_ids(20) == [f"a{n}" for n in range(20)]


def test_priority_precedes_fairness(store):
    fill(store, "a", 3, priority=1)
    fill(store, "b", 3, priority=-1, cost=1000)
    fill(store, "c", 3, model="n", priority=0)
    assert "".join(job_id[0] for job_id in store.lease_ids(9, models=["m", "n"])) == "bbbcccaaa"


def test_small_tenant_does_not_wait_behind_a_large_one(store):
    fill(store, "a", 100, cost=10)
    fill(store, "b", 3, cost=10)
    assert serve(store, 7).count("b") == 3


def test_shares_are_by_cost(store):
    """A tenant whose jobs cost ten times as much gets a tenth as many leases."""
    fill(store, "a", 30, cost=100)
    fill(store, "b", 200, cost=10)
    served = serve(store, 110)
    assert 9 <= served.count("a") <= 11
    assert 99 <= served.count("b") <= 101


def test_equal_demands_get_equal_shares(location):
    """Jain's index over ten tenants whose jobs cost between 1 and 50 stays above 0.95."""
    store = location.open(StoreLimits())
    draw = random.Random(5)
    order = [(tenant, draw.randint(1, 50)) for tenant in "abcdefghij" for _ in range(40)]
    draw.shuffle(order)
    for n, (tenant, cost) in enumerate(order):
        store.submit(job(f"{tenant}{n}", tenant=tenant, cost=cost))
    costs = dict.fromkeys("abcdefghij", 0)
    for lease in store.lease("w", ["m"], 200):
        costs[lease.job.tenant] += lease.job.cost
    assert sum(costs.values()) ** 2 / (10 * sum(cost**2 for cost in costs.values())) > 0.95


def test_service_without_competition_is_not_charged(store):
    fill(store, "a", 50, cost=1000)
    serve(store, 50)
    fill(store, "A", 0)
    for n in range(10):
        store.submit(job(f"a-{n}", tenant="a", cost=10))
        store.submit(job(f"b-{n}", tenant="b", cost=10))
    served = serve(store, 10)
    assert served.count("a") == served.count("b") == 5


def test_idle_tenant_earns_no_credit(store):
    """A tenant that was idle gets the same share as the others from now on."""
    fill(store, "a", 100, cost=10)
    serve(store, 50)
    fill(store, "b", 50, cost=10)
    served = serve(store, 40)
    assert 19 <= served.count("b") <= 21


def test_cancelled_jobs_are_not_charged(store):
    fill(store, "a", 200, cost=1000)
    fill(store, "b", 40, cost=10)
    for n in range(200):
        store.cancel(f"a{n}")
    store.submit(job("a-again", tenant="a", cost=10))
    assert "a" in serve(store, 3)


def test_unserved_backlog_is_not_charged_elsewhere(store):
    """Waiting jobs of another model or priority do not count against a tenant."""
    fill(store, "a", 100, cost=1000, model="away")
    fill(store, "A", 100, cost=1000, priority=9)
    fill(store, "b", 40, cost=10)
    store.submit(job("a-here", tenant="a", cost=10))
    store.submit(job("A-here", tenant="A", cost=10))
    assert {"a", "A"} <= set(serve(store, 4))


def test_busy_model_does_not_delay_tenants_of_another(store):
    fill(store, "a", 100, cost=1000, model="busy")
    fill(store, "b", 100, cost=10, model="quiet")
    serve(store, 90, models=("busy",))
    fill(store, "c", 2, cost=10, model="quiet")
    assert serve(store, 5, models=("quiet",)).count("c") == 2


def test_models_of_a_worker_get_equal_shares(store):
    """Each model gets half of the tokens, whatever its jobs cost and however many wait."""
    fill(store, "a", 300, cost=10)
    fill(store, "b", 40, cost=100, model="n")
    served = serve(store, 110, models=("m", "n"))
    assert 9 <= served.count("b") <= 11
    fill(store, "c", 30, cost=100, model="late")
    served = serve(store, 30, models=("m", "n", "late"))
    assert served.count("c") in (2, 3)


def test_batch_is_as_fair_as_single_leases(store):
    fill(store, "a", 50, cost=10)
    fill(store, "b", 10, cost=50)
    ids = store.lease_ids(30)
    assert sum(job_id[0] == "a" for job_id in ids) in (24, 25, 26)


def test_queue_position(store):
    fill(store, "a", 5, cost=10)
    fill(store, "b", 2, cost=10)
    fill(store, "c", 1, priority=-1)
    fill(store, "d", 3, model="n", priority=-1)
    order = store.lease_ids(3)
    assert order[0] == "c0"
    waiting = {
        job_id: store.snapshot(job_id).queue_position
        for job_id in ("a0", "a1", "a2", "a3", "a4", "b0", "b1")
        if job_id not in order
    }
    assert sorted(waiting.values()) == list(range(5))
    assert store.lease_ids(9) == sorted(waiting, key=waiting.__getitem__)
    assert store.snapshot("a4").queue_position == 0
