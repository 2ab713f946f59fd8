"""A comparison as people read it: tables in a terminal, and a plot.

Knows how figures are laid out. Does not know how they came about. The plot needs matplotlib, which is
imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moesaic.bench.compare import Cell, Comparison, Row
from moesaic.bench.plotting import COLOURS

FACTS = ("bits", "GiB", "same", "spread")
"""What stands in front of a row's speeds: see docs/how-to/benchmark.md."""
STEP, WHOLE = "moesaic", "moesaic_llm"

Value = Callable[[Row, Cell], str]


def tables(found: Comparison) -> Iterator[str]:
    """Yield the lines of all tables."""
    cells = [cell for cell in found.plan.cells() if not cell.busy]
    yield f"tokens per second: median of {found.plan.rounds} rounds, {found.plan.threads} threads"
    yield from _table(found.rows, cells, lambda row, cell: _number(row.speed(cell)), facts=True)
    if found.limits:
        yield "\nshare of what the memory, and the fastest multiplications, would allow"
        yield from _table(found.rows, cells, lambda row, cell: f"{row.speed(cell) / row.limits[cell.name]:.0%}")
    steps = {row.format: row for row in found.rows if row.peer == STEP}
    wholes = [row for row in found.rows if row.peer == WHOLE and row.format in steps]
    if wholes:
        yield "\ntime that the whole LLM takes beyond the model's steps alone"
        yield from _table(
            wholes, cells, lambda row, cell: f"{steps[row.format].speed(cell) / row.speed(cell) - 1:+.1%}"
        )
    busy = [cell for cell in cells if found.plan.beside(cell)]
    if busy:
        yield "\nshare of its speed that each keeps while another process keeps one core busy"
        yield from _table(found.rows, busy, _kept)
    for names, what in ((found.left_out, "left out"), (found.failed, "failed")):
        yield from (f"\n{what}: {name}: {why}" for name, why in names.items())


def _kept(row: Row, cell: Cell) -> str:
    return f"{row.speed(Cell(cell.tokens, cell.batch, busy=True)) / row.speed(cell):.0%}"


def _table(rows: Sequence[Row], cells: Sequence[Cell], value: Value, *, facts: bool = False) -> Iterator[str]:
    """Yield two lines of heading, then a line for each row."""
    groups = [f"after {cell.tokens}" if cell.batch else "prefill" for cell in cells]
    first = [group if place == 0 or group != groups[place - 1] else "" for place, group in enumerate(groups)]
    second = [f"batch {cell.batch}" if cell.batch else str(cell.tokens) for cell in cells]
    grid = [["", *(("",) * len(FACTS) if facts else ()), *first], ["", *(FACTS if facts else ()), *second]]
    for row in rows:
        grid.append([row.name, *(_facts(row, cells) if facts else ()), *(value(row, cell) for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    for name, *others in grid:
        line = "  ".join(f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        yield f"{name:<{widths[0]}}  {line}".rstrip()


def _facts(row: Row, cells: Sequence[Cell]) -> list[str]:
    peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
    same = "?" if row.agrees is None else f"{row.agrees}/{len(row.likeliest)}"
    return [f"{row.bits:.2f}", peak, same, f"{max(row.spread(cell) for cell in cells):.0%}"]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def plot(found: Comparison, path: Path, caption: str) -> None:
    """Draw a panel for each cell and one for memory: a bar for each row, its limit as a line across it.

    Args:
        found: what is drawn.
        path: an .svg or .png file.
        caption: stands below: the machine, the commit.
    """
    from matplotlib.figure import Figure

    plan, rows = found.plan, found.rows
    cells = [cell for cell in plan.cells() if not cell.busy]
    lines = [[cell for cell in cells if not cell.batch]]
    lines += [[cell for cell in cells if cell.batch and cell.tokens == context] for context in plan.contexts]
    columns = max(len(lines[0]) + 1, *(len(line) for line in lines))
    size = (2.4 + 2.3 * columns, (1.0 + 0.2 * len(rows)) * len(lines) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(lines), columns, sharey=True, squeeze=False)
    for axes, line in zip(grid, lines, strict=True):
        for axis, cell in zip(axes, line, strict=False):
            title = (
                f"batch {cell.batch} after {cell.tokens} tokens" if cell.batch else f"prompt of {cell.tokens} tokens"
            )
            limits = [row.limits.get(cell.name) for row in rows]
            _panel(axis, rows, title, [row.speed(cell) for row in rows], limits)
        for axis in axes[len(line) :]:
            axis.set_visible(False)
    memory = grid[0][len(lines[0])]
    memory.set_visible(True)
    _panel(memory, rows, "peak memory, GiB", [(row.peak_bytes or 0) / 2**30 for row in rows], [])
    model = f"Mixtral of {found.shape.layers} layers, {plan.threads} threads"
    figure.suptitle(f"bars and numbers: tokens per second, {model}; lines: what memory and multipliers allow")
    figure.supxlabel(caption, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _panel(axis: Any, rows: Sequence[Row], title: str, values: list[float], limits: Sequence[float | None]) -> None:
    peers = list(dict.fromkeys(row.peer for row in rows))
    colours = [COLOURS[peers.index(row.peer) % len(COLOURS)] for row in rows]
    axis.barh(range(len(rows)), values, color=colours)
    ends = list(values)
    for place, most in enumerate(limits):
        if most is not None:
            axis.vlines(most, place - 0.45, place + 0.45, color="black", linewidth=1.2)
            ends[place] = max(values[place], most)
    for place, end in enumerate(ends):  # behind both, so that no line crosses a number
        text, beside = _number(values[place]), {"xytext": (3, 0), "textcoords": "offset points"}
        axis.annotate(text, (end, place), va="center", fontsize="x-small", **beside)
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize="small")
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axis.set_xlim(0, 1.18 * max(ends))
    axis.set_title(title, fontsize="medium")
    axis.tick_params(axis="x", labelsize="small")
    axis.locator_params(axis="x", nbins=4)
    axis.spines[["top", "right"]].set_visible(False)
