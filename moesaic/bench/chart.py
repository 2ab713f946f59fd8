"""Text tables and plots of a comparison of engines.

This module formats figures and does not compute them. Plots need matplotlib, which is imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moesaic.bench.compare import Cell, Comparison, Row
from moesaic.bench.plotting import COLOURS
from moesaic.text_tables import aligned

FACTS = ("bits", "GiB", "same", "spread")
"""Columns before the speeds of a row; docs/how-to/benchmark.md explains them."""
MODEL_STEP, WHOLE_LLM = "moesaic", "moesaic_llm"
"""Names of the two peers that run Moesaic: the model alone, and the LLM with scheduler and sampler."""

Value = Callable[[Row, Cell], str]


def tables(comparison: Comparison) -> Iterator[str]:
    """Yield the lines of text of all tables of a comparison."""
    cells = [cell for cell in comparison.plan.cells() if not cell.busy]
    yield f"tokens per second: median of {comparison.plan.rounds} rounds, {comparison.plan.threads} threads"
    yield from _table(comparison.rows, cells, lambda row, cell: _number(row.speed(cell)), facts=True)
    if comparison.limits:
        yield "\nfraction of the speed that memory bandwidth and multiplication would allow"
        yield from _table(comparison.rows, cells, lambda row, cell: f"{row.speed(cell) / row.limits[cell.name]:.0%}")
    steps = {row.format: row for row in comparison.rows if row.peer == MODEL_STEP}
    wholes = [row for row in comparison.rows if row.peer == WHOLE_LLM and row.format in steps]
    if wholes:
        yield "\nadditional time of the whole LLM beyond the model's steps alone"
        yield from _table(
            wholes, cells, lambda row, cell: f"{steps[row.format].speed(cell) / row.speed(cell) - 1:+.1%}"
        )
    busy = [cell for cell in cells if comparison.plan.repeats_busy(cell)]
    if busy:
        yield "\nfraction of the speed that remains while another process keeps one core busy"
        yield from _table(comparison.rows, busy, _busy_share)
    for reasons, heading in ((comparison.left_out, "left out"), (comparison.failed, "failed")):
        yield from (f"\n{heading}: {name}: {reason}" for name, reason in reasons.items())


def _busy_share(row: Row, cell: Cell) -> str:
    return f"{row.speed(Cell(cell.tokens, cell.batch, busy=True)) / row.speed(cell):.0%}"


def _table(rows: Sequence[Row], cells: Sequence[Cell], value: Value, *, facts: bool = False) -> Iterator[str]:
    """Yield two heading lines, then a line for each row with ``value`` of each cell; with ``facts``, FACTS before."""
    groups = [f"after {cell.tokens}" if cell.batch else "prefill" for cell in cells]
    first = [group if index == 0 or group != groups[index - 1] else "" for index, group in enumerate(groups)]
    second = [f"batch {cell.batch}" if cell.batch else str(cell.tokens) for cell in cells]
    grid = [["", *(("",) * len(FACTS) if facts else ()), *first], ["", *(FACTS if facts else ()), *second]]
    for row in rows:
        grid.append([row.name, *(_facts(row, cells) if facts else ()), *(value(row, cell) for cell in cells)])
    yield from aligned(grid)


def _facts(row: Row, cells: Sequence[Cell]) -> list[str]:
    peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
    same = "?" if row.agrees is None else f"{row.agrees}/{len(row.likeliest)}"
    return [f"{row.bits:.2f}", peak, same, f"{max(row.spread(cell) for cell in cells):.0%}"]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def plot(comparison: Comparison, path: Path, caption: str) -> None:
    """Draw a panel for each cell and one for memory, with a bar for each row and a line at the row's limit.

    Args:
        comparison: the result to draw.
        path: an .svg or .png file.
        caption: text below the plot, such as the machine and the commit.
    """
    from matplotlib.figure import Figure

    plan, rows = comparison.plan, comparison.rows
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
    model = f"Mixtral of {comparison.shape.layers} layers, {plan.threads} threads"
    figure.suptitle(f"bars and numbers: tokens per second, {model}; lines: limits of memory and multiplication")
    figure.supxlabel(caption, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _panel(axis: Any, rows: Sequence[Row], title: str, values: list[float], limits: Sequence[float | None]) -> None:
    peers = list(dict.fromkeys(row.peer for row in rows))
    colours = [COLOURS[peers.index(row.peer) % len(COLOURS)] for row in rows]
    axis.barh(range(len(rows)), values, color=colours)
    ends = list(values)
    for index, limit in enumerate(limits):
        if limit is not None:
            axis.vlines(limit, index - 0.45, index + 0.45, color="black", linewidth=1.2)
            ends[index] = max(values[index], limit)
    for index, end in enumerate(ends):  # numbers stand after both bar and line
        text, offset = _number(values[index]), {"xytext": (3, 0), "textcoords": "offset points"}
        axis.annotate(text, (end, index), va="center", fontsize="x-small", **offset)
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize="small")
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axis.set_xlim(0, 1.18 * max(ends))
    axis.set_title(title, fontsize="medium")
    axis.tick_params(axis="x", labelsize="small")
    axis.locator_params(axis="x", nbins=4)
    axis.spines[["top", "right"]].set_visible(False)
