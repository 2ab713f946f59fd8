"""Our engine and others on one model, side by side: speed, memory, and what a busy neighbour costs.

Every pair of an engine and a weight format is a row; every row runs all cells in each round, in a
process of its own, one process at a time, and rounds are interleaved, so that a machine that is slow
for a while is slow for all. Knows what is measured and what the machine would allow. Does not know
any engine: see ``peers``.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from moesaic import registry
from moesaic.bench.limits import Limits
from moesaic.bench.peers import _model
from moesaic.bench.peers._model import Shape
from moesaic.bench.peers._process import PeerFailed, Process, neighbour
from moesaic.errors import InvalidParameter, InvalidRequest

PEERS = "bench/peers"
WARM_UP = 2  # as in peers/_child.py
COMPARED = 20
"""Of how many likeliest tokens it is asked whether two engines name the same."""
REFERENCE = ("transformers", "vllm", "moesaic")
"""Whose likeliest tokens the others' are compared with: the first of these that is there in bfloat16."""

Report = Callable[[str], object]


@dataclass(frozen=True)
class Cell:
    """One thing that is timed: a prompt of ``tokens``, or a step of ``batch`` sequences after ``tokens`` each."""

    tokens: int
    batch: int = 0
    """0: a prompt."""
    busy: bool = False
    """Whether another process kept a core busy."""

    @property
    def name(self) -> str:
        what = f"decode {self.batch} after {self.tokens}" if self.batch else f"prefill {self.tokens}"
        return f"{what}, busy" if self.busy else what

    @property
    def counted(self) -> int:
        """Tokens that come of it."""
        return self.batch or self.tokens


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Raises:
        InvalidParameter: there are no rounds, or no threads.
    """

    prompts: tuple[int, ...] = (512, 2048)
    contexts: tuple[int, ...] = (16, 2048)
    batches: tuple[int, ...] = (1, 4, 8, 16)
    steps: int = 24
    """Over which a decode is averaged."""
    rounds: int = 3
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    busy: bool = False
    """Whether the shortest prompt, and the smallest and largest batch after the shortest context, are measured
    again beside a busy neighbour."""

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least 1")

    @property
    def longest(self) -> int:
        """Places that one sequence needs."""
        return max(*self.prompts, *self.contexts) + WARM_UP + self.steps + 1

    def cells(self) -> list[Cell]:
        """Return the cells in the order of the table."""
        prompts = [Cell(tokens) for tokens in self.prompts]
        decodes = [Cell(context, batch) for context in self.contexts for batch in self.batches]
        busy = [Cell(cell.tokens, cell.batch, busy=True) for cell in (*prompts, *decodes) if self.beside(cell)]
        return [*prompts, *decodes, *busy]

    def beside(self, cell: Cell) -> bool:
        """Return whether ``cell`` is measured with a busy neighbour too."""
        if cell.batch:
            chosen = cell.tokens == min(self.contexts) and cell.batch in (min(self.batches), max(self.batches))
        else:
            chosen = cell.tokens == min(self.prompts)
        return self.busy and chosen


@dataclass
class Row:
    """One engine with weights in one format, and what was measured of it."""

    peer: str
    format: str
    label: str
    about: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    bits: float = 0.0
    """Per weight of those that steps read."""
    load_seconds: float = 0.0
    peak_bytes: int | None = None
    """The most memory that its process had at once, mapped files counted as far as they were in memory."""
    likeliest: list[int] = field(default_factory=list)
    agrees: int | None = None
    """How many of its 20 likeliest next tokens are among the reference's."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Tokens per second in each round, by cell."""
    limits: dict[str, float] = field(default_factory=dict)
    """Tokens per second that memory and multipliers would allow, by cell."""

    @property
    def name(self) -> str:
        return f"{self.label}, {self.format}"

    def speed(self, cell: Cell) -> float:
        """Return the median of the rounds."""
        return statistics.median(self.samples[cell.name])

    def spread(self, cell: Cell) -> float:
        """Return how far apart the rounds are, relative to the median."""
        found = self.samples[cell.name]
        return (max(found) - min(found)) / self.speed(cell)


@dataclass(frozen=True)
class Comparison:
    """Everything that was found."""

    shape: Shape
    plan: Plan
    limits: Limits | None
    rows: list[Row]
    left_out: dict[str, str]
    """Peers that are not installed, and how to install them."""
    failed: dict[str, str]
    """Rows that could not be measured, and why."""

    def figures(self) -> dict[str, Any]:
        """Return everything for docs/results."""
        cells = {cell.name: cell for cell in self.plan.cells()}
        rows = []
        for row in self.rows:
            medians = {name: row.speed(cell) for name, cell in cells.items()}
            rows.append(asdict(row) | {"medians": medians})
        return {
            "shape": asdict(self.shape),
            "plan": asdict(self.plan),
            "limits": self.limits and asdict(self.limits),
            "rows": rows,
            "left_out": self.left_out,
            "failed": self.failed,
        }


def choose(only: str | None) -> list[tuple[str, str]]:
    """Return the (peer, format) pairs that ``only`` names, "peer" or "peer:format" with commas; None: all.

    Raises:
        NotFound: there is no such peer.
        InvalidParameter: a format is missing behind the colon.
    """
    pairs = []
    for part in only.split(",") if only is not None else registry.names(PEERS):
        name, colon, format = part.strip().partition(":")
        peer = registry.load(PEERS, name)
        if colon and not format:
            raise InvalidParameter("only", f"{part!r} names no format; {name} has {', '.join(peer.FORMATS)}")
        pairs += [(name, each) for each in ([format] if format else peer.FORMATS)]
    return pairs


def interpreters(given: Sequence[str]) -> dict[str, Path]:
    """Return the interpreter of each peer that ``given``, "peer=path" each, names.

    Raises:
        NotFound: there is no such peer.
        InvalidParameter: a part has no path, or nothing is there.
    """
    found = {}
    for part in given:
        name, _, path = part.partition("=")
        registry.load(PEERS, name)
        if not Path(path).is_file():
            raise InvalidParameter("python", f"{part!r} names no interpreter: give PEER=FILE")
        found[name] = Path(path).absolute()
    return found


def compare(
    pairs: Sequence[tuple[str, str]],
    folder: Path,
    *,
    shape: Shape | None = None,
    plan: Plan | None = None,
    pythons: Mapping[str, Path] | None = None,
    limits: Callable[[], Limits] | None = None,
    report: Report = str,
) -> Comparison:
    """Measure all ``pairs`` of a peer and a format; Ctrl-C ends it with what there is.

    Args:
        pairs: see ``choose``.
        folder: where the model is made, in every form; what is there is used again.
        shape: of the model; by default Mixtral 8x7B's with two layers.
        plan: what is measured.
        pythons: the interpreter that has a peer, where it is not this one.
        limits: finds what the machine can do, for the limit of each figure; called when there is something to measure.
        report: gets a line now and then.

    Raises:
        InvalidRequest: nothing could be measured; the message says why.
    """
    shape, plan = shape or Shape(), plan or Plan()
    bench = _Bench(folder / shape.name, shape, plan, pythons or {}, report)
    rows = bench.present(pairs)
    most = limits() if rows and limits is not None else None
    if rows:
        report("making the model's files")
        files = bench.files(rows, _model.write(shape, bench.folder))
    try:
        for turn in range(plan.rounds):
            for row in rows[:: 1 if turn % 2 == 0 else -1]:  # so that a drift favours nobody
                if row.name not in bench.failed:
                    report(f"round {turn + 1} of {plan.rounds}: {row.name}")
                    bench.round(row, files[row.name])
    except KeyboardInterrupt:
        report("stopped: what was measured until now is kept")
        for row in rows:
            if any(cell.name not in row.samples for cell in plan.cells()):
                bench.failed.setdefault(row.name, "stopped before it was measured")
    rows = [row for row in rows if row.name not in bench.failed]
    if not rows:
        reasons = [f"{name}: {why}" for name, why in (bench.left_out | bench.failed).items()]
        raise InvalidRequest("nothing was measured; " + "; ".join(reasons))
    for row in rows:
        _finish(row, rows, shape, plan, most)
    return Comparison(shape, plan, most, rows, bench.left_out, bench.failed)


class _Bench:
    """One comparison while it runs."""

    def __init__(self, folder: Path, shape: Shape, plan: Plan, pythons: Mapping[str, Path], report: Report) -> None:
        self.folder, self.shape, self.plan, self.pythons, self.report = folder, shape, plan, pythons, report
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def process(self, name: str, format: str = "hello") -> Process:
        peer = self.module(name)
        python = self.pythons.get(name, Path(sys.executable))
        return Process(peer, python, self.plan.threads, self.folder / "logs" / f"{name}-{format}.log")

    def module(self, name: str) -> ModuleType:
        return registry.load(PEERS, name)

    def present(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Return a row for each pair whose peer is installed; the others are noted as left out."""
        rows = []
        versions: dict[str, dict[str, str]] = {}
        for name in dict.fromkeys(name for name, _ in pairs):
            peer = self.module(name)
            try:
                with self.process(name) as process:
                    found = process.ask("hello")
            except PeerFailed as error:
                self.left_out[name] = str(error)
            else:
                versions[name] = found["versions"]
                if found["missing"]:
                    missing = ", ".join(found["missing"])
                    self.left_out[name] = f"not installed ({missing} cannot be imported): {peer.INSTALL}"
            if why := self.left_out.get(name):
                self.report(f"{name} is left out: {why}")
        for name, format in pairs:
            if name not in self.left_out:
                peer = self.module(name)
                rows.append(Row(name, format, peer.LABEL, versions=versions[name]))
        return rows

    def files(self, rows: Sequence[Row], source: Path) -> dict[str, str]:
        """Return what each row loads, made where it is not there yet."""
        found = {}
        for row in rows:
            try:
                with self.process(row.peer, row.format) as process:
                    found[row.name] = process.ask(
                        "make", source=str(source), folder=str(self.folder), format=row.format
                    )
            except PeerFailed as error:
                self.fail(row, error)
        return found

    def round(self, row: Row, path: str) -> None:
        """Let ``row`` run all cells once."""
        try:
            with self.process(row.peer, row.format) as process:
                for cell, seconds in self.measured(process, row, path):
                    row.samples.setdefault(cell.name, []).append(cell.counted / seconds)
        except PeerFailed as error:
            self.fail(row, error)

    def measured(self, process: Process, row: Row, path: str) -> Iterator[tuple[Cell, float]]:
        """Load the model, yield each cell with its seconds, then see how much memory it took."""
        plan, most = self.plan, max(self.plan.batches)
        loaded = process.ask(
            "load",
            vocab=self.shape.vocab,
            path=path,
            format=row.format,
            threads=plan.threads,
            context=plan.longest,
            sequences=most,
        )
        row.about, row.load_seconds = loaded["about"], loaded["seconds"]
        row.about |= {"expert_bytes": loaded["expert_bytes"], "other_bytes": loaded["other_bytes"]}
        # Also the warm-up: what is only read, compiled or allocated once is so here.
        row.likeliest = process.ask("likeliest", tokens=min(plan.prompts), count=COMPARED)
        for tokens in plan.prompts:
            yield from self.twice(Cell(tokens), process, "prefill", tokens=tokens)
        for context in plan.contexts:
            process.ask("fill", sequences=most, context=context)
            for batch in plan.batches:
                yield from self.twice(Cell(context, batch), process, "decode", batch=batch, steps=plan.steps)
        row.peak_bytes = max(process.ask("peak") or 0, row.peak_bytes or 0) or None

    def twice(self, cell: Cell, process: Process, do: str, **arguments: int) -> Iterator[tuple[Cell, float]]:
        """Yield the seconds of ``cell``, and those beside a busy neighbour right after where they are wanted."""
        for busy in (False, True) if self.plan.beside(cell) else (False,):
            with neighbour() if busy else nullcontext():
                yield Cell(cell.tokens, cell.batch, busy), process.ask(do, **arguments)

    def fail(self, row: Row, error: PeerFailed) -> None:
        self.failed[row.name] = str(error)
        self.report(f"{row.name} failed: {error}")


def _finish(row: Row, rows: Sequence[Row], shape: Shape, plan: Plan, limits: Limits | None) -> None:
    """Fill in what follows from what was measured."""
    experts, rest = row.about["expert_bytes"], row.about["other_bytes"]
    row.bits = 8 * (experts + rest) / (shape.expert_parameters + shape.other_parameters)
    plain = {other.peer: other for other in rows if other.format == "bfloat16"}
    for name in REFERENCE:
        if name in plain:
            row.agrees = len(set(row.likeliest) & set(plain[name].likeliest))
            break
    if limits is not None:
        row.limits = {cell.name: limit(cell, shape, limits, row.format, experts, rest) for cell in plan.cells()}


def limit(cell: Cell, shape: Shape, limits: Limits, format: str, experts: int, rest: int) -> float:
    """Return the most tokens per second that ``cell`` could have, were the slower of memory and multipliers all.

    Every weight that is needed is read once in a step, the cache once, at the best speed measured; every
    multiplication is one of bytes, or of bfloat16 where weights are. What a step reads of the experts is
    what tokens that choose at random read.

    Args:
        cell: what is computed.
        shape: of the model.
        limits: of the machine.
        format: of the weights.
        experts: bytes of all experts.
        rest: bytes of everything else that every step reads.
    """
    tokens = cell.batch or cell.tokens
    cached = cell.batch * cell.tokens * shape.kv_bytes
    read = rest + experts * shape.experts_read(tokens) / shape.experts + cached
    seen = cell.tokens if cell.batch else cell.tokens / 2
    operations = shape.operations(tokens, seen, cell.batch or 1)
    return tokens / max(read / limits.read_gb_s / 1e9, operations / limits.gop_s(format) / 1e9)
