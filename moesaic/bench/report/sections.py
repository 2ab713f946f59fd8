"""A page from records: its sections on engines, kernels and tasks, those of ``speeds``, and the origin of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moesaic.bench import evaluation
from moesaic.bench.report import speeds
from moesaic.bench.report.blocks import Bar, Chart, Group, Page, Section, Table
from moesaic.bench.report.records import Comparison, Kernel, Record
from moesaic.bench.report.speeds import Entry, entries, grouped
from moesaic.text_tables import number, percent

TITLE = "Benchmark report"


def page(records: Sequence[Record]) -> Page:
    """Return the report of records."""
    count = "one result file" if len(records) == 1 else f"{len(records)} result files"
    text = f"From {count}. The last table has the machine, the versions and the command of each record."
    sections = [
        *speeds.throughput(records),
        *speeds.contexts(records),
        *speeds.quality(records),
        *speeds.starts(records),
        *_peers(records),
        *_kernels(records),
        *_tasks(records),
        _origins(records),
    ]
    return Page(TITLE, text, sections)


def _peers(records: Sequence[Record]) -> Iterator[Section]:
    for record, found in entries(records, lambda record: record.comparisons):
        text = (
            f"{found.model}. Speeds are medians, in tokens per second. A percentage is the share of what memory "
            "bandwidth and multiplication allow. Prompts are read alone; answers have a batch of sequences in a step."
        )
        yield Section(f"Engines side by side, record {record}", text, list(_peer_charts(found)), [_peer_table(found)])


def _peer_charts(found: Comparison) -> Iterator[Chart]:
    for tokens in found.contexts:
        series = tuple(f"batch {batch}" for batch in found.batches)
        yield _peer_chart(found, f"Answers after {tokens} tokens", series, [(tokens, n) for n in found.batches])
    series = tuple(f"{tokens} tokens" for tokens in found.prompts)
    yield _peer_chart(found, "Prompts", series, [(tokens, 0) for tokens in found.prompts])


def _peer_chart(found: Comparison, title: str, series: tuple[str, ...], cells: list[tuple[int, int]]) -> Chart:
    groups = [
        Group((peer.name,), tuple(Bar(index, *peer.cells[cell]) for index, cell in enumerate(cells)))
        for peer in found.peers
    ]
    return Chart(title, "tokens/s", series, groups, across=True)


def _peer_table(found: Comparison) -> Table:
    cells = [(tokens, 0) for tokens in found.prompts]
    cells += [(tokens, batch) for tokens in found.contexts for batch in found.batches]
    names = [f"batch {batch} after {tokens}" if batch else f"prompt {tokens}" for tokens, batch in cells]
    rows = []
    for peer in found.peers:
        memory = "-" if peer.peak_bytes is None else f"{peer.peak_bytes / 2**30:.2f}"
        rows.append([peer.name, f"{peer.bits:.2f}", memory, *(_speed(*peer.cells[cell]) for cell in cells)])
    return Table("Tokens per second", ["engine, format", "bits per weight", "peak memory, GiB", *names], rows)


def _speed(value: float, share: float | None) -> str:
    return number(value) if share is None else f"{number(value)} ({percent(share)})"


def _kernels(records: Sequence[Record]) -> Iterator[Section]:
    found = [entry for entry in entries(records, lambda record: record.kernels) if entry[1].tokens]
    if not found:
        return
    text = (
        "How much of the machine's limits an op reaches: of its memory bandwidth or of its arithmetic peak, whichever "
        "is more. Few tokens are bound by memory, many by arithmetic."
    )
    header = ["op", "format", "tokens", "context", "ms", "of bandwidth", "of peak", "record"]
    rows = [_kernel_row(record, each) for record, each in found]
    yield Section("Kernels", text, list(_kernel_charts(found)), [Table("Kernels, op by op", header, rows)])


def _kernel_charts(found: list[Entry[Kernel]]) -> Iterator[Chart]:
    for same in grouped(found, lambda entry: (entry[0], entry[1].op)):
        groups = [
            Group(_kernel_labels(each), (Bar(0, 100 * max(each.read_share, each.peak_share)),)) for _, each in same
        ]
        yield Chart(f"{same[0][1].op}, record {same[0][0]}", "% of the limit", ("",), groups, across=True)


def _kernel_labels(each: Kernel) -> tuple[str, ...]:
    context = (f"context {each.context}",) if each.context else ()
    return (each.format, f"{each.tokens} token{'s' if each.tokens > 1 else ''}", *context)


def _kernel_row(record: int, each: Kernel) -> list[str]:
    shares = [percent(each.read_share), percent(each.peak_share)]
    context = str(each.context or "-")
    return [each.op, each.format, str(each.tokens), context, f"{each.milliseconds:.3f}", *shares, str(record)]


def _tasks(records: Sequence[Record]) -> Iterator[Section]:
    tables = []
    for index, record in enumerate(records, 1):
        if record.tasks:
            header, *rows = evaluation.grid(record.tasks)
            tables.append(Table(f"Metrics by format, record {index}", header, rows))
    if tables:
        yield Section("Tasks of lm-eval", "Each value has its standard error.", tables=tables)


def _origins(records: Sequence[Record]) -> Section:
    header = ["record", "file", "result of", "date", "commit", "command", "machine", "versions"]
    names = ("date", "commit", "command", "machine", "versions")
    rows = [
        [str(index), record.file, record.kind, *(record.origin[name] for name in names)]
        for index, record in enumerate(records, 1)
    ]
    return Section("Records", "", tables=[Table("Origin of the figures", header, rows, texts=True)])
