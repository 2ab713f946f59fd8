"""``moesaic bench``, from its flags to what it prints and writes.

Knows which measurement needs what. Does not know how anything is measured or drawn. Tables go to
standard output; while engines are compared, progress goes to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from moesaic import formats
from moesaic.bench import chart, compare, limits, report
from moesaic.bench import kernels as ops
from moesaic.errors import InvalidRequest
from moesaic.ops import native


def kernels(format: str, threads: int | None, seconds: float, out: Path | None) -> int:
    """Measure the CPU kernels with weights in each of the formats that ``format`` names, with commas.

    Raises:
        NotFound: there is no such format.
        InvalidRequest: the kernels do not read it, or are missing.
    """
    names = format.split(",")
    for name in names:
        formats.load(name)
        if why := native.why_not("linear", "cpu", name):
            raise InvalidRequest(f"there is nothing to measure: {why}")
    if threads is not None:
        native.set_threads(threads)
    found = limits.measure(report=lambda line: print(line, flush=True))
    rows = []
    for row in ops.measure(found, names, seconds=seconds):
        rows.append(row)
        print(ops.line(row), flush=True)
    if out:
        report.write(out, report.record(f"moesaic bench kernels --format {format}", ops.figures(found, rows)))
    return 0


def peers(
    only: str | None,
    pythons: Sequence[str],
    work: Path,
    rounds: int,
    threads: int | None,
    *,
    busy: bool,
    out: Path | None,
    plot: Path | None,
) -> int:
    """Compare engines; see ``compare.compare``. Returns 2 where one of them failed.

    Raises:
        NotFound, InvalidParameter, InvalidRequest: what was asked cannot be measured or drawn.
    """
    pairs, chosen = compare.choose(only), compare.interpreters(pythons)
    plan = compare.Plan(rounds=rounds, busy=busy)
    plan = plan if threads is None else replace(plan, threads=threads)
    if plot:
        chart.check(plot)
    flags = [f"--only {only}"] if only else []
    flags += [f"--rounds {rounds}", *([f"--threads {threads}"] if threads else []), *(["--busy"] if busy else [])]
    most = partial(limits.measure, report=_say) if native.why_not("linear", "cpu", "int8") is None else None
    found = compare.compare(pairs, work, plan=plan, pythons=chosen, limits=most, report=_say)
    print("\n".join(chart.tables(found)))
    record = report.record(" ".join(["moesaic bench peers", *flags]), found.figures())
    if out:
        report.write(out, record)
    if plot:
        chart.plot(found, plot, f"{record['machine']['cpu']}, {record['date']}, commit {record['commit']}")
    return 2 if found.failed else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
