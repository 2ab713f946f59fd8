"""A planner's report as a picture: a bar of memory for each format, beside the memory of the machine.

The picture is SVG without scripts or fonts of its own, and has a light and a dark colour scheme.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from moesaic.errors import InvalidParameter
from moesaic.planner import Report, Row
from moesaic.planner.text import size_text, speed_text

WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 860, 110, 250, 26, 14, 64
PARTS = (("weights", "weight_bytes", "#4477aa"), ("key/value cache", "cache_bytes", "#ccbb44"))
WORKSPACE = ("process and a step", "workspace_bytes", "#aa3377")
"""Name, field and colour of the parts of a bar; the colours are Paul Tol's "bright" scheme."""

_STYLE = """text { font: 14px system-ui, sans-serif; fill: #222 } .title { font-size: 17px; font-weight: 600 }
.soft { fill: #666 } .limit { stroke: #ee6677; stroke-width: 2 } .back { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .soft { fill: #aaa } .back { fill: #1b1b1b } }"""


def write(report: Report, path: Path) -> None:
    """Write the picture of a report to an .svg file.

    Raises:
        InvalidParameter: the file has another suffix, or cannot be written.
    """
    if path.suffix != ".svg":
        raise InvalidParameter("picture", f"{path} does not end in .svg")
    try:
        path.write_text(svg(report))
    except OSError as error:
        raise InvalidParameter("picture", f"{path} cannot be written: {error.strerror}") from error


def svg(report: Report) -> str:
    """Return the picture of a report."""
    height = TOP + len(report.rows) * (BAR + GAP) + 50
    longest = max(report.memory_bytes, *(row.bytes for row in report.rows))
    scale = (WIDTH - LEFT - RIGHT) / longest
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(report.model)} on {escape(report.machine.name)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="12" y="26">{escape(_heading(report))}</text>',
        *_legend(),
    ]
    for index, row in enumerate(report.rows):
        lines += _bar(row, TOP + index * (BAR + GAP), scale)
    x, bottom = LEFT + report.memory_bytes * scale, TOP + len(report.rows) * (BAR + GAP)
    lines.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
    memory = f"memory of the machine: {report.memory_bytes / 1e9:.0f} GB"
    anchor = "end" if x > WIDTH / 2 else "start"
    lines.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 20}" text-anchor="{anchor}">{memory}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _heading(report: Report) -> str:
    answers = "one answer" if report.batch == 1 else f"{report.batch} answers"
    return f"{report.model} on {report.machine.name}: {answers} of {report.context:,} tokens"


def _legend() -> Iterator[str]:
    x = LEFT
    for name, _, colour in (*PARTS, WORKSPACE):
        yield f'<rect x="{x}" y="38" width="12" height="12" fill="{colour}"/>'
        yield f'<text class="soft" x="{x + 18}" y="49">{name}</text>'
        x += 40 + 8 * len(name)


def _bar(row: Row, y: int, scale: float) -> Iterator[str]:
    """Yield the bar of a format with its name on the left, and its size and speed on the right."""
    middle = y + BAR / 2 + 5
    yield f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end">{escape(row.format)}</text>'
    x = float(LEFT)
    for name, field, colour in (*PARTS, WORKSPACE):
        width = getattr(row, field) * scale
        opacity = 1 if row.fits else 0.35
        yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}" opacity="{opacity}">'
        yield f"<title>{name}: {getattr(row, field) / 1e9:.1f} GB</title></rect>"
        x += width
    speed = f"{speed_text(row.one.per_answer)} tokens/s" if row.fits else "does not fit"
    place = ", experts in main memory" if row.experts_on_host and row.fits else ""
    yield f'<text x="{WIDTH - RIGHT + 12}" y="{middle}">{size_text(row.bytes)}, {speed}{place}</text>'
