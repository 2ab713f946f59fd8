"""Text and plots of a load test's figures.

This module formats figures and does not compute them. Plots need matplotlib, which is imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesaic.bench.latency import METRICS, samples_ms, tokens_per_second
from moesaic.bench.plotting import COLOURS
from moesaic.bench.serving import Run
from moesaic.text_tables import aligned

Figures = dict[str, Any]

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
STATISTICS = ("mean", "median", "p90", "p99", "max")
COLUMNS = (
    ("requests", "completed"),
    ("failed", "failed"),
    ("req/s", "request_throughput"),
    ("goodput", "request_goodput"),
    ("out tok/s", "output_throughput"),
    ("total tok/s", "total_token_throughput"),
    ("stream mean", "mean_stream_throughput"),
    ("p10", "p10_stream_throughput"),
    ("TTFT p50", "median_ttft_ms"),
    ("p99", "p99_ttft_ms"),
    ("TPOT p50", "median_tpot_ms"),
    ("p99", "p99_tpot_ms"),
    ("ITL p99", "p99_itl_ms"),
    ("tok/chunk", "tokens_per_chunk"),
    ("E2E p50", "median_e2el_ms"),
)
"""Columns of the table of several loads: title, and name of the figure."""

SINGLE_TOKENS = 1.1
"""Tokens per chunk up to which ITL is about the time of a token."""


def lines(results: Sequence[Figures]) -> Iterator[str]:
    """Yield the figures of one load, or a table with a row per load; then warnings."""
    yield from _single(results[0]) if len(results) == 1 else _table(results)
    for figures in results:
        where = "" if len(results) == 1 else f" with {load_name(figures)}"
        if figures["interrupted"]:
            yield f"interrupted{where}: only requests completed by then are counted"
        if figures["failures"]:
            yield f"failed{where}: {', '.join(f'{count} x {kind}' for kind, count in figures['failures'].items())}"
        if figures["tokens_per_chunk"] is not None and figures["tokens_per_chunk"] > SINGLE_TOKENS:
            count = tokens_per_chunk(figures)
            yield f"note{where}: a chunk has {count} tokens on average, so ITL is no time per token; compare TPOT"
        if figures["warning"]:
            yield f"warning{where}: {figures['warning']}"


def load_name(figures: Figures) -> str:
    """Return a short name of the load that ``figures`` were measured with."""
    if figures["max_concurrency"] is not None:
        return f"concurrency {figures['max_concurrency']}"
    even = "" if figures["burstiness"] == 1 else f", burstiness {figures['burstiness']}"
    return f"{figures['request_rate']} requests/s{even}"


def _single(figures: Figures) -> Iterator[str]:
    ended = f"{figures['completed']} answered, {figures['failed']} failed in {figures['duration']:.1f} s"
    yield f"requests  {ended}; {load_name(figures)}, at most {figures['max_concurrent_requests']} concurrent"
    yield f"prompts   {_lengths(figures, 'prompt')}; counted by {figures['prompt_tokens_counted_by']}"
    yield f"answers   {_lengths(figures, 'answer')}; counted by {figures['tokens_counted_by']}"
    yield f"speed     {_number(figures['request_throughput'])} requests/s"
    total = f"{_number(figures['total_token_throughput'])} including prompts"
    peak = f"{_number(figures['max_output_tokens_per_s'])} in the fastest second"
    yield f"          {_number(figures['output_throughput'])} output tokens/s; {total}; {peak}"
    mean, low = _number(figures["mean_stream_throughput"]), _number(figures["p10_stream_throughput"])
    yield f"          {mean} tokens/s per stream on average; {low} at the 10th percentile"
    if figures["request_goodput"] is not None:
        limits = ", ".join(f"{TITLES[name]} {limit:g} ms" for name, limit in figures["goodput"].items())
        yield f"goodput   {_number(figures['request_goodput'])} requests/s within {limits}"
    yield "".join([f"{'ms':<8}", *(f"{statistic:>10}" for statistic in STATISTICS)])
    for name in METRICS:
        values = (_number(figures[f"{statistic}_{name}_ms"]) for statistic in STATISTICS)
        beside = f"  {tokens_per_chunk(figures)} tokens per chunk" if name == "itl" else ""
        yield "".join([f"{TITLES[name]:<8}", *(f"{value:>10}" for value in values), beside])
    sent = (
        "" if figures["client_send_late_p99_ms"] is None else f"; sent {figures['client_send_late_p99_ms']:.1f} ms late"
    )
    late = f"{figures['client_lag_p99_ms']:.1f} ms late (p99), {figures['client_lag_max_ms']:.1f} at most{sent}"
    yield f"client    timers {late}; {figures['client_cpu']:.0%} of a core"


def _lengths(figures: Figures, kind: str) -> str:
    total = figures["total_input_tokens" if kind == "prompt" else "total_output_tokens"]
    asked = figures[f"mean_{kind}_tokens_asked"]
    requested = "" if asked is None else f", {_number(asked)} requested"
    return f"{total} tokens, {_number(figures[f'mean_{kind}_tokens'])} on average{requested}"


def _table(results: Sequence[Figures]) -> Iterator[str]:
    columns = [column for column in COLUMNS if any(figures[column[1]] is not None for figures in results)]
    grid = [["", *(title for title, _ in columns)]]
    grid += [[load_name(figures), *(_cell(figures, key) for _, key in columns)] for figures in results]
    yield "throughput in tokens/s; times in ms; stream: tokens/s of a single answer"
    yield from aligned(grid)


def _cell(figures: Figures, key: str) -> str:
    return tokens_per_chunk(figures) if key == "tokens_per_chunk" else _number(figures[key])


def tokens_per_chunk(figures: Figures) -> str:
    """Return the mean number of tokens of a chunk, as text; "?" if the server does not count tokens.

    ITL is the time between two chunks.
    """
    return "?" if figures["tokens_counted_by"] == "chunks" else _number(figures["tokens_per_chunk"])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plot(runs: Sequence[Run], results: Sequence[Figures], path: Path, title: str, caption: str) -> None:
    """Draw the distributions and the throughput over time of one load, or compare several loads.

    Args:
        runs: the measured runs.
        results: their figures.
        path: an .svg or .png file.
        title: text above the plot.
        caption: text below the plot, such as the machine and the commit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    if len(runs) == 1:
        _distributions(figure.subplots(1, 3), runs[0])
    else:
        _compare(figure.subplots(1, 4), results)
    figure.suptitle(title)
    figure.supxlabel(caption, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _distributions(axes: Any, run: Run) -> None:
    samples = samples_ms(run)
    for axis, name, colour in zip(axes, ("ttft", "itl"), COLOURS, strict=False):
        axis.hist(samples[name], bins=60, color=colour)
        _style(axis, f"{TITLES[name]}: number of values", "ms")
    speeds = tokens_per_second(run)
    axes[2].plot([second + 0.5 for second in range(len(speeds))], speeds, color=COLOURS[2])
    axes[2].set_ylim(bottom=0)
    _style(axes[2], "output tokens/s over time", "s")


def _compare(axes: Any, results: Sequence[Figures]) -> None:
    closed = results[0]["max_concurrency"] is not None
    labels = [str(figures["max_concurrency"] if closed else figures["request_rate"]) for figures in results]
    panels = (
        ("tokens/s, all streams", (("output_throughput", "output"), ("total_token_throughput", "with prompts"))),
        ("tokens/s per stream", (("mean_stream_throughput", "mean"), ("p10_stream_throughput", "p10"))),
        ("TTFT, ms", (("median_ttft_ms", "median"), ("p99_ttft_ms", "p99"))),
        (
            "TPOT and ITL, ms",
            (("median_tpot_ms", "TPOT median"), ("p99_tpot_ms", "TPOT p99"), ("p99_itl_ms", "ITL p99")),
        ),
    )
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for (key, label), colour in zip(curves, COLOURS, strict=False):
            axis.plot(
                range(len(results)),
                [_or_nan(figures[key]) for figures in results],
                marker="o",
                color=colour,
                label=label,
            )
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.set_xticks(range(len(results)), labels)
        axis.legend(fontsize="small", frameon=False)
        _style(axis, title, "concurrent requests" if closed else "requests per second")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _style(axis: Any, title: str, label: str) -> None:
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel(label, fontsize="small")
    axis.tick_params(labelsize="small")
    axis.spines[["top", "right"]].set_visible(False)
