"""Jobs in a file: one gateway, no other program, and as durable as the disk.

One thread owns the one connection. It takes all operations that wait, runs each in a savepoint inside one transaction,
and commits: one flush of the disk for all of them. With one connection nothing can come between two operations, and the
fault of SQLite before 3.51.3 that two connections can damage a WAL (https://sqlite.org/wal.html, "The WAL-Reset Bug")
cannot happen; ``locking_mode=EXCLUSIVE`` keeps other programs out.

Knows SQLite. Does not know what the operations are about.
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

from moesaic.cluster.jobs import Store, StoreLimits
from moesaic.cluster.store import _disk
from moesaic.cluster.store._base import BaseStore
from moesaic.cluster.store._program import SKIP_LOCKED, ExecuteMany, Operation, Outcome, Statement
from moesaic.cluster.store._schema import VERSION, tables
from moesaic.errors import MoesaicError, StorageFull, StoreError, Unavailable

T = TypeVar("T")

MAX_BATCH = 256
"""Operations in one transaction: what waits behind them waits no longer than they take."""
APPLICATION_ID = 0x4D6F6573
"""Says in the file's head that it is one of jobs."""
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
    """Open a file of jobs, or make one.

    Raises:
        Unavailable: another gateway, or another program, has it.
        StoreError: it lies on the network, is damaged, of another version, or something else.
    """
    store = SqliteStore(Path(address), limits)
    await store.opened
    return store


class SqliteStore(BaseStore):
    """See the module."""

    shared = False

    def __init__(self, path: Path, limits: StoreLimits) -> None:
        super().__init__(limits)
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._closing = False
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        threading.Thread(target=self._own, args=(path,), name="moesaic-jobs", daemon=True).start()

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

    async def check(self) -> str:
        found = await self.run(lambda: _integrity(), reads=True)
        return found if found != "ok" else await super().check()

    def _own(self, path: Path) -> None:
        """The owner's thread, from beginning to end."""
        try:
            lock, connection = _open(path)
        except Exception as error:  # whatever it is, whoever opens it gets it
            self._post(self._settle, [_Done(self.opened, _explain(error, path))], ())
            return
        self._post(self._settle, [_Done(self.opened, Outcome(None))], ())
        owner = _ConnectionOwner(path, connection)
        while group := self._take():
            done = owner.commit(group)
            news = [job_id for each in done if isinstance(each.outcome, Outcome) for job_id in each.outcome.news]
            if not self._post(self._settle, done, tuple(dict.fromkeys(news))):
                break
        owner.close()
        lock.release()
        self._post(self._closed.set_result, None)

    def _take(self) -> list[_Waiting]:
        """Wait for operations; return all that are there, or none at the end."""
        group = []
        each = self._waiting.get()
        while each is not None:
            group.append(each)
            if len(group) == MAX_BATCH or self._waiting.empty():
                return group
            each = self._waiting.get()
        if group:
            self._waiting.put(None)
        return group

    def _post(self, what: Callable[..., None], *values: object) -> bool:
        """Have something called on the loop; return whether there still is one."""
        try:
            self._loop.call_soon_threadsafe(what, *values)
        except RuntimeError:
            return False
        return True

    def _settle(self, done: Sequence[_Done], news: Sequence[str]) -> None:
        for answer, outcome in done:
            if answer.done():
                continue
            if isinstance(outcome, Outcome):
                answer.set_result(outcome.value)
            else:
                answer.set_exception(outcome)
        self._notify(news)


class _ConnectionOwner:
    """Runs operations on the connection, many in a transaction."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = connection

    def commit(self, group: Sequence[_Waiting]) -> list[_Done]:
        """Run operations in one transaction. Where that fails, all of them have failed and none has happened."""
        try:
            connection = self._connection = self._connection or _connect(self._path)
            connection.execute("BEGIN IMMEDIATE")
            done = [_Done(each.answer, self._outcome(connection, each.operation)) for each in group]
            connection.execute("COMMIT")
        except Exception as error:  # whatever it is, this thread goes on, and those who wait are told
            self._give_up()
            return [_Done(each.answer, _explain(error, self._path)) for each in group]
        return done

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _outcome(self, connection: sqlite3.Connection, operation: Operation[Any]) -> Outcome[Any] | BaseException:
        """Run one operation in a savepoint; return what comes of it, also if that is an error of its own."""
        connection.execute("SAVEPOINT operation")
        outcome: Outcome[Any] | BaseException
        try:
            outcome = _run(connection, operation)
        except Exception as error:  # whatever it is, whoever waits for this one gets it, and the others go on
            if not connection.in_transaction:
                raise  # SQLite has rolled back all of it already
            outcome = _explain(error, self._path)
            connection.execute("ROLLBACK TO operation")
        connection.execute("RELEASE operation")
        return outcome

    def _give_up(self) -> None:
        """Roll back; where that fails too, the next group begins with a new connection."""
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
    """Nothing is ever locked by others here, and a list is a JSON array."""
    return sql.replace(SKIP_LOCKED, "").replace(" IN ?", " IN (SELECT value FROM json_each(?))")


def _explain(error: BaseException, path: Path) -> BaseException:
    """Return a database's error as one of ours, anything else as it is."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        ours: MoesaicError = Unavailable(f"{path} cannot be read or written ({error}): try again")
        if code == sqlite3.SQLITE_FULL:
            ours = StorageFull(f"the disk that has {path} is full: make room there")
        elif code == sqlite3.SQLITE_BUSY:
            ours = Unavailable(f"{path} is in use by another program: end that first")
        elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            ours = StoreError(f"{path} is damaged ({error}): put it aside, or a copy of it in its place")
        ours.__cause__ = error
        return ours
    if isinstance(error, OSError):
        unusable = StoreError(f"{path} cannot be used: {error.strerror}")
        unusable.__cause__ = error
        return unusable
    return error


def _open(path: Path) -> tuple[_disk.FileLock, sqlite3.Connection]:
    """Lock, open and check a file of jobs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _disk.FileLock(path)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # it holds what people have asked
        _disk.refuse_network_disk(path)
        return lock, _connect(path)
    except BaseException:
        lock.release()
        raise


def _connect(path: Path) -> sqlite3.Connection:
    """Return a connection to a sound file of jobs of this version, made here if the file is empty."""
    connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)
    try:
        connection.execute(
            "PRAGMA locking_mode = EXCLUSIVE"
        )  # before the first look: from then on nobody else comes in
        empty = not connection.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]
        if not empty and connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise StoreError(f"{path} holds something else: name another file")
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        if empty:
            connection.execute("BEGIN IMMEDIATE")
            for statement in tables(serial="INTEGER PRIMARY KEY AUTOINCREMENT", blob="BLOB", busy=""):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute("COMMIT")
        _sound(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _sound(connection: sqlite3.Connection, path: Path) -> None:
    """Raise StoreError unless a file of jobs is undamaged and of this version."""
    version = connection.execute("SELECT version FROM store").fetchone()[0]
    if version != VERSION:
        raise StoreError(
            f"{path} is of version {version}, expected {VERSION}: "
            "finish its jobs with the Moesaic that made it, or name another file"
        )
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise StoreError(f"{path} is damaged ({found}): put it aside, or a copy of it in its place")
