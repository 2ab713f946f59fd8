"""Faults of a file: full disks, failing statements, and files of another kind. No operation is half done."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.cluster.jobs import LogRecord, StoreLimits
from moesaic.cluster.store import _disk, open_store, sqlite
from moesaic.cluster.store._program import Outcome, Statement
from moesaic.errors import InvalidParameter, MoesaicError, StorageFull, StoreError, Unavailable
from tests.support.stores import SQLiteFile, SyncStore, job, token_of


class FailingConnection(sqlite3.Connection):
    """Connection whose k-th statement after it was armed fails; later statements succeed."""

    statements_left = 0
    error: Exception = sqlite3.OperationalError("disk I/O error")

    def _count(self) -> None:
        FailingConnection.statements_left -= 1
        if FailingConnection.statements_left == 0:
            raise FailingConnection.error

    def execute(self, *values: Any) -> sqlite3.Cursor:
        self._count()
        return super().execute(*values)

    def executemany(self, *values: Any) -> sqlite3.Cursor:
        self._count()
        return super().executemany(*values)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[FailingConnection]:
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite.sqlite3, "connect", lambda *values, **named: connect(*values, factory=FailingConnection, **named)
    )
    return FailingConnection


def in_one_transaction(store: SyncStore, arm: Callable[[], None], *operations: Awaitable[Any]) -> list[Any]:
    """Queue operations behind one that blocks the database thread, so that they share a transaction."""
    started, resumption = threading.Event(), threading.Event()

    def gate() -> Any:
        yield Statement("SELECT 1")
        started.set()
        resumption.wait()
        return Outcome(None)

    async def enqueue() -> None:
        started.wait()
        store.loop.call_soon(arm)
        store.loop.call_soon(resumption.set)

    return store.all(store.store.run(gate), enqueue(), *operations)[2:]


def run(store: SyncStore, sql: str) -> Any:
    """Run a statement as an operation of the store."""

    def steps() -> Any:
        rows = yield Statement(sql)
        return Outcome(rows)

    return store.run(steps)


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), MemoryError("no more")])
def test_failed_statement_leaves_no_partial_operation(failing, tmp_path, error):
    """For every k, the k-th statement of a transaction fails.

    Acknowledged operations have happened, failed ones have not, and repeating all of them completes them.
    """
    failing.error = error
    k, results, failures = 0, [error], []
    while any(isinstance(result, Exception) for result in results):
        k += 1
        (tmp_path / str(k)).mkdir()
        location = SQLiteFile(tmp_path / str(k))
        store = location.open()
        for job_id in "xyz":
            store.submit(job(job_id))
        x, y = (token_of(lease) for lease in store.lease("w", ["m"], 2))

        def arm(k: int = k) -> None:
            failing.statements_left = 2 + k  # the gate's own RELEASE and COMMIT go first

        def calls(store: SyncStore = store, x: Any = x, y: Any = y) -> list[Awaitable[Any]]:
            inner = store.store
            return [
                inner.submit(job("b", idempotency_key="n")),
                inner.append({x: LogRecord(0, 2, b"ab")}),
                inner.finish(y, "done", b"result", LogRecord(0, 1, b"c")),
                inner.cancel("z"),
            ]

        results = in_one_transaction(store, arm, *calls())
        failing.statements_left = 0
        failures.append([isinstance(result, Exception) for result in results])
        assert all(isinstance(result, Unavailable | MemoryError) for result in results if isinstance(result, Exception))
        assert store.check() == "ok"
        effects = [
            store.snapshot("b") is not None,
            store.snapshot("x").logged == 2,
            store.snapshot("y").state == "done",
            store.snapshot("z").state == "cancelled",
        ]
        assert effects == [not failed for failed in failures[-1]]
        assert store.all(*calls()) == ["b", {"x": 2}, True, "cancelled"]
        assert (store.snapshot("x").logged, store.snapshot("y").logged, store.check()) == (2, 1, "ok")
        location.close()
    assert k > 20
    assert [True] * 4 in failures, "a commit that fails takes all with it"
    assert any(sum(result) == 1 for result in failures), "a statement that fails takes its operation with it"


def test_full_disk_is_reported_and_survived(location, tmp_path):
    if location.name != "sqlite":
        pytest.skip("see test_postgres")
    store = location.open()
    store.submit(job("a"))
    store.lease_ids()
    [status] = store.active_leases()
    pages = run(store, "PRAGMA page_count")[0][0]
    run(store, f"PRAGMA max_page_count = {pages + 3}")
    results = store.all(*(store.store.submit(job(f"j{n}", body=bytes(9000))) for n in range(8)))
    assert any(isinstance(result, StorageFull) for result in results)
    assert all(isinstance(result, str | StorageFull) for result in results)
    assert store.check() == "ok"
    for n, result in enumerate(results):
        assert (store.snapshot(f"j{n}") is not None) == (result == f"j{n}")
    assert store.finish(status.lease_token, "done", b"small") is True  # what needs no room goes on
    run(store, "PRAGMA max_page_count = 1000000")
    job_ids = store.all(*(store.store.submit(job(f"j{n}", body=bytes(9000))) for n in range(8)))
    assert job_ids == [f"j{n}" for n in range(8)]
    assert store.check() == "ok"


def test_connection_is_replaced_after_a_failed_rollback(failing, file, monkeypatch):
    store = file.open()
    store.submit(job("a"))
    execute = failing.execute
    connections: set[sqlite3.Connection] = set()

    def fails(self: FailingConnection, sql: str, *values: Any) -> sqlite3.Cursor:
        connections.add(self)
        if sql in ("COMMIT", "ROLLBACK") and len(connections) == 1:
            raise sqlite3.OperationalError("disk I/O error")
        return execute(self, sql, *values)

    monkeypatch.setattr(failing, "execute", fails)
    with pytest.raises(Unavailable):
        store.submit(job("b"))
    assert store.snapshot("b") is None
    assert store.submit(job("b")) == "b"
    assert len(connections) == 2


def test_failed_connection_is_retried(failing, file, monkeypatch):
    store = file.open()
    store.submit(job("a"))

    def fails(self: FailingConnection, *_values: Any) -> sqlite3.Cursor:
        raise sqlite3.OperationalError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(failing, "execute", fails)
        for _ in range(3):
            with pytest.raises(Unavailable):
                store.submit(job("b"))
    assert store.submit(job("b")) == "b"
    assert store.snapshot("a") is not None


def test_commits_are_flushed(file):
    """The connection's settings require flushing; only a power cut would show whether it happens."""
    store = file.open()
    names = ("synchronous", "journal_mode", "locking_mode", "wal_autocheckpoint", "journal_size_limit")
    values = [run(store, f"PRAGMA {name}")[0][0] for name in names]
    assert values == [2, "wal", "exclusive", 1000, 64 << 20]


def test_file_is_opened_by_one_store(file):
    store = file.open()
    with pytest.raises(Unavailable, match="in use by another gateway"):
        file.open()
    connection = sqlite3.connect(file.where, timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        connection.execute("SELECT COUNT(*) FROM jobs")
    connection.close()
    store.submit(job("a"))
    store.close()
    assert file.open().snapshot("a") is not None


def test_file_used_by_another_program_is_refused(file):
    file.open().close()
    connection = sqlite3.connect(file.where)
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Unavailable, match="in use by another program"):
        file.open()
    connection.close()
    assert file.open().check() == "ok"


def test_file_of_another_version_is_refused(file):
    store = file.open()
    run(store, "UPDATE store SET version = 99")
    store.close()
    with pytest.raises(StoreError, match="has version 99"):
        file.open()


def another_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE jobs (what TEXT)")
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("make_file", "reason"),
    [
        (another_database, "is not a job store"),
        (lambda path: path.write_text("a diary\n" * 999), "is damaged"),
        (lambda path: path.mkdir(), "cannot be used"),
    ],
)
def test_other_files_are_refused_and_unchanged(file, make_file, reason):
    path = Path(file.where)
    make_file(path)
    before = path.read_bytes() if path.is_file() else b""
    for _ in range(2):
        with pytest.raises(StoreError, match=reason):
            file.open()
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_damaged_file_is_refused(file):
    store = file.open()
    for n in range(200):
        store.submit(job(f"j{n}", body=bytes(500)))
    store.close()
    path = Path(file.where)
    content = path.read_bytes()
    path.write_bytes(content[:20480] + bytes(8192) + content[28672:])
    with pytest.raises(StoreError, match="is damaged"):
        file.open()


def test_file_is_readable_by_its_owner_only(file):
    store = file.open()
    store.submit(job("a"))
    for path in Path(file.where).parent.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


MOUNTS = """22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /jobs rw,relatime shared:9 master:2 - nfs4 server:/jobs rw,vers=4.2
31 22 0:27 / /odd
"""


def test_network_file_system_is_refused(tmp_path):
    assert _disk.file_system_type(os.makedev(254, 0), MOUNTS) == "ext4"
    assert _disk.file_system_type(os.makedev(0, 26), MOUNTS) == "nfs4"
    assert _disk.file_system_type(os.makedev(0, 27), MOUNTS) == _disk.file_system_type(os.makedev(9, 9), MOUNTS) == ""
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.replace("254:0", "9:9").replace("0:26", f"{os.major(device)}:{os.minor(device)}"))
    with pytest.raises(StoreError, match="network file system nfs4"):
        _disk.refuse_network_disk(tmp_path, mounts)
    _disk.refuse_network_disk(tmp_path, tmp_path / "nothing")
    _disk.refuse_network_disk(tmp_path)


@pytest.mark.parametrize("where", ["", "mysql://somewhere/jobs"])
def test_invalid_addresses_are_refused(file, where):
    with pytest.raises(InvalidParameter):
        file.loop.run_until_complete(open_store(where, StoreLimits()))


def test_errors_are_moesaic_errors():
    assert all(issubclass(kind, MoesaicError) for kind in (StoreError, StorageFull, Unavailable))
