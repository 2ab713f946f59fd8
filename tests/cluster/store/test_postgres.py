"""Faults of PostgreSQL, and several gateways on one database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from moesaic.cluster.jobs import LeaseToken, StoreLimits
from moesaic.cluster.store import open_store, postgres
from moesaic.errors import StorageFull, StoreError, Unavailable
from tests.support.stores import SyncStore, job, token_of

DEADLINE = 60.0


def wait_until(store: SyncStore, condition: Callable[[], bool]) -> None:
    """Wait until ``done`` returns True."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        store.loop.run_until_complete(asyncio.sleep(0.02))


def submits(store: SyncStore, job_id: str) -> bool:
    try:
        return bool(store.submit(job(job_id)) == job_id)
    except Unavailable:
        return False


def test_gateways_never_share_a_job(database):
    """Two gateways lease at the same time, finish some jobs and release others."""
    stores = [database.open(), database.open()]
    for n in range(120):
        stores[n % 2].submit(job(f"j{n}", tenant=f"t{n % 3}"))
    finished_ids: list[str] = []

    async def work(store: Any, worker: str) -> None:
        while leases := await store.lease(worker, ["m"], 3):
            for n, lease in enumerate(leases):
                if n == 2 and lease.fence < 4:
                    await store.release([token_of(lease)])
                elif await store.finish(token_of(lease), "done", worker.encode()):
                    finished_ids.append(lease.job.id)

    store = stores[0]
    store.all(*(work(gateway_store.store, f"w{n}{i}") for n, gateway_store in enumerate(stores) for i in range(3)))
    wait_until(store, lambda: not store.active_leases())
    assert sorted(finished_ids) == sorted(f"j{n}" for n in range(120))
    assert store.check() == "ok"


def test_keys_and_limits_hold_across_gateways(database):
    limits = StoreLimits(queued_per_tenant=5)
    stores = [database.open(limits).store for _ in range(3)]
    store = database.open(limits)
    ids = store.all(*(stores[n % 3].submit(job(f"a{n}", tenant="t", idempotency_key="n")) for n in range(60)))
    assert len(set(ids)) == 1
    results = store.all(*(stores[n % 3].submit(job(f"b{n}", tenant="u")) for n in range(60)))
    assert sum(isinstance(result, str) for result in results) == 5
    assert store.check() == "ok"


def test_gateways_notify_each_other(database):
    first, second = database.open(), database.open()
    notified: list[str] = []
    own_notified: list[str] = []
    first.listen(notified.extend)
    second.listen(own_notified.extend)
    ids = [f"{n}-{'x' * 300}" for n in range(60)]  # more than one notification has room for
    second.all(*(second.store.submit(job(job_id)) for job_id in ids))
    wait_until(first, lambda: "" in notified)
    second.lease("w", ["m"], 60)
    wait_until(first, lambda: set(notified) == {"", *ids})
    first.loop.run_until_complete(asyncio.sleep(0.2))
    assert sorted(job_id for job_id in own_notified if job_id) == sorted(ids), (
        "a gateway is notified once of its own changes"
    )


def test_locked_row_is_skipped(database):
    store = database.open()
    for n in range(3):
        store.submit(job(f"j{n}"))

    async def beside() -> list[str]:
        connection = await asyncpg.connect(database.where)
        try:
            async with connection.transaction():
                await connection.execute("SELECT FROM moesaic.jobs WHERE id = 'j0' FOR UPDATE")
                return [lease.job.id for lease in await store.store.lease("w", ["m"], 2)]
        finally:
            await connection.close()

    assert store.loop.run_until_complete(beside()) == ["j1", "j2"]
    assert store.lease_ids(9) == ["j0"]


def test_hanging_gateway_does_not_block_others(database, monkeypatch):
    monkeypatch.setitem(postgres._SETTINGS, "idle_in_transaction_session_timeout", "500ms")
    first, second = database.open(), database.open()
    first.submit(job("a"))
    connection = first.store.database._connection
    first.loop.run_until_complete(connection.execute("BEGIN; SELECT FROM store FOR UPDATE"))
    assert second.submit(job("b")) == "b"
    wait_until(first, lambda: submits(first, "c"))
    assert first.check() == "ok"


def test_server_restart_is_survived(server, database):
    first, second = database.open(), database.open()
    notified: list[str] = []
    first.listen(notified.extend)
    for n in range(20):
        first.submit(job(f"j{n}"))
    leases = first.lease("w", ["m"], 5)
    server.stop("immediate")
    try:
        for _ in range(2):
            results = first.all(*(first.store.submit(job(f"k{n}")) for n in range(100)))
            assert {type(result) for result in results} == {Unavailable}
        with pytest.raises(Unavailable):
            database.open()
    finally:
        server.start()
    for store in (first, second):
        wait_until(store, lambda store=store: submits(store, "back"))
    assert first.renew([token_of(lease) for lease in leases]) == {f"j{n}": "ok" for n in range(5)}
    assert first.check() == "ok"
    assert first.depths()["m"].queued == 16

    def is_notified() -> bool:
        """Return whether the first gateway is notified of a change; its listener reconnects after a while."""
        second.submit(job("news"))
        second.renew([token_of(second.lease("w", ["m"], 99)[-1])])
        second.release([status.lease_token for status in second.active_leases()])
        return "news" in notified

    wait_until(first, is_notified)


def test_connection_lost_in_a_transaction(database):
    """Operations that were not acknowledged can be repeated safely."""
    store = database.open()
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'moesaic'"

    async def submit(n: int) -> int:
        failures = 0
        while True:
            try:
                assert await store.store.submit(job(f"j{n}")) == f"j{n}"
                return failures
            except Unavailable:
                failures += 1

    async def cut() -> None:
        connection = await asyncpg.connect(database.where)
        for _ in range(5):
            await asyncio.sleep(0.03)
            await connection.execute(end)
        await connection.close()

    failures = store.all(cut(), *(submit(n) for n in range(300)))[1:]
    assert sum(failures) > 0
    assert store.depths()["m"].queued == 300
    assert store.check() == "ok"


RAISE = """CREATE FUNCTION moesaic.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.id LIKE 'bad%' THEN RAISE EXCEPTION 'no room' USING ERRCODE = 'disk_full'; END IF; RETURN NEW; END $$"""
AT_ONCE = "CREATE TRIGGER no BEFORE INSERT ON moesaic.jobs FOR EACH ROW EXECUTE FUNCTION moesaic.no()"
AT_COMMIT = """CREATE CONSTRAINT TRIGGER no AFTER INSERT ON moesaic.jobs DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION moesaic.no()"""


@pytest.mark.parametrize("trigger", [AT_ONCE, AT_COMMIT], ids=["statement", "commit"])
def test_full_disk_is_reported_and_survived(server, database, trigger):
    """If a statement fails, its operation fails; if the commit fails, all operations in it fail."""
    store = database.open()
    server.sql(RAISE, database.database)
    server.sql(trigger, database.database)
    ids = ["a", "bad", "b"]
    results = store.all(*(store.store.submit(job(job_id)) for job_id in ids))
    failures = [isinstance(result, StorageFull) for result in results]
    assert failures == ([False, True, False] if trigger == AT_ONCE else [True, True, True])
    assert [store.snapshot(job_id) is None for job_id in ids] == failures
    assert store.submit(job("c")) == "c"
    server.sql("DROP TRIGGER no ON moesaic.jobs", database.database)
    wait_until(store, lambda: submits(store, "bad"))
    assert store.submit(job("a")) == "a"
    assert store.check() == "ok"


def test_commits_are_flushed(database):
    """The connection's settings require flushing; only a power cut would show whether it happens."""
    store = database.open()
    ask = store.store.database._connection.fetchval
    names = ("synchronous_commit", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    values = [store.loop.run_until_complete(ask(f"SHOW {name}")) for name in names]
    assert values == ["on", "10s", "10s", "5s"]


def test_database_of_another_version_is_refused(server, database):
    database.open().close()
    server.sql("UPDATE moesaic.store SET version = 99", database.database)
    with pytest.raises(StoreError, match="has version 99"):
        database.open()


def test_database_in_another_encoding_is_refused(server, database):
    server.sql("CREATE DATABASE odd ENCODING 'SQL_ASCII' TEMPLATE template0")
    with pytest.raises(StoreError, match="not in UTF8"):
        database.loop.run_until_complete(open_store(server.address("odd"), StoreLimits()))


def test_missing_permission_is_reported(server, database):
    server.sql("CREATE ROLE weak LOGIN")
    where = database.where.replace("tests@", "weak@")
    with pytest.raises(StoreError, match="a permission is missing"):
        database.loop.run_until_complete(open_store(where, StoreLimits()))


def test_existing_schema_is_used(server, database):
    server.sql("CREATE ROLE modest LOGIN")
    server.sql("CREATE SCHEMA moesaic AUTHORIZATION modest", database.database)
    where = database.where.replace("tests@", "modest@")
    store = SyncStore(database.loop, database.loop.run_until_complete(open_store(where, StoreLimits())))
    assert store.submit(job("a")) == "a"
    store.close()


def test_concurrent_starts_create_one_store(database):
    async def several() -> list[Any]:
        return await asyncio.gather(*(open_store(database.where, StoreLimits()) for _ in range(5)))

    stores = [SyncStore(database.loop, store) for store in database.loop.run_until_complete(several())]
    stores[0].submit(job("a"))
    assert stores[4].lease_ids() == ["a"]
    assert stores[1].renew([LeaseToken("a", 1)]) == {"a": "ok"}
    for store in stores:
        store.close()


def test_unreachable_server(database):
    with pytest.raises(Unavailable):
        database.loop.run_until_complete(open_store("postgresql://tests@/x?host=/nowhere", StoreLimits()))
