"""Compare Moesaic with other engines on one model: speed, memory, and the effect of a busy neighbour process.

A row is an engine with weights in one format. A cell is one measurement, such as a prompt of 512 tokens. In each round,
every row runs all cells, in a process of its own, one process at a time. Rounds are interleaved, so that a slow phase
of the machine affects all rows. This module knows the measurements and the limits of the machine. It does not know any
engine; those are in ``peers``.
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
from moesaic.bench.peer_choice import PEERS
from moesaic.bench.peers import _model
from moesaic.bench.peers._model import Shape
from moesaic.bench.peers._process import PeerFailed, Process, neighbour
from moesaic.errors import InvalidParameter, InvalidRequest
from moesaic.hardware.limits import Limits

WARM_UP_STEPS = 2  # the same as in peers/_child.py
COMPARED_TOKENS = 20
"""Number of most likely tokens that are compared between two engines."""
REFERENCES = ("transformers", "vllm", "moesaic")
"""Engines whose most likely tokens can be the reference for others. The first one that was measured in bfloat16 is
taken."""

Report = Callable[[str], object]


@dataclass(frozen=True)
class Cell:
    """One measurement: a prompt of ``tokens`` tokens, or a step of ``batch`` sequences of ``tokens`` tokens."""

    tokens: int
    batch: int = 0
    """Number of sequences in a decoding step; 0 for a prompt."""
    busy: bool = False
    """Whether another process keeps a core busy during the measurement."""

    @property
    def name(self) -> str:
        name = f"decode {self.batch} after {self.tokens}" if self.batch else f"prefill {self.tokens}"
        return f"{name}, busy" if self.busy else name

    @property
    def counted(self) -> int:
        """Number of tokens that one execution of the measurement computes."""
        return self.batch or self.tokens


@dataclass(frozen=True)
class Plan:
    """The measurements of a comparison, and how often they are repeated.

    Raises:
        InvalidParameter: ``rounds`` or ``threads`` is less than 1.
    """

    prompts: tuple[int, ...] = (512, 2048)
    """Lengths of prompts in tokens."""
    contexts: tuple[int, ...] = (16, 2048)
    batches: tuple[int, ...] = (1, 4, 8, 16)
    steps: int = 24
    """Number of decoding steps over which the time of a step is averaged."""
    rounds: int = 3
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    instruction_set: str | None = None
    """What Moesaic's kernels use; None: all that the processor has. Other engines do not see it."""
    busy: bool = False
    """Whether some measurements are repeated beside a busy neighbour process: the shortest prompt, and the smallest and
    the largest batch after the shortest context."""

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least 1")

    @property
    def longest(self) -> int:
        """Maximum number of tokens that a sequence reaches in these measurements."""
        return max(*self.prompts, *self.contexts) + WARM_UP_STEPS + self.steps + 1

    def cells(self) -> list[Cell]:
        """Return all measurements, in the order of the report's table."""
        prompts = [Cell(tokens) for tokens in self.prompts]
        decodes = [Cell(context, batch) for context in self.contexts for batch in self.batches]
        busy = [Cell(cell.tokens, cell.batch, busy=True) for cell in (*prompts, *decodes) if self.repeats_busy(cell)]
        return [*prompts, *decodes, *busy]

    def repeats_busy(self, cell: Cell) -> bool:
        """Return whether the measurement ``cell`` is repeated beside a busy neighbour process."""
        if cell.batch:
            selected = cell.tokens == min(self.contexts) and cell.batch in (min(self.batches), max(self.batches))
        else:
            selected = cell.tokens == min(self.prompts)
        return self.busy and selected


@dataclass
class Row:
    """One line of the report: an engine with weights in one format, and its measurements."""

    peer: str
    format: str
    label: str
    about: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    bits: float = 0.0
    """Average number of bits per weight, over the weights that steps read."""
    load_seconds: float = 0.0
    peak_bytes: int | None = None
    """Peak memory of the process, including the resident part of mapped files."""
    likeliest: list[int] = field(default_factory=list)
    """Ids of the engine's most likely next tokens after a prompt that is the same for all engines."""
    agrees: int | None = None
    """Number of ids in ``likeliest`` that the reference engine has there too; None if there is no reference."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Tokens per second in each round, by the name of the measurement (``Cell.name``)."""
    limits: dict[str, float] = field(default_factory=dict)
    """Tokens per second that memory bandwidth and multiplication would allow, by the name of the measurement."""

    @property
    def name(self) -> str:
        return f"{self.label}, {self.format}"

    def speed(self, cell: Cell) -> float:
        """Return the median speed of the measurement ``cell`` over all rounds, in tokens per second."""
        return statistics.median(self.samples[cell.name])

    def spread(self, cell: Cell) -> float:
        """Return the difference between the fastest and the slowest round of ``cell``, relative to the median."""
        samples = self.samples[cell.name]
        return (max(samples) - min(samples)) / self.speed(cell)


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison of engines."""

    shape: Shape
    plan: Plan
    limits: Limits | None
    rows: list[Row]
    left_out: dict[str, str]
    """Engines that were not measured, by name, each with the reason: for example the command that installs it."""
    failed: dict[str, str]
    """Rows that could not be measured, by name, each with the reason."""

    def figures(self) -> dict[str, Any]:
        """Return all results as a dictionary that can be written as JSON."""
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


def compare(
    pairs: Sequence[tuple[str, str]],
    folder: Path,
    *,
    shape: Shape | None = None,
    file: Path | None = None,
    plan: Plan | None = None,
    pythons: Mapping[str, Path] | None = None,
    limits: Callable[[], Limits] | None = None,
    report: Report = str,
) -> Comparison:
    """Measure all ``pairs`` of an engine and a format, and return the results; after Ctrl-C, the results so far.

    Args:
        pairs: result of ``peer_choice.choose``.
        folder: folder for the model's files in all formats; existing files are used again.
        shape: sizes of the model; by default Mixtral 8x7B's with two layers, or those of ``file``.
        file: a GGUF file that all engines load, instead of random weights; the pairs come from
            ``peer_choice.choose_for_file``.
        plan: the measurements.
        pythons: by engine, the Python interpreter in which it is installed; by default the current one.
        limits: function that measures the limits of the machine; called only if there is something to measure. None:
            the results have no limits.
        report: called with a line of progress from time to time.

    Raises:
        InvalidRequest: nothing could be measured; the message has the reasons.
    """
    shape, plan = shape or (_model.shape_of(file) if file else Shape()), plan or Plan()
    session = _Session(folder / shape.name, shape, plan, pythons or {}, report)
    rows = session.installed(pairs)
    machine = limits() if rows and limits is not None else None
    if rows:
        if file is not None:
            files = {row.name: str(file.absolute()) for row in rows}
        else:
            report("creating the model's files")
            files = session.files(rows, _model.write(shape, session.folder))
    try:
        for turn in range(plan.rounds):
            for row in rows[:: 1 if turn % 2 == 0 else -1]:  # alternating order, so that a drift affects all rows alike
                if row.name not in session.failed:
                    report(f"round {turn + 1} of {plan.rounds}: {row.name}")
                    session.round(row, files[row.name])
    except KeyboardInterrupt:
        report("stopped: the results so far are kept")
        for row in rows:
            if any(cell.name not in row.samples for cell in plan.cells()):
                session.failed.setdefault(row.name, "stopped before it was measured")
    rows = [row for row in rows if row.name not in session.failed]
    if not rows:
        reasons = [f"{name}: {reason}" for name, reason in (session.left_out | session.failed).items()]
        raise InvalidRequest("nothing was measured; " + "; ".join(reasons))
    for row in rows:
        _finish(row, rows, shape, plan, machine)
    return Comparison(shape, plan, machine, rows, session.left_out, session.failed)


class _Session:
    """State of a running comparison: its settings, and the engines and rows that were not measured."""

    def __init__(self, folder: Path, shape: Shape, plan: Plan, pythons: Mapping[str, Path], report: Report) -> None:
        self.folder, self.shape, self.plan, self.pythons, self.report = folder, shape, plan, pythons, report
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def process(self, name: str, weight_format: str = "hello") -> Process:
        peer = self.module(name)
        python = self.pythons.get(name, Path(sys.executable))
        log = self.folder / "logs" / f"{name}-{weight_format}.log"
        return Process(peer, python, self.plan.threads, log, self.plan.instruction_set)

    def module(self, name: str) -> ModuleType:
        return registry.load(PEERS, name)

    def installed(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Return a row for each pair (engine, format) with an installed engine; add other engines to ``left_out``."""
        rows = []
        versions: dict[str, dict[str, str]] = {}
        for name in dict.fromkeys(name for name, _ in pairs):
            peer = self.module(name)
            try:
                with self.process(name) as process:
                    reply = process.ask("hello")
            except PeerFailed as error:
                self.left_out[name] = str(error)
            else:
                versions[name] = reply["versions"]
                if reply["missing"]:
                    missing = ", ".join(reply["missing"])
                    self.left_out[name] = f"not installed ({missing} cannot be imported): {peer.INSTALL}"
            if reason := self.left_out.get(name):
                self.report(f"{name} is left out: {reason}")
        for name, weight_format in pairs:
            if name not in self.left_out:
                peer = self.module(name)
                rows.append(Row(name, weight_format, peer.LABEL, versions=versions[name]))
        return rows

    def files(self, rows: Sequence[Row], source: Path) -> dict[str, str]:
        """Return, by name of the row, the model file or folder that the engine of each row loads.

        Files that do not exist are created from the Hugging Face checkpoint ``source``. A row whose engine fails is
        added to ``failed``.
        """
        paths = {}
        for row in rows:
            try:
                with self.process(row.peer, row.format) as process:
                    paths[row.name] = process.ask(
                        "make", source=str(source), folder=str(self.folder), weight_format=row.format
                    )
            except PeerFailed as error:
                self.fail(row, error)
        return paths

    def round(self, row: Row, path: str) -> None:
        """Run all measurements of a row once; ``path`` is the model that its engine loads."""
        try:
            with self.process(row.peer, row.format) as process:
                for cell, seconds in self.cells(process, row, path):
                    row.samples.setdefault(cell.name, []).append(cell.counted / seconds)
        except PeerFailed as error:
            self.fail(row, error)

    def cells(self, process: Process, row: Row, path: str) -> Iterator[tuple[Cell, float]]:
        """Load the model, and yield each measurement with its duration in seconds.

        At the end, record the peak memory of the process in ``row``.
        """
        plan, sequences = self.plan, max(self.plan.batches)
        loaded = process.ask(
            "load",
            vocab=self.shape.vocab,
            path=path,
            weight_format=row.format,
            threads=plan.threads,
            context=plan.longest,
            sequences=sequences,
        )
        row.about, row.load_seconds = loaded["about"], loaded["seconds"]
        row.about |= {"expert_bytes": loaded["expert_bytes"], "other_bytes": loaded["other_bytes"]}
        # This is also the warm-up: memory is allocated, code compiled and weights read for the first time.
        row.likeliest = process.ask("likeliest", tokens=min(plan.prompts), count=COMPARED_TOKENS)
        for tokens in plan.prompts:
            yield from self.measure(Cell(tokens), process, "prefill", tokens=tokens)
        for context in plan.contexts:
            process.ask("fill", sequences=sequences, context=context)
            for batch in plan.batches:
                yield from self.measure(Cell(context, batch), process, "decode", batch=batch, steps=plan.steps)
        row.peak_bytes = max(process.ask("peak") or 0, row.peak_bytes or 0) or None

    def measure(self, cell: Cell, process: Process, command: str, **arguments: int) -> Iterator[tuple[Cell, float]]:
        """Yield a measurement with its duration in seconds.

        If the plan repeats it beside a busy neighbour process, then yield the repetition. ``command`` and ``arguments``
        are the request to the engine's process.
        """
        for busy in (False, True) if self.plan.repeats_busy(cell) else (False,):
            with neighbour() if busy else nullcontext():
                yield Cell(cell.tokens, cell.batch, busy), process.ask(command, **arguments)

    def fail(self, row: Row, error: PeerFailed) -> None:
        self.failed[row.name] = str(error)
        self.report(f"{row.name} failed: {error}")


def _finish(row: Row, rows: Sequence[Row], shape: Shape, plan: Plan, limits: Limits | None) -> None:
    """Set the fields ``bits``, ``agrees`` and ``limits`` of ``row``, which follow from its measurements."""
    expert_bytes, other_bytes = row.about["expert_bytes"], row.about["other_bytes"]
    row.bits = 8 * (expert_bytes + other_bytes) / (shape.expert_parameters + shape.other_parameters)
    references = {other.peer: other for other in rows if other.format == "bfloat16"}
    for name in REFERENCES:
        if name in references:
            row.agrees = len(set(row.likeliest) & set(references[name].likeliest))
            break
    if limits is not None:
        row.limits = {
            cell.name: limit(cell, shape, limits, row.format, expert_bytes, other_bytes) for cell in plan.cells()
        }


def limit(cell: Cell, shape: Shape, limits: Limits, weight_format: str, expert_bytes: int, other_bytes: int) -> float:
    """Return the tokens per second that a measurement could reach on this machine at most.

    This holds if only the slower of memory bandwidth and multiplication took time. A step reads every weight that it
    needs, and the cache, once, at the measured bandwidth. Multiplications are those of bytes, or of bfloat16 for
    bfloat16 weights. The number of experts that a step reads is that of random choices.

    Args:
        cell: the measurement.
        shape: sizes of the model.
        limits: limits of the machine.
        weight_format: format of the weights.
        expert_bytes: bytes of all experts.
        other_bytes: bytes of all other weights that every step reads.
    """
    tokens = cell.batch or cell.tokens
    cached = cell.batch * cell.tokens * shape.kv_bytes
    read = other_bytes + expert_bytes * shape.experts_read(tokens) / shape.experts + cached
    context = cell.tokens if cell.batch else cell.tokens / 2
    operations = shape.operations(tokens, context, cell.batch or 1)
    return tokens / max(read / limits.read_gb_s / 1e9, operations / limits.gop_s(weight_format) / 1e9)
