"""A report as one HTML page: charts inside, nothing loaded from elsewhere, and nothing that runs."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from moesaic.bench.report import svg
from moesaic.bench.report.blocks import Page, Section, Table

STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1rem;background:#fff;color:#24292f}
h1{font-size:1.7rem;margin:.5rem 0}h2{font-size:1.3rem;margin:2.5rem 0 .5rem}p{max-width:46rem}
figure,.wide{margin:1rem 0;overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{padding:.25rem .6rem;border-bottom:1px solid #d0d7de;text-align:right;vertical-align:top}
th:first-child,.texts th,.texts td{text-align:left}.texts td{overflow-wrap:anywhere;min-width:7rem}
thead th{border-bottom:2px solid #8c959f}tbody th{font-weight:400}
@media (prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}th,td{border-color:#30363d}}
"""


def render(page: Page) -> str:
    """Return a page as HTML."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head += f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    style = f"<style>{STYLE}{svg.STYLE}</style>"
    title = escape(page.title)
    body = "\n".join(line for section in page.sections for line in _section(section))
    intro = f"<h1>{title}</h1>\n<p>{escape(page.text)}</p>"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<title>{title}</title>\n{style}</head>\n'
        f"<body>\n<main>\n{intro}\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> Iterator[str]:
    yield f"<section><h2>{escape(section.title)}</h2>"
    if section.text:
        yield f"<p>{escape(section.text)}</p>"
    for chart in section.charts:
        yield f'<figure tabindex="0">{svg.draw(chart)}</figure>'
    for table in section.tables:
        yield f'<div class="wide" tabindex="0">{"".join(_table(table))}</div>'
    yield "</section>"


def _table(table: Table) -> Iterator[str]:
    yield '<table class="texts">' if table.texts else "<table>"
    yield f"<caption>{escape(table.caption)}</caption><thead><tr>"
    yield from (f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    yield "</tr></thead><tbody>"
    for name, *cells in table.rows:
        yield f'<tr><th scope="row">{escape(name)}</th>'
        yield from (f"<td>{escape(cell)}</td>" for cell in cells)
        yield "</tr>"
    yield "</tbody></table>"
