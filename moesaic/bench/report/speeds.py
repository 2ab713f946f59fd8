"""Sections on the speed of models: throughput, lengths of prompts, quality beside speed, and starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from moesaic.bench.report.blocks import Bar, Chart, Group, Section, Table
from moesaic.bench.report.records import Quality, Record, Start, Throughput
from moesaic.text_tables import number, percent

T = TypeVar("T")
Entry = tuple[int, T]
"""A measurement, and the number of its record."""

READING = (
    "The first bar of a pair is the speed of all sessions together, the second that of one session. A person reads "
    "about 6 to 11 tokens per second: 5 to 8 words, at 0.75 words per token."
)
SERIES = ("all sessions", "one session")
GENERATED = "generated tokens/s"


def entries(records: Sequence[Record], part: Callable[[Record], Iterable[T]]) -> list[Entry[T]]:
    """Return a part of all records, each with the number of its record, which starts with 1."""
    return [(index, found) for index, record in enumerate(records, 1) for found in part(record)]


def grouped(found: Iterable[T], key: Callable[[T], tuple[object, ...]]) -> Iterator[list[T]]:
    """Yield lists of what has the same key, in the order of first occurrence."""
    values = list(found)
    order = {value: index for index, value in reversed(list(enumerate(map(key, values))))}
    for _, group in groupby(sorted(values, key=lambda value: order[key(value)]), key):
        yield list(group)


def number_or(value: float | None, missing: str = "-") -> str:
    """Return a number as text, or ``missing`` for None."""
    return missing if value is None else number(value)


def gigabytes(size: int | None) -> str:
    """Return bytes in GB as text."""
    return "-" if size is None else f"{size / 1e9:.2f}"


def throughput(records: Sequence[Record]) -> Iterator[Section]:
    """Yield the sections on throughput in the engine and behind servers."""
    engine, server = entries(records, lambda record: record.engine), entries(records, lambda record: record.server)
    if engine:
        limits = "A percentage is the share of the machine's memory bandwidth that the step reads with."
        yield Section("Throughput in the engine", f"{READING} {limits}", list(_charts(engine)), [_engine_table(engine)])
    if server:
        text = f"{READING} A load test does not know the limits of the server's machine."
        yield Section("Throughput of a server", text, list(_charts(server)), [_server_table(server)])


def _charts(found: list[Entry[Throughput]]) -> Iterator[Chart]:
    """Yield a chart for each model; what differs between its bars is below them."""
    for same in grouped(found, lambda entry: (entry[1].model,)):
        formats, files = {each.format for _, each in same}, {record for record, _ in same}
        name = ", ".join([same[0][1].model, *(form for form in formats if form and len(formats) == 1)])
        groups = [_bars(record, each, len(formats) > 1, len(files) > 1) for record, each in same]
        yield Chart(name, GENERATED, SERIES, groups)


def _bars(record: int, each: Throughput, with_format: bool, with_record: bool) -> Group:
    bars = (Bar(0, each.total, each.share), Bar(1, each.each))
    labels = [each.load, f"{_tokens(each.prompt)} prompt"]
    labels += [each.format] * with_format + [f"record {record}"] * with_record
    return Group(tuple(labels), bars[: 1 if each.sessions == 1 else 2])


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count}-token"


def _engine_table(found: list[Entry[Throughput]]) -> Table:
    header = ["model", "format", "prompt", "batch", "tokens/s", "of bandwidth", "one session", "first token, s"]
    header += ["prompt tokens/s", "of peak", "peak memory, GB", "record"]
    rows = [
        [
            each.model,
            each.format,
            str(each.prompt),
            str(each.sessions),
            number(each.total),
            percent(each.share),
            number(each.each),
            number(each.first_token_s),
            number_or(each.prompt_tokens_s),
            percent(each.prompt_share),
            gigabytes(each.peak_bytes),
            str(record),
        ]
        for record, each in found
    ]
    return Table("Answers and prompts in the engine", header, rows)


def _server_table(found: list[Entry[Throughput]]) -> Table:
    header = ["model", "load", "prompt", "tokens/s", "one session", "first token, s (median)", "failed", "record"]
    rows = [
        [
            each.model,
            each.load,
            str(each.prompt),
            number(each.total),
            number(each.each),
            number(each.first_token_s),
            str(each.failed),
            str(record),
        ]
        for record, each in found
    ]
    return Table("Answers of a server", header, rows)


def contexts(records: Sequence[Record]) -> Iterator[Section]:
    """Yield a section that compares lengths of prompts, if a model was measured with several at the same load."""
    charts, rows = [], []
    for part in (lambda record: record.engine, lambda record: record.server):
        found = entries(records, part)
        same_model = grouped(found, lambda entry: (*_place(records, entry[0]), entry[1].model, entry[1].format))
        for same in same_model:
            loads = [load for load in grouped(same, lambda entry: (entry[1].load,)) if _lengths(load) > 1]
            if loads:
                charts.append(_length_chart(loads))
                rows += [row for load in loads for row in _length_rows(load)]
    if rows:
        header = ["model", "load", "prompt", "tokens/s", "of the shortest", "one session", "first token, s", "record"]
        text = "The longer the prompt, the more keys and values each step reads, and the later the first token comes."
        yield Section("Short and long contexts", text, charts, [Table("Speed by length of the prompt", header, rows)])


def _place(records: Sequence[Record], index: int) -> tuple[str, str]:
    """Return the machine and the versions of a record: only what has both in common is compared."""
    origin = records[index - 1].origin
    return origin["machine"], origin["versions"]


def _lengths(load: list[Entry[Throughput]]) -> int:
    return len({each.prompt for _, each in load})


def _length_chart(loads: list[list[Entry[Throughput]]]) -> Chart:
    first = loads[0][0][1]
    names = sorted({each.prompt for load in loads for _, each in load})
    groups = [
        Group((each[0][1].load,), tuple(Bar(names.index(one.prompt), one.total, one.share) for _, one in each))
        for each in (sorted(load, key=lambda entry: entry[1].prompt) for load in loads)
    ]
    return Chart(f"{first.model} by length of prompt", GENERATED, tuple(f"{_tokens(n)} prompt" for n in names), groups)


def _length_rows(load: list[Entry[Throughput]]) -> Iterator[list[str]]:
    ordered = sorted(load, key=lambda entry: entry[1].prompt)
    shortest = ordered[0][1].total
    for record, each in ordered:
        speeds = [number(each.total), percent(each.total / shortest if shortest else None), number(each.each)]
        yield [each.model, each.load, str(each.prompt), *speeds, number(each.first_token_s), str(record)]


def quality(records: Sequence[Record]) -> Iterator[Section]:
    """Yield a section on the quality of formats, beside their speed where the same model was measured in the engine."""
    found = entries(records, lambda record: record.quality)
    if not found:
        return
    speeds = [each for _, each in entries(records, lambda record: record.engine)]
    header = ["model", "format", "bits per weight", "perplexity", "KL divergence", "tokens/s", "of bandwidth", "record"]
    rows = [_quality_row(record, each, _fastest(each, speeds)) for record, each in found]
    text = "Speed is that of one session in the engine, where a record has the same model in the same format."
    tables = [Table("Quality and speed of formats", header, rows)]
    yield Section("Quality and speed of formats", text, list(_quality_charts(found, speeds)), tables)


def _fastest(quality: Quality, speeds: Sequence[Throughput]) -> Throughput | None:
    """Return the speed with the smallest load and the shortest prompt of this model in this format."""
    same = [each for each in speeds if quality.model and (each.model, each.format) == (quality.model, quality.format)]
    return min(same, key=lambda each: (each.sessions or 0, each.prompt), default=None)


def _quality_row(record: int, each: Quality, speed: Throughput | None) -> list[str]:
    divergence = "-" if each.divergence is None else f"{each.divergence[0]:.4f} ± {each.divergence[1]:.4f}"
    speeds = ["-", "-"] if speed is None else [number(speed.each), percent(speed.share)]
    perplexity = f"{each.perplexity[0]:.2f} ± {each.perplexity[1]:.2f}"
    return [each.model or "-", each.format, f"{each.bits:.2f}", perplexity, divergence, *speeds, str(record)]


def _quality_charts(found: list[Entry[Quality]], speeds: Sequence[Throughput]) -> Iterator[Chart]:
    for same in grouped(found, lambda entry: (entry[0], entry[1].model)):
        record, first = same[0]
        name = f"{first.model or 'model'}, record {record}"
        pairs = [(each, _fastest(each, speeds)) for _, each in same]
        groups = [_speed_and_quality(each, speed) for each, speed in pairs if speed is not None]
        if groups:
            yield Chart(f"{name}: speed, with the perplexity below", GENERATED, ("one session",), groups)
        losses = [
            Group((each.format, f"{each.bits:.2f} bits"), (Bar(0, each.divergence[0]),))
            for _, each in same
            if each.divergence is not None
        ]
        if losses:
            yield Chart(f"{name}: KL divergence, less is better", "nats per token", ("",), losses, across=True)


def _speed_and_quality(each: Quality, speed: Throughput) -> Group:
    return Group((each.format, f"perplexity {each.perplexity[0]:.2f}"), (Bar(0, speed.each, speed.share),))


def starts(records: Sequence[Record]) -> Iterator[Section]:
    """Yield a section on the time from the start of a process to its first token."""
    found = entries(records, lambda record: record.starts)
    if not found:
        return
    text = (
        "From the start of a process to the first token, the median of several starts. Cold means that the model's "
        "files were dropped from the page cache. The percentage is the share of the limit: the time that reading the "
        "same bytes takes at the measured speed."
    )
    tables = [_start_table(list(same)) for same in grouped(found, lambda entry: tuple(entry[1].phases))]
    yield Section("Start", text, list(_start_charts(found)), tables)


def _start_charts(found: list[Entry[Start]]) -> Iterator[Chart]:
    for same in grouped(found, lambda entry: (entry[0], entry[1].model)):
        groups = [Group((each.mode, each.cache), (Bar(0, each.total_s, each.share),)) for _, each in same]
        yield Chart(f"{same[0][1].model}, record {same[0][0]}: first token after", "seconds", ("",), groups)


def _start_table(found: list[Entry[Start]]) -> Table:
    phases = list(found[0][1].phases)
    header = ["model", "mode", "page cache", *(f"{name}, s" for name in phases), "in all, s", "of limit"]
    header += ["resident, GB", "peak, GB", "record"]
    rows = [
        [
            each.model,
            each.mode,
            each.cache,
            *(f"{each.phases[name]:.2f}" for name in phases),
            f"{each.total_s:.2f}",
            percent(each.share),
            gigabytes(each.resident_bytes),
            gigabytes(each.peak_bytes),
            str(record),
        ]
        for record, each in found
    ]
    return Table("Phases of a start", header, rows)
