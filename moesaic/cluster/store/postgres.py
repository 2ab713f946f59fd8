"""Job store in PostgreSQL, for several gateways that share one database.

Each store has one connection for its operations. A task owns it, takes all waiting operations, runs each in a savepoint
of one transaction, and commits them together, so they share one flush of the disk. Every writer locks the single row of
``store`` first, so the transactions of several gateways run one after another. If a gateway hangs in a transaction, the
server closes its connection (``idle_in_transaction_session_timeout``).

A second connection listens for changes by other gateways. Both connections are reopened after a failure.

This module does not depend on the content of operations.
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

from moesaic.cluster.jobs import ChangeListener, Store, StoreLimits
from moesaic.cluster.store._operations import NEW_WORK
from moesaic.cluster.store._program import ExecuteMany, Operation, Outcome, Statement
from moesaic.cluster.store._schema import VERSION, tables
from moesaic.cluster.store._sql_store import SqlStore, notify
from moesaic.errors import MoesaicError, NotInstalled, StorageFull, StoreError, Unavailable

if TYPE_CHECKING:
    import asyncpg

T = TypeVar("T")

MAX_BATCH = 64
"""Maximum number of operations (savepoints) in one transaction. PostgreSQL would keep track of more on disk."""
CHANNEL = "moesaic"
MAX_NOTIFY_BYTES = 7900
"""Maximum size of one notification in bytes; PostgreSQL allows 8000."""
CONNECT_SECONDS = 5.0
PING_SECONDS = 10.0
"""Seconds between two checks of the listening connection."""
BACKOFF_SECONDS = (0.1, 5.0)
"""The random delay before a reconnect is below a bound: the first value, doubled each time up to the second one."""
_LOCK = 0x4D6F6573
_SETTINGS = {
    "application_name": "moesaic",
    "search_path": "moesaic",
    "synchronous_commit": "on",
    "statement_timeout": "10s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "5s",
    "enable_seqscan": "off",  # every query has an index, and the planner's statistics of a queue are always outdated
    "jit": "off",
}
_COMMAND_SECONDS = 20.0
_BUSY = """ WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500,
    autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0)"""
"""Storage settings for rows that change often: free space for new row versions, and frequent vacuuming."""


class _Waiting(NamedTuple):
    operation: Operation[Any]
    answer: asyncio.Future[Any]
    reads: bool


async def open_store(address: str, limits: StoreLimits) -> Store:
    """Open the job store in the database at ``address``; create its tables, in schema ``moesaic``, if needed.

    Raises:
        Unavailable: the database is unreachable.
        StoreError: the store has another schema version, the database is not in UTF-8, or a permission is missing.
        NotInstalled: asyncpg is missing.
    """
    try:
        connection = await _connect(address)
    except Exception as error:
        raise _explain(error) from error
    try:
        await _prepare(connection)
        database = PostgresDatabase(address, connection)
        await database.start()
    except Exception as error:
        connection.terminate()
        raise _explain(error) from error
    return SqlStore(database, limits)


class PostgresDatabase:
    """A PostgreSQL database with jobs. One connection runs all operations, another one listens for changes."""

    shared = True

    def __init__(self, address: str, connection: asyncpg.Connection) -> None:
        self.listeners: list[ChangeListener] = []
        self._address = address
        self._connection = connection
        self._waiting: deque[_Waiting] = deque()
        self._awake = asyncio.Event()
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the task that runs operations and the task that listens for changes."""
        listener = await self._listen()
        self._tasks = [asyncio.create_task(self._run_operations()), asyncio.create_task(self._listen_forever(listener))]

    async def run(self, operation: Operation[T], *, reads: bool = False) -> T:
        if self._closing:
            raise Unavailable("the job store is closed")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(operation, answer, reads))
        self._awake.set()
        return await answer

    async def integrity(self) -> str:
        return "ok"  # PostgreSQL checks its pages itself

    async def close(self) -> None:
        self._closing = True
        self._awake.set()
        owner, listener = self._tasks
        listener.cancel()
        await asyncio.wait([owner, listener])
        self._connection.terminate()

    async def _run_operations(self) -> None:
        """Run the waiting operations, group by group, until the store is closed."""
        attempts = 0
        while group := await self._take():
            try:
                if self._connection.is_closed():
                    self._connection = await _connect(self._address)
                outcomes, changes = await _commit(self._connection, group)
            except Exception as error:  # every error is passed to the callers, and the task continues
                group += self._waiting
                self._waiting.clear()
                _settle(group, [_explain(error) for _ in group])
                self._connection.terminate()
                await asyncio.sleep(_backoff(attempts))
                attempts += 1
            else:
                attempts = 0
                _settle(group, outcomes)
                notify(self.listeners, changes)

    async def _take(self) -> list[_Waiting]:
        """Wait for operations; return up to ``MAX_BATCH`` of them, or an empty list when the store is closed."""
        while not self._waiting and not self._closing:
            self._awake.clear()
            await self._awake.wait()
        return [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]

    async def _listen(self) -> asyncpg.Connection:
        connection = await _connect(self._address)
        try:
            await connection.add_listener(CHANNEL, self._handle_notification)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _listen_forever(self, connection: asyncpg.Connection) -> None:
        """Listen for changes until cancelled; reconnect after failures."""
        attempts = 0
        while True:
            try:
                await _until_broken(connection)
            finally:
                connection.terminate()
            while connection.is_closed():
                await asyncio.sleep(_backoff(attempts))
                attempts += 1
                with contextlib.suppress(Exception):  # the next attempt can succeed after any error
                    connection = await self._listen()
            attempts = 0
            notify(self.listeners, [NEW_WORK])  # notifications during the interruption are lost

    def _handle_notification(self, _connection: object, pid: int, _channel: str, payload: object) -> None:
        if self._connection.is_closed() or pid != self._connection.get_server_pid():
            notify(self.listeners, json.loads(str(payload)))


def _backoff(attempts: int) -> float:
    """Return the delay in seconds after this number of failed attempts: exponential backoff with full jitter."""
    first, limit = BACKOFF_SECONDS
    return random.uniform(0, min(limit, first * 2 ** min(attempts, 16)))


def _settle(group: Sequence[_Waiting], outcomes: Sequence[Outcome[Any] | BaseException]) -> None:
    for item, outcome in zip(group, outcomes, strict=True):
        if item.answer.done():
            continue
        if isinstance(outcome, Outcome):
            item.answer.set_result(outcome.value)
        else:
            item.answer.set_exception(outcome)


async def _until_broken(connection: asyncpg.Connection) -> None:
    """Wait until a connection is closed or fails a check."""
    broken = asyncio.Event()
    connection.add_termination_listener(lambda _connection: broken.set())
    while not connection.is_closed():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(broken.wait(), PING_SECONDS)
            return
        try:
            await connection.execute("SELECT 1")
        except Exception:  # after any error, the connection is replaced
            return


async def _commit(
    connection: asyncpg.Connection, group: Sequence[_Waiting]
) -> tuple[list[Outcome[Any] | BaseException], list[str]]:
    """Run operations in one transaction; return the outcome or error of each, and the changes to notify.

    Raises:
        Exception: the commit failed or its result is unknown; all operations count as failed.
    """
    if all(item.reads for item in group):
        begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    else:
        begin = "BEGIN; SELECT tick FROM store WHERE one = 1 FOR UPDATE"
    outcomes = []
    for item in group:
        await connection.execute(f"{begin}; SAVEPOINT operation")
        outcomes.append(await _outcome(connection, item.operation))
        begin = "RELEASE operation"
    succeeded = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
    changes = list(dict.fromkeys(change for outcome in succeeded for change in outcome.changes))
    for payload in _payloads(changes):
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)
    if await connection.execute("COMMIT") != "COMMIT":
        raise Unavailable("the job database did not commit: try again")
    return outcomes, changes


def _payloads(job_ids: Sequence[str]) -> list[str]:
    """Return JSON payloads for notifications with these ids, each of at most ``MAX_NOTIFY_BYTES``."""
    parts: list[list[str]] = []
    free_bytes = 0
    for job_id in job_ids:
        size = len(json.dumps(job_id)) + 2
        if size > free_bytes:
            parts.append([])
            free_bytes = MAX_NOTIFY_BYTES
        parts[-1].append(job_id)
        free_bytes -= size
    return [json.dumps(part) for part in parts]


async def _outcome(connection: asyncpg.Connection, operation: Operation[Any]) -> Outcome[Any] | BaseException:
    """Run one operation; return its outcome, or its error after a rollback to the savepoint."""
    try:
        return await _run(connection, operation)
    except Exception as error:  # the error is passed to the caller of this operation only
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
    """Translate SQL of ``_program`` to PostgreSQL: placeholders are numbered, and a list is passed as an array."""
    first, *others = sql.replace(" IN ?", " = ANY(?)").split("?")
    return first + "".join(f"${number}{text}" for number, text in enumerate(others, 1))


def _explain(error: Exception) -> Exception:
    """Convert an error of the database or its connection to a ``MoesaicError``. Return other errors unchanged."""
    state = getattr(error, "sqlstate", None) or ""
    if isinstance(error, MoesaicError | ValueError | TypeError) and not state:
        return error
    result: MoesaicError = Unavailable(f"the job database is not available ({error}): try again")
    if state == "53100":
        result = StorageFull("the disk of the job database is full: free some space")
    elif state in ("XX001", "XX002"):
        result = StoreError(f"the job database is damaged ({error}): restore a backup")
    elif state in ("42501", "3F000"):
        result = StoreError(f"a permission is missing in the job database ({error}): allow creating schema moesaic")
    result.__cause__ = error
    return result


async def _connect(address: str) -> asyncpg.Connection:
    try:
        import asyncpg
    except ImportError as error:
        raise NotInstalled("a PostgreSQL store needs asyncpg: pip install 'moesaic[postgres]'") from error
    return await asyncpg.connect(
        address, timeout=CONNECT_SECONDS, command_timeout=_COMMAND_SECONDS, server_settings=_SETTINGS
    )


async def _prepare(connection: asyncpg.Connection) -> None:
    """Create the store's tables if they are missing. Raise StoreError if the database cannot hold a store."""
    if await connection.fetchval("SHOW server_encoding") != "UTF8":
        raise StoreError("the job database is not in UTF8: create another with ENCODING 'UTF8'")
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
            f"the job database has version {version} of the schema, expected {VERSION}: "
            "finish its jobs with the Moesaic version that created it, or drop the schema moesaic"
        )
