"""What a load showed, as people read it: a table, and a plot.

Knows how figures are laid out. Does not know how they came about. The plot needs matplotlib, which is imported when
one is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesaic.bench.latency import METRICS, samples_ms, timeline
from moesaic.bench.plotting import COLOURS
from moesaic.bench.serving import Run

Figures = dict[str, Any]

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
WHICH = ("mean", "median", "p90", "p99", "max")
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
    ("E2E p50", "median_e2el_ms"),
)
"""Of the table of several settings, one row each."""


def lines(found: Sequence[Figures]) -> Iterator[str]:
    """Yield the figures of one setting, or a row for each of several."""
    yield from _one(found[0]) if len(found) == 1 else _several(found)
    for each in found:
        where = "" if len(found) == 1 else f" with {setting(each)}"
        if each["interrupted"]:
            yield f"interrupted{where}: only what had ended by then is counted"
        if each["failures"]:
            yield f"failed{where}: {', '.join(f'{count} x {kind}' for kind, count in each['failures'].items())}"
        if each["warning"]:
            yield f"warning{where}: {each['warning']}"


def setting(each: Figures) -> str:
    """Return what a row is called by: its load."""
    if each["max_concurrency"] is not None:
        return f"{each['max_concurrency']} at once"
    even = "" if each["burstiness"] == 1 else f", burstiness {each['burstiness']}"
    return f"{each['request_rate']} a second{even}"


def _one(each: Figures) -> Iterator[str]:
    ended = f"{each['completed']} answered, {each['failed']} failed in {each['duration']:.1f} s"
    yield f"requests  {ended}; {setting(each)}, at most {each['max_concurrent_requests']} running"
    yield f"prompts   {_lengths(each, 'prompt')}; counted by {each['prompt_tokens_counted_by']}"
    yield f"answers   {_lengths(each, 'answer')}; counted by {each['tokens_counted_by']}"
    yield f"speed     {_number(each['request_throughput'])} requests/s"
    total = f"{_number(each['total_token_throughput'])} with the prompts'"
    peak = f"{_number(each['max_output_tokens_per_s'])} in the best second"
    yield f"          {_number(each['output_throughput'])} output tokens/s; {total}; {peak}"
    mean, low = _number(each["mean_stream_throughput"]), _number(each["p10_stream_throughput"])
    yield f"          {mean} tokens/s of a stream on average; {low} of those that a tenth is slower than (p10)"
    if each["request_goodput"] is not None:
        kept = ", ".join(f"{TITLES[name]} {most:g} ms" for name, most in each["goodput"].items())
        yield f"goodput   {_number(each['request_goodput'])} requests/s within {kept}"
    yield "".join([f"{'ms':<8}", *(f"{which:>10}" for which in WHICH)])
    for name in METRICS:
        values = (_number(each[f"{which}_{name}_ms"]) for which in WHICH)
        yield "".join([f"{TITLES[name]:<8}", *(f"{value:>10}" for value in values)])
    sent = "" if each["client_send_late_p99_ms"] is None else f"; sent {each['client_send_late_p99_ms']:.1f} ms late"
    late = f"{each['client_lag_p99_ms']:.1f} ms late (p99), {each['client_lag_max_ms']:.1f} at most{sent}"
    yield f"client    timers {late}; {each['client_cpu']:.0%} of a core"


def _lengths(each: Figures, what: str) -> str:
    total = each["total_input_tokens" if what == "prompt" else "total_output_tokens"]
    asked = each[f"mean_{what}_tokens_asked"]
    wish = "" if asked is None else f", {_number(asked)} asked for"
    return f"{total} tokens, {_number(each[f'mean_{what}_tokens'])} on average{wish}"


def _several(found: Sequence[Figures]) -> Iterator[str]:
    columns = [column for column in COLUMNS if any(each[column[1]] is not None for each in found)]
    grid = [["", *(title for title, _ in columns)]]
    grid += [[setting(each), *(_number(each[key]) for _, key in columns)] for each in found]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    yield "tokens a second; times in ms; stream: tokens a second of a single answer"
    for name, *others in grid:
        line = "  ".join(f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        yield f"{name:<{widths[0]}}  {line}".rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plot(runs: Sequence[Run], found: Sequence[Figures], path: Path, title: str, caption: str) -> None:
    """Draw one setting's distributions and its throughput over time, or several settings side by side.

    Args:
        runs: what was measured.
        found: its figures.
        path: an .svg or .png file.
        title: stands above.
        caption: stands below: the machine, the commit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    if len(runs) == 1:
        _distributions(figure.subplots(1, 3), runs[0])
    else:
        _course(figure.subplots(1, 4), found)
    figure.suptitle(title)
    figure.supxlabel(caption, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _distributions(axes: Any, run: Run) -> None:
    samples = samples_ms(run)
    for axis, name, colour in zip(axes, ("ttft", "itl"), COLOURS, strict=False):
        axis.hist(samples[name], bins=60, color=colour)
        _dress(axis, f"{TITLES[name]}: how often", "ms")
    speeds = timeline(run)
    axes[2].plot([second + 0.5 for second in range(len(speeds))], speeds, color=COLOURS[2])
    axes[2].set_ylim(bottom=0)
    _dress(axes[2], "output tokens/s over time", "s")


def _course(axes: Any, found: Sequence[Figures]) -> None:
    closed = found[0]["max_concurrency"] is not None
    labels = [str(each["max_concurrency"] if closed else each["request_rate"]) for each in found]
    panels = (
        ("tokens/s of all", (("output_throughput", "output"), ("total_token_throughput", "with prompts"))),
        ("tokens/s of a stream", (("mean_stream_throughput", "mean"), ("p10_stream_throughput", "p10"))),
        ("TTFT, ms", (("median_ttft_ms", "median"), ("p99_ttft_ms", "p99"))),
        (
            "TPOT and ITL, ms",
            (("median_tpot_ms", "TPOT median"), ("p99_tpot_ms", "TPOT p99"), ("p99_itl_ms", "ITL p99")),
        ),
    )
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for (key, label), colour in zip(curves, COLOURS, strict=False):
            axis.plot(range(len(found)), [_gap(each[key]) for each in found], marker="o", color=colour, label=label)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.set_xticks(range(len(found)), labels)
        axis.legend(fontsize="small", frameon=False)
        _dress(axis, title, "requests at once" if closed else "requests a second")


def _gap(value: float | None) -> float:
    return float("nan") if value is None else value


def _dress(axis: Any, title: str, label: str) -> None:
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel(label, fontsize="small")
    axis.tick_params(labelsize="small")
    axis.spines[["top", "right"]].set_visible(False)
