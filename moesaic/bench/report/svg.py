"""Charts as SVG, without a library: the text stays text, and follows the light or dark scheme of the reader."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from moesaic.bench.plotting import COLOURS
from moesaic.bench.report.blocks import Bar, Chart, Group
from moesaic.text_tables import number, percent

STYLE = (
    "svg.chart{font:12px system-ui,sans-serif}.chart text{fill:#24292f}.chart .faint{fill:#5f6b78}"
    ".chart .axis{stroke:#8c959f}"
    + "".join(f".chart .s{index}{{fill:{colour}}}" for index, colour in enumerate(COLOURS))
    + "@media (prefers-color-scheme:dark){.chart text{fill:#e6edf3}.chart .faint{fill:#9aa5b1}}"
)
"""Style sheet of the charts: in the head of an HTML page, or inside an SVG file."""

LETTER = 6.8
"""Estimated width of a letter, in pixels; fonts differ, so it is on the large side."""
LINE = 16
BAR, GAP, HEIGHT = 40, 24, 200
"""Width of a standing bar, the gap between groups, and the height of the longest bar, in pixels."""
THICK, LENGTH = 15, 420
"""Thickness of a lying bar, and the length of the longest one."""
MARGIN = 8


def draw(chart: Chart, *, alone: bool = False) -> str:
    """Return a chart as an ``svg`` element, or with ``alone`` as the text of an SVG file."""
    width, height, shapes = _lying(chart) if chart.across else _standing(chart)
    width = max(width, _legend_width(chart))
    top = 2 * LINE + MARGIN if len(chart.series) > 1 else LINE + MARGIN
    head = f'<svg class="chart" role="img" viewBox="0 0 {width:.0f} {height + top:.0f}" width="{width:.0f}"'
    name = f"<title>{escape(f'{chart.title}, {chart.unit}')}</title>"
    title = _text(MARGIN, LINE - 3, f"{chart.title}, {chart.unit}", 'font-weight="600"')
    body = "".join([name, title, *_legend(chart), f'<g transform="translate(0 {top})">', *shapes, "</g>"])
    space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    style = f"<style>{STYLE}</style>" if alone else ""
    return f'{head}{space} height="{height + top:.0f}">{style}{body}</svg>'


def _legend_width(chart: Chart) -> float:
    names = len(f"{chart.title}, {chart.unit}") * LETTER * 1.1
    return 2 * MARGIN + max(names, sum(24 + LETTER * len(name) for name in chart.series))


def _legend(chart: Chart) -> Iterator[str]:
    x = float(MARGIN)
    for index, name in enumerate(chart.series if len(chart.series) > 1 else ()):
        yield f'<rect class="s{index % len(COLOURS)}" x="{x:.0f}" y="{LINE + 7}" width="10" height="10"/>'
        yield _text(x + 14, 2 * LINE, name)
        x += 24 + LETTER * len(name)


def _longest(chart: Chart) -> float:
    return max((bar.value for group in chart.groups for bar in group.bars), default=0.0) or 1.0


def _rect(bar: Bar, x: float, y: float, width: float, height: float) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{max(0, width):.1f}" height="{max(0, height):.1f}"'
    return f'<rect class="s{bar.series % len(COLOURS)}" {box}/>'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def _standing(chart: Chart) -> tuple[float, float, list[str]]:
    """Return the width, the height and the elements of bars that stand on their labels."""
    x, scale, shapes = float(MARGIN), HEIGHT / _longest(chart), list[str]()
    floor = HEIGHT + 2 * LINE
    for group in chart.groups:
        width = max(BAR * len(group.bars), *(LETTER * len(label) for label in group.labels))
        left = x + (width - BAR * len(group.bars)) / 2
        for index, bar in enumerate(group.bars):
            shapes += _standing_bar(bar, left + BAR * index, floor, bar.value * scale)
        for index, label in enumerate(group.labels):
            faint = 'class="faint" ' if index else ""
            shapes.append(_text(x + width / 2, floor + LINE * (index + 1), label, f'{faint}text-anchor="middle"'))
        x += width + GAP
    end = x - GAP + MARGIN
    shapes.append(f'<path class="axis" d="M{MARGIN} {floor}H{end - MARGIN:.0f}"/>')
    lines = max((len(group.labels) for group in chart.groups), default=0)
    return end, floor + LINE * (lines + 0.5), shapes


def _standing_bar(bar: Bar, x: float, floor: float, height: float) -> Iterator[str]:
    yield _rect(bar, x + 2, floor - height, BAR - 4, height)
    middle, anchor = x + BAR / 2, 'text-anchor="middle"'
    above = floor - height - 4
    if bar.share is not None:
        yield _text(middle, above, percent(bar.share), f'class="faint" {anchor}')
        above -= LINE - 2
    yield _text(middle, above, number(bar.value), anchor)


def _lying(chart: Chart) -> tuple[float, float, list[str]]:
    """Return the width, the height and the elements of bars that lie beside their labels."""
    left = MARGIN + LETTER * max((len(_beside(group)) for group in chart.groups), default=0) + 6
    scale, y, shapes = LENGTH / _longest(chart), 4.0, list[str]()
    for group in chart.groups:
        middle = y + THICK * len(group.bars) / 2 + 4
        shapes.append(_text(left - 6, middle, _beside(group), 'text-anchor="end"'))
        for index, bar in enumerate(group.bars):
            top, length = y + THICK * index, bar.value * scale
            shapes.append(_rect(bar, left, top + 1, length, THICK - 2))
            share = "" if bar.share is None else f" ({percent(bar.share)})"
            shapes.append(_text(left + length + 5, top + THICK - 4, number(bar.value) + share, 'class="faint"'))
        y += THICK * len(group.bars) + 6
    shapes.append(f'<path class="axis" d="M{left:.0f} 0V{y:.0f}"/>')
    return left + LENGTH + 15 * LETTER, y + 4, shapes


def _beside(group: Group) -> str:
    return ", ".join(group.labels)
