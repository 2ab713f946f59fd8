"""A report as Markdown, with its charts in files beside it: GitHub shows no pictures that are inside the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from moesaic.bench.report import svg
from moesaic.bench.report.blocks import Page, Section, Table


def render(page: Page, stem: str) -> tuple[str, Mapping[str, str]]:
    """Return a page as Markdown, and its charts as texts of SVG files by name; the names begin with ``stem``."""
    charts: dict[str, str] = {}
    lines = [f"# {_escape(page.title)}", "", _escape(page.text)]
    for section in page.sections:
        lines += _section(section, stem, charts)
    return "\n".join(lines) + "\n", charts


def _section(section: Section, stem: str, charts: dict[str, str]) -> Iterator[str]:
    yield from ("", f"## {_escape(section.title)}")
    if section.text:
        yield from ("", _escape(section.text))
    for chart in section.charts:
        name = f"{stem}-{len(charts) + 1}.svg"
        charts[name] = svg.draw(chart, alone=True)
        yield from ("", f"![{_escape(f'{chart.title}, {chart.unit}')}](<{name}>)")
    for table in section.tables:
        yield from ("", f"**{_escape(table.caption)}**", "", *_table(table))


def _table(table: Table) -> Iterator[str]:
    yield _row(table.header)
    yield "|---|" + ("---|" if table.texts else "---:|") * (len(table.header) - 1)
    yield from (_row(row) for row in table.rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    """Return ``text`` with everything escaped that Markdown would read as markup, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))
