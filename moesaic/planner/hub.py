"""Chooses what to download of a repository on the hub for a machine, from the headers of its files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moesaic import hub_access, outline, plan
from moesaic.errors import DownloadError, NotEnoughMemory, NotFound
from moesaic.hardware import Machine
from moesaic.hub_files import HubName, Selection, choose_files, gguf_choices, select
from moesaic.load_options import LoadOptions
from moesaic.model_sizes import ModelSizes
from moesaic.model_spec import ModelSpec
from moesaic.planner import LEAST_BITS, STORED, Report, Wish, plan_model
from moesaic.planner.text import size_text
from moesaic.published import REPOSITORIES

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Choice:
    """What to download of a repository, and how to load it.

    Attributes:
        source: name of the model on the hub, with the chosen quantization, as ``pull`` takes it.
        nbytes: bytes to download.
        format: format to quantize to after the download; None: as stored.
        report: the plan of the chosen files.
        others: bytes of each GGUF model of the repository, by its quantization; empty if it has only one model.
    """

    source: str
    nbytes: int
    format: str | None
    report: Report
    others: Mapping[str, int]


def repositories(model: str) -> tuple[str, ...]:
    """Return the repositories to look in for a model: those of a published model, or the named one."""
    return REPOSITORIES.get(model, (model,))


def choose(model: str, machine: Machine, wish: Wish, progress: Progress | None) -> Choice:
    """Return what to download for a model.

    Of a published model, the first repository that can be read and has something that fits is taken.

    Args:
        model: name of a published model or of one on the hub.
        machine: the machine that it will run on.
        wish: what it is wanted for.
        progress: called with the files whose headers were read, and their number; None: not called.

    Raises:
        NotFound: the hub has no such repository.
        DownloadError: the hub cannot be asked, or the files cannot be read.
        NotEnoughMemory: nothing of the repository fits; the message says what would help.
    """
    names = repositories(model)
    for last, repository in ((name == names[-1], name) for name in names):
        try:
            return _choose(repository, machine, wish, progress)
        except (NotFound, DownloadError, NotEnoughMemory):
            if last:
                raise
    raise AssertionError("there is at least one repository")


def _choose(model: str, machine: Machine, wish: Wish, progress: Progress | None) -> Choice:
    name = HubName.parse(model)
    assert name is not None, "the caller has checked the name"
    sizes = hub_access.sizes_on_hub(name)
    several = name.choice is None and not choose_files(list(sizes))
    choices = gguf_choices(list(sizes)) if several else {}
    if len(choices) < 2:
        selection = select(name, list(sizes))
        report = plan_model(ModelSizes.count(_describe(name, selection, sizes, progress)), machine, wish)
        if report.chosen is None:
            raise NotEnoughMemory(_does_not_fit(name.model, report))
        chosen = None if report.chosen == STORED else report.chosen
        return Choice(_source(name), _total(selection, sizes), chosen, report, {})
    return _choose_file(name, choices, sizes, machine, wish, progress)


def _choose_file(
    name: HubName,
    choices: Mapping[str, Selection],
    sizes: Mapping[str, int],
    machine: Machine,
    wish: Wish,
    progress: Progress | None,
) -> Choice:
    """Return the GGUF model to take: the largest that fits and is as fast as reading, or else the largest that fits."""
    totals = {label: _total(selection, sizes) for label, selection in choices.items()}
    ordered = sorted(choices, key=lambda label: -totals[label])
    fitting: list[Choice] = []
    report: Report | None = None
    for label in ordered:
        if label != ordered[-1] and not _may_fit(totals[label], machine):
            continue
        one = replace(name, choice=label)
        found = ModelSizes.count(_describe(one, choices[label], sizes, progress))
        report = plan_model(found, machine, replace(wish, formats=(STORED,)))
        [row] = report.rows
        if not row.fits:
            continue
        fitting.append(Choice(_source(one), totals[label], None, report, totals))
        if row.one.reading != "slower" and row.bits >= LEAST_BITS:
            return fitting[-1]
        if row.bits < LEAST_BITS:
            break
    if fitting:
        return next((choice for choice in reversed(fitting) if choice.report.rows[0].bits >= LEAST_BITS), fitting[0])
    assert report is not None
    raise NotEnoughMemory(_does_not_fit(name.model, report))


def _may_fit(nbytes: int, machine: Machine) -> bool:
    """Return whether weights of this size can fit at all, so that their header is worth reading."""
    return nbytes < machine.memory_bytes + (machine.host.memory_bytes if machine.host and machine.card else 0)


def _describe(name: HubName, selection: Selection, sizes: Mapping[str, int], progress: Progress | None) -> ModelSpec:
    with tempfile.TemporaryDirectory(prefix="moesaic-") as folder:
        path = outline.fetch(name, selection, sizes, Path(folder), progress)
        return replace(plan.describe(path, LoadOptions()), path=Path(name.model))


def _total(selection: Selection, sizes: Mapping[str, int]) -> int:
    return sum(sizes[file] for file in selection.files)


def _source(name: HubName) -> str:
    revision = f"@{name.revision}" if name.revision else ""
    return f"{name.repository}{revision}" + (f":{name.choice}" if name.choice else "")


def _does_not_fit(model: str, report: Report) -> str:
    smallest = min(report.rows, key=lambda row: row.bytes)
    needed, free = size_text(smallest.bytes), size_text(report.memory_bytes)
    sizes = f"{needed} are needed in the smallest format, but {free} are free"
    return " ".join([f"{model} does not fit on {report.machine.name}: {sizes}.", *report.advice])


def choice_lines(choice: Choice) -> Iterator[str]:
    """Yield what would be downloaded as lines of text."""
    formatted = f", then quantized to {choice.format}" if choice.format else ""
    yield f"{choice.source}: {size_text(choice.nbytes)} to download{formatted}"
    if choice.others:
        others = ", ".join(f"{label} {size_text(nbytes)}" for label, nbytes in choice.others.items())
        yield f"The repository also has: {others}."
