"""SQL programs: operations on a job store that are written once and run on SQLite and PostgreSQL.

An operation is a generator: it yields SQL statements, receives their rows, and returns an outcome. It does no I/O
itself, and it raises errors only before its first write. The SQL is the common subset of SQLite and PostgreSQL, with
three placeholders: ``?`` for a value, ``IN ?`` for a list of values, and ``SKIP_LOCKED`` for skipping locked rows.

This module does not depend on jobs or connections.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Rows = Sequence[Sequence[Any]]

SKIP_LOCKED = " FOR UPDATE SKIP LOCKED"
"""Suffix of a query that locks its rows and skips rows that are locked by other connections."""


@dataclass(frozen=True)
class Statement:
    """An SQL statement and the values of its placeholders. A list is the value of an ``IN ?``."""

    sql: str
    values: Sequence[Any] = ()


@dataclass(frozen=True)
class ExecuteMany:
    """An SQL statement without result rows, executed once for each row of values."""

    sql: str
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """Return value of an operation, and the changes that listeners are notified of after the commit."""

    value: T
    changes: tuple[str, ...] = ()
    """Ids of changed jobs; "" means that there are jobs to lease (see ``jobs.ChangeListener``)."""


SqlProgram = Generator[Statement | ExecuteMany, Rows, T]
Operation = Callable[[], SqlProgram[Outcome[T]]]
"""Function that creates the SQL program of an operation. It is called again for each retry."""
