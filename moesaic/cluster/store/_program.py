"""SQL programs: operations on a store that are written once and run on any database.

An operation is a generator: it yields statements, receives their rows, and returns an outcome. It does no I/O itself,
and it raises errors only before its first write. The SQL is the common subset of SQLite and PostgreSQL, with three
placeholders: ``?`` for a value, ``IN ?`` for a list of values, and ``SKIP_LOCKED`` for skipping locked rows.

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
    """An SQL statement and its values. A list among the values belongs to an ``IN ?``."""

    sql: str
    values: Sequence[Any] = ()


@dataclass(frozen=True)
class ExecuteMany:
    """An SQL statement without result rows, executed once for each row of values."""

    sql: str
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """Return value of an operation, and the changes to notify after the commit (see ``jobs.ChangeListener``)."""

    value: T
    changes: tuple[str, ...] = ()
    """Ids of changed jobs; an empty string means that jobs can be leased."""


SqlProgram = Generator[Statement | ExecuteMany, Rows, T]
Operation = Callable[[], SqlProgram[Outcome[T]]]
"""Function that creates an operation's program; it is called again for each retry."""
