"""How an operation on the store is written down once and run on any database.

An operation is a generator: it yields statements, is sent their rows, and returns an outcome. It does no I/O of its
own, and its refusals come before its first write. The SQL is what SQLite and PostgreSQL have in common; three marks
stand for what they have not: ``?`` for a value, ``IN ?`` for a list of values, ``SKIP`` for rows locked by others.

Knows statements. Does not know jobs, nor connections.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Rows = Sequence[Sequence[Any]]

SKIP_LOCKED = " FOR UPDATE SKIP LOCKED"
"""At the end of a query: lock its rows, and pass over those that are locked."""


@dataclass(frozen=True)
class Statement:
    """One statement and its values; a list among them fills an ``IN ?``."""

    sql: str
    values: Sequence[Any] = ()


@dataclass(frozen=True)
class ExecuteMany:
    """One statement that returns nothing, for each of several rows of values."""

    sql: str
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What an operation returns, and whom to tell once it is committed (see ``jobs.News``)."""

    value: T
    news: tuple[str, ...] = ()


SqlProgram = Generator[Statement | ExecuteMany, Rows, T]
Operation = Callable[[], SqlProgram[Outcome[T]]]
"""Begins an operation; called again where it has to be run again."""
