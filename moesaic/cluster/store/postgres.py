"""Jobs in PostgreSQL: for several gateways, which share one database.

Each store has one connection for its operations. A task owns it, takes all operations that wait, runs each in a
savepoint inside one transaction, and commits: one flush of the disk for all of them. Whoever writes locks the one row
of ``store`` first, so the writers of several gateways take turns, a transaction each, and no operation meets another
halfway. A gateway that stands still in the middle is put out of the way by the server, which ends its connection
(``idle_in_transaction_session_timeout``).

A second connection listens for what other gateways did. Both are made anew when they break.

Knows PostgreSQL. Does not know what the operations are about.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from moesaic.cluster.jobs import Store, StoreLimits
from moesaic.cluster.store._base import BaseStore
from moesaic.cluster.store._operations import NEW_WORK
from moesaic.cluster.store._program import ExecuteMany, Operation, Outcome, Statement
from moesaic.cluster.store._schema import VERSION, tables
from moesaic.errors import MoesaicError, NotInstalled, StorageFull, StoreError, Unavailable

if TYPE_CHECKING:
    import asyncpg

T = TypeVar("T")

MAX_BATCH = 64
"""Operations in one transaction: beyond so many savepoints PostgreSQL keeps track of them on disk."""
CHANNEL = "moesaic"
MAX_NOTIFY_BYTES = 7900
"""Of ids in one notification; PostgreSQL allows 8000."""
CONNECT_SECONDS = 5.0
PING_SECONDS = 10.0
"""How often the listening connection is tried out."""
BACKOFF_SECONDS = (0.1, 5.0)
"""Before a new attempt to connect: a random part of the first number, doubled each time up to the second."""
_LOCK = 0x4D6F6573
_SETTINGS = {
    "application_name": "moesaic",
    "search_path": "moesaic",
    "synchronous_commit": "on",
    "statement_timeout": "10s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "5s",
    "enable_seqscan": "off",  # every query has its index; the planner's picture of a queue is always old
    "jit": "off",
}
_COMMAND_SECONDS = 20.0
_BUSY = """ WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500,
    autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0)"""
"""Rows that change often: room for their next versions beside them, and the old ones cleared away soon."""


class _Waiting(NamedTuple):
    operation: Operation[Any]
    answer: asyncio.Future[Any]
    reads: bool


async def open_store(address: str, limits: StoreLimits) -> Store:
    """Open the jobs of a database, or make their tables in the schema ``moesaic``.

    Raises:
        Unavailable: it cannot be reached.
        StoreError: it is of another version, not in UTF-8, or nothing may be made in it.
        NotInstalled: asyncpg is.
    """
    try:
        connection = await _connect(address)
    except Exception as error:
        raise _explain(error) from error
    try:
        await _prepare(connection)
        store = PostgresStore(address, limits, connection)
        await store.start()
    except Exception as error:
        connection.terminate()
        raise _explain(error) from error
    return store


class PostgresStore(BaseStore):
    """See the module."""

    shared = True

    def __init__(self, address: str, limits: StoreLimits, connection: asyncpg.Connection) -> None:
        super().__init__(limits)
        self._address = address
        self._connection = connection
        self._waiting: deque[_Waiting] = deque()
        self._awake = asyncio.Event()
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to work, and to listen on a second connection."""
        listener = await self._listen()
        self._tasks = [asyncio.create_task(self._own()), asyncio.create_task(self._hear(listener))]

    async def run(self, operation: Operation[T], *, reads: bool = False) -> T:
        if self._closing:
            raise Unavailable("the job store is closed")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(operation, answer, reads))
        self._awake.set()
        return await answer

    async def close(self) -> None:
        self._closing = True
        self._awake.set()
        owner, listener = self._tasks
        listener.cancel()
        await asyncio.wait([owner, listener])
        self._connection.terminate()

    async def _own(self) -> None:
        """Run what waits, from beginning to end."""
        attempts = 0
        while group := await self._take():
            try:
                if self._connection.is_closed():
                    self._connection = await _connect(self._address)
                outcomes, news = await _commit(self._connection, group)
            except Exception as error:  # whatever it is, this task goes on, and those who wait are told
                group += self._waiting
                self._waiting.clear()
                _settle(group, [_explain(error) for _ in group])
                self._connection.terminate()
                await asyncio.sleep(_backoff(attempts))
                attempts += 1
            else:
                attempts = 0
                _settle(group, outcomes)
                self._notify(news)

    async def _take(self) -> list[_Waiting]:
        """Wait for operations; return those that are there, or none at the end."""
        while not self._waiting and not self._closing:
            self._awake.clear()
            await self._awake.wait()
        return [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]

    async def _listen(self) -> asyncpg.Connection:
        connection = await _connect(self._address)
        try:
            await connection.add_listener(CHANNEL, self._heard)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _hear(self, connection: asyncpg.Connection) -> None:
        """Listen, also after the connection broke, until cancelled."""
        attempts = 0
        while True:
            try:
                await _until_broken(connection)
            finally:
                connection.terminate()
            while connection.is_closed():
                await asyncio.sleep(_backoff(attempts))
                attempts += 1
                with contextlib.suppress(Exception):  # whatever it is, the next attempt may do better
                    connection = await self._listen()
            attempts = 0
            self._notify([NEW_WORK])  # what was said meanwhile was not heard

    def _heard(self, _connection: object, pid: int, _channel: str, payload: object) -> None:
        if self._connection.is_closed() or pid != self._connection.get_server_pid():
            self._notify(json.loads(str(payload)))


def _backoff(attempts: int) -> float:
    """Return how many seconds to wait before the next attempt ("full jitter")."""
    first, most = BACKOFF_SECONDS
    return random.uniform(0, min(most, first * 2 ** min(attempts, 16)))


def _settle(group: Sequence[_Waiting], outcomes: Sequence[Outcome[Any] | BaseException]) -> None:
    for each, outcome in zip(group, outcomes, strict=True):
        if each.answer.done():
            continue
        if isinstance(outcome, Outcome):
            each.answer.set_result(outcome.value)
        else:
            each.answer.set_exception(outcome)


async def _until_broken(connection: asyncpg.Connection) -> None:
    """Return once a connection is of no use any more."""
    broken = asyncio.Event()
    connection.add_termination_listener(lambda _connection: broken.set())
    while not connection.is_closed():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(broken.wait(), PING_SECONDS)
            return
        try:
            await connection.execute("SELECT 1")
        except Exception:  # whatever it is, this connection is given up
            return


async def _commit(
    connection: asyncpg.Connection, group: Sequence[_Waiting]
) -> tuple[list[Outcome[Any] | BaseException], list[str]]:
    """Run operations in one transaction; return what comes of each, and the news.

    Raises:
        Exception: it could not be committed, as far as this side knows; then all of them have failed.
    """
    if all(each.reads for each in group):
        begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    else:
        begin = "BEGIN; SELECT tick FROM store WHERE one = 1 FOR UPDATE"
    outcomes = []
    for each in group:
        await connection.execute(f"{begin}; SAVEPOINT operation")
        outcomes.append(await _outcome(connection, each.operation))
        begin = "RELEASE operation"
    news = list(dict.fromkeys(job_id for each in outcomes if isinstance(each, Outcome) for job_id in each.news))
    for payload in _payloads(news):
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)
    if await connection.execute("COMMIT") != "COMMIT":
        raise Unavailable("the database did not commit: try again")
    return outcomes, news


def _payloads(ids: Sequence[str]) -> list[str]:
    """Return ids as notifications, none too long."""
    parts: list[list[str]] = []
    room = 0
    for job_id in ids:
        size = len(json.dumps(job_id)) + 2
        if size > room:
            parts.append([])
            room = MAX_NOTIFY_BYTES
        parts[-1].append(job_id)
        room -= size
    return [json.dumps(part) for part in parts]


async def _outcome(connection: asyncpg.Connection, operation: Operation[Any]) -> Outcome[Any] | BaseException:
    """Run one operation; return what comes of it, also if that is an error of its own: then nothing of it is left."""
    try:
        return await _run(connection, operation)
    except Exception as error:  # whatever it is, whoever waits for this one gets it, and the others go on
        if connection.is_closed() or isinstance(error, OSError):
            raise
        await connection.execute("ROLLBACK TO operation")
        return _explain(error)


async def _run(connection: asyncpg.Connection, operation: Operation[T]) -> Outcome[T]:
    steps = operation()
    try:
        step = next(steps)
        while True:
            step = steps.send(await _execute(connection, step))
    except StopIteration as end:
        outcome: Outcome[T] = end.value
        return outcome


async def _execute(connection: asyncpg.Connection, step: Statement | ExecuteMany) -> Sequence[Sequence[Any]]:
    if isinstance(step, ExecuteMany):
        await connection.executemany(_dialect(step.sql), step.rows)
        return ()
    rows: Sequence[Sequence[Any]] = await connection.fetch(_dialect(step.sql), *step.values)
    return rows


@lru_cache(None)
def _dialect(sql: str) -> str:
    """Values are numbered, and a list is an array."""
    first, *others = sql.replace(" IN ?", " = ANY(?)").split("?")
    return first + "".join(f"${number}{text}" for number, text in enumerate(others, 1))


def _explain(error: Exception) -> Exception:
    """Return an error of the database, or of the way to it, as one of ours; anything else as it is."""
    state = getattr(error, "sqlstate", None) or ""
    if isinstance(error, MoesaicError | ValueError | TypeError) and not state:
        return error
    ours: MoesaicError = Unavailable(f"the database of jobs does not answer as it should ({error}): try again")
    if state == "53100":
        ours = StorageFull("the disk of the database of jobs is full: make room there")
    elif state in ("XX001", "XX002"):
        ours = StoreError(f"the database of jobs is damaged ({error}): restore it from a copy")
    elif state in ("42501", "3F000"):
        ours = StoreError(f"the database of jobs allows too little ({error}): let its user make the schema moesaic")
    ours.__cause__ = error
    return ours


async def _connect(address: str) -> asyncpg.Connection:
    try:
        import asyncpg
    except ImportError as error:
        raise NotInstalled("jobs in PostgreSQL need asyncpg: pip install 'moesaic[postgres]'") from error
    return await asyncpg.connect(
        address, timeout=CONNECT_SECONDS, command_timeout=_COMMAND_SECONDS, server_settings=_SETTINGS
    )


async def _prepare(connection: asyncpg.Connection) -> None:
    """Make the tables where there are none; refuse what is not ours to use."""
    if await connection.fetchval("SHOW server_encoding") != "UTF8":
        raise StoreError("the database of jobs is not in UTF8: make another with ENCODING 'UTF8'")
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        if await connection.fetchval("SELECT to_regclass('moesaic.store')") is None:
            if await connection.fetchval("SELECT to_regnamespace('moesaic')") is None:
                await connection.execute("CREATE SCHEMA moesaic")
            serial = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
            for statement in tables(serial=serial, blob="BYTEA", busy=_BUSY):
                await connection.execute(statement)
        version = await connection.fetchval("SELECT version FROM store")
    if version != VERSION:
        raise StoreError(
            f"the database of jobs is of version {version}, expected {VERSION}: "
            "finish its jobs with the Moesaic that made it, or drop the schema moesaic"
        )
