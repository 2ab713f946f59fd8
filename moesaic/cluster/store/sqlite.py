"""Job store in an SQLite file, for a single gateway.

One thread owns the only connection. It takes all waiting operations, runs each in a savepoint of one transaction, and
commits them together, so they share one flush of the disk. A single connection also avoids a bug of SQLite before
3.51.3, in which two connections can damage a WAL (https://sqlite.org/wal.html, "The WAL-Reset Bug").
``locking_mode=EXCLUSIVE`` keeps other programs out.

This module does not depend on the content of operations.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moesaic.cluster.jobs import ChangeListener, Store, StoreLimits
from moesaic.cluster.store import _disk
from moesaic.cluster.store._program import SKIP_LOCKED, ExecuteMany, Operation, Outcome, Statement
from moesaic.cluster.store._schema import VERSION, tables
from moesaic.cluster.store._sql_store import SqlStore, notify
from moesaic.errors import MoesaicError, StorageFull, StoreError, Unavailable

T = TypeVar("T")

MAX_BATCH = 256
"""Maximum number of operations in one transaction, so that later operations do not wait for too long."""
APPLICATION_ID = 0x4D6F6573
"""Number in the header of an SQLite file that marks it as a job store."""
_PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "wal_autocheckpoint = 1000",
    f"journal_size_limit = {64 << 20}",
    "temp_store = MEMORY",
)


class _Waiting(NamedTuple):
    operation: Operation[Any]
    answer: asyncio.Future[Any]


class _Done(NamedTuple):
    answer: asyncio.Future[Any]
    outcome: Outcome[Any] | BaseException


async def open_store(address: str, limits: StoreLimits) -> Store:
    """Open the job store in the SQLite file at ``address``. Create the file if it is missing.

    Raises:
        Unavailable: another gateway or another program uses the file.
        StoreError: the file is on a network disk, is damaged, has another schema version, or is not a job store.
    """
    database = SqliteDatabase(Path(address))
    await database.opened
    return SqlStore(database, limits)


class SqliteDatabase:
    """An SQLite file with jobs. One thread owns the connection and runs all operations."""

    shared = False

    def __init__(self, path: Path) -> None:
        self.listeners: list[ChangeListener] = []
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._closing = False
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        threading.Thread(target=self._run_thread, args=(path,), name="moesaic-jobs", daemon=True).start()

    async def run(self, operation: Operation[T], *, reads: bool = False) -> T:
        if self._closing:
            raise Unavailable("the job store is closed")
        answer: asyncio.Future[T] = self._loop.create_future()
        self._waiting.put(_Waiting(operation, answer))
        return await answer

    async def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._waiting.put(None)
        await asyncio.shield(self._closed)

    async def integrity(self) -> str:
        return str(await self.run(lambda: _integrity(), reads=True))

    def _run_thread(self, path: Path) -> None:
        """Open the connection, run operations until the store is closed, and close the connection."""
        try:
            lock, connection = _open(path)
        except Exception as error:  # every error is passed to ``open_store``
            self._post(self._settle, [_Done(self.opened, _explain(error, path))], ())
            return
        self._post(self._settle, [_Done(self.opened, Outcome(None))], ())
        owner = _ConnectionOwner(path, connection)
        while group := self._take():
            done = owner.commit(group)
            outcomes = [item.outcome for item in done]
            changes = [change for item in outcomes if isinstance(item, Outcome) for change in item.changes]
            if not self._post(self._settle, done, tuple(dict.fromkeys(changes))):
                break
        owner.close()
        lock.release()
        self._post(self._closed.set_result, None)

    def _take(self) -> list[_Waiting]:
        """Wait for operations; return up to ``MAX_BATCH`` of them, or an empty list when the store is closed."""
        group = []
        item = self._waiting.get()
        while item is not None:
            group.append(item)
            if len(group) == MAX_BATCH or self._waiting.empty():
                return group
            item = self._waiting.get()
        if group:
            self._waiting.put(None)
        return group

    def _post(self, callback: Callable[..., None], *values: object) -> bool:
        """Schedule a callback on the event loop; return False if the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(callback, *values)
        except RuntimeError:
            return False
        return True

    def _settle(self, done: Sequence[_Done], changes: Sequence[str]) -> None:
        for answer, outcome in done:
            if answer.done():
                continue
            if isinstance(outcome, Outcome):
                answer.set_result(outcome.value)
            else:
                answer.set_exception(outcome)
        notify(self.listeners, changes)


class _ConnectionOwner:
    """Owns the connection and runs groups of operations on it, each group in one transaction."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = connection

    def commit(self, group: Sequence[_Waiting]) -> list[_Done]:
        """Run operations in one transaction; return their outcomes. If the transaction fails, all of them fail."""
        try:
            connection = self._connection = self._connection or _connect(self._path)
            connection.execute("BEGIN IMMEDIATE")
            done = [_Done(item.answer, self._outcome(connection, item.operation)) for item in group]
            connection.execute("COMMIT")
        except Exception as error:  # every error is passed to the callers, and the thread continues
            self._roll_back()
            return [_Done(item.answer, _explain(error, self._path)) for item in group]
        return done

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _outcome(self, connection: sqlite3.Connection, operation: Operation[Any]) -> Outcome[Any] | BaseException:
        """Run one operation in a savepoint; return its outcome or its error."""
        connection.execute("SAVEPOINT operation")
        outcome: Outcome[Any] | BaseException
        try:
            outcome = _run(connection, operation)
        except Exception as error:  # the error is passed to the caller of this operation only
            if not connection.in_transaction:
                raise  # SQLite has already rolled back the whole transaction
            outcome = _explain(error, self._path)
            connection.execute("ROLLBACK TO operation")
        connection.execute("RELEASE operation")
        return outcome

    def _roll_back(self) -> None:
        """Roll back the transaction; close the connection if that fails, so that the next group opens a new one."""
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self.close()


def _run(connection: sqlite3.Connection, operation: Operation[T]) -> Outcome[T]:
    steps = operation()
    try:
        step = next(steps)
        while True:
            step = steps.send(_execute(connection, step))
    except StopIteration as end:
        outcome: Outcome[T] = end.value
        return outcome


def _integrity() -> Any:
    rows = yield Statement("PRAGMA integrity_check(10)")
    return Outcome("; ".join(str(row[0]) for row in rows))


def _execute(connection: sqlite3.Connection, step: Statement | ExecuteMany) -> Sequence[Sequence[Any]]:
    if isinstance(step, ExecuteMany):
        connection.executemany(step.sql, step.rows)
        return ()
    values = [json.dumps(value) if isinstance(value, list) else value for value in step.values]
    return connection.execute(_dialect(step.sql), values).fetchall()


@lru_cache(None)
def _dialect(sql: str) -> str:
    """Translate SQL of ``_program`` to SQLite: row locks are left out, and a list is passed as a JSON array."""
    return sql.replace(SKIP_LOCKED, "").replace(" IN ?", " IN (SELECT value FROM json_each(?))")


def _explain(error: BaseException, path: Path) -> BaseException:
    """Convert an error of SQLite or the system to a ``MoesaicError``. Return other errors unchanged."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        result: MoesaicError = Unavailable(f"{path} cannot be read or written ({error}): try again")
        if code == sqlite3.SQLITE_FULL:
            result = StorageFull(f"the disk of {path} is full: free some space")
        elif code == sqlite3.SQLITE_BUSY:
            result = Unavailable(f"{path} is in use by another program: stop that program first")
        elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            result = StoreError(f"{path} is damaged ({error}): move it away, or restore a backup")
        result.__cause__ = error
        return result
    if isinstance(error, OSError):
        unusable = StoreError(f"{path} cannot be used: {error.strerror}")
        unusable.__cause__ = error
        return unusable
    return error


def _open(path: Path) -> tuple[_disk.FileLock, sqlite3.Connection]:
    """Lock, open and check the store's file; return the lock and the connection."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _disk.FileLock(path)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # the file contains prompts
        _disk.refuse_network_disk(path)
        return lock, _connect(path)
    except BaseException:
        lock.release()
        raise


def _connect(path: Path) -> sqlite3.Connection:
    """Return a connection to a valid store of this version; create the tables if the file is empty."""
    connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)
    try:
        # This must precede the first read, which then takes the lock that keeps other programs out.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        empty = not connection.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]
        if not empty and connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise StoreError(f"{path} is not a job store: choose another file")
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        if empty:
            connection.execute("BEGIN IMMEDIATE")
            for statement in tables(serial="INTEGER PRIMARY KEY AUTOINCREMENT", blob="BLOB", busy=""):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute("COMMIT")
        _check_file(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_file(connection: sqlite3.Connection, path: Path) -> None:
    """Raise StoreError if the file is damaged or has another schema version."""
    version = connection.execute("SELECT version FROM store").fetchone()[0]
    if version != VERSION:
        raise StoreError(
            f"{path} has version {version} of the schema, expected {VERSION}: "
            "finish its jobs with the Moesaic version that created it, or choose another file"
        )
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise StoreError(f"{path} is damaged ({problem}): move it away, or restore a backup")
