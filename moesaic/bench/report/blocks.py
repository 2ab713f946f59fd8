"""What a page consists of: sections with charts and tables. The page's formats draw these; they know no measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A bar of a chart, in the chart's unit."""

    series: int
    """Index of its name in ``Chart.series``."""
    value: float
    share: float | None = None
    """Fraction of the limit of the machine; None: unknown."""


@dataclass(frozen=True)
class Group:
    """Bars that stand together, and the lines of text below or beside them."""

    labels: tuple[str, ...]
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Chart:
    """Groups of bars."""

    title: str
    unit: str
    series: tuple[str, ...]
    groups: Sequence[Group]
    across: bool = False
    """Whether bars lie, one below the other, beside labels that may be long; otherwise they stand on their labels."""


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: bool = False
    """Whether all columns are texts, and not numbers after the first."""


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and what belongs to it."""

    title: str
    text: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    text: str
    sections: Sequence[Section]
