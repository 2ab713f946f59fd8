"""Several loads, one after another, on one server: who is asked, what, and how it is all put down.

Knows how a wish becomes an endpoint, a workload and runs. The command ``moesaic bench serving`` is this and flags.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesaic.bench import endpoints, latency, report, workload
from moesaic.bench.endpoints import AUTO, Endpoint, Manner
from moesaic.bench.serving import Load, Run, Standing, calibrate, measure
from moesaic.bench.workload import Words, Workload
from moesaic.errors import InvalidParameter, InvalidRequest


@dataclass(frozen=True)
class Target:
    """Who is asked, and how. ``model`` None: what the server has."""

    url: str
    dialect: str = AUTO
    model: str | None = None
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    manner: Manner = field(default_factory=Manner)


@dataclass(frozen=True)
class Source:
    """What is asked: random words, or a preset's, or a file's.

    ``words.answer_tokens`` is also for lines of a file that say nothing; ``context`` is for the preset
    that fills one, None: what the server says.
    """

    words: Words = field(default_factory=Words)
    preset: str | None = None
    dataset: Path | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in workload.PRESETS:
            raise InvalidParameter("workload", f"is {self.preset!r}, expected one of {', '.join(workload.PRESETS)}")
        if self.preset is not None and self.dataset is not None:
            raise InvalidRequest("--workload goes without --dataset")
        if self.context is not None and self.preset != "aime-context":
            raise InvalidRequest("--context goes with --workload aime-context")


@dataclass(frozen=True)
class Found:
    """What came of it: a run and its figures for each load."""

    about: dict[str, Any]
    runs: list[Run]
    figures: list[dict[str, Any]]

    @property
    def failed(self) -> int:
        return sum(each["failed"] for each in self.figures)

    @property
    def interrupted(self) -> bool:
        return self.runs[-1].interrupted

    def record(self, command: str) -> dict[str, Any]:
        """Return all of it for a file: of one load flat, as vLLM's benchmark writes it; of several in ``settings``."""
        origin = report.record(command, {})
        del origin["figures"]
        origin["versions"]["aiohttp"] = importlib.metadata.version("aiohttp")
        figures = self.figures[0] if len(self.figures) == 1 else {"settings": self.figures}
        return origin | self.about | figures


async def sweep(
    target: Target,
    source: Source,
    loads: Sequence[Load],
    promised: dict[str, float] | None = None,
    watch: Callable[[Load, Standing], object] | None = None,
) -> Found:
    """Put each of ``loads`` on a server; cancelled, return what is there by then.

    Args:
        target: the server.
        source: what it is asked.
        loads: when it is asked.
        promised: milliseconds that a good request keeps to, by metric.
        watch: called about once a second with the load and how far it is.

    Raises:
        InvalidRequest: the server cannot be asked, or does not answer a first request; or aiohttp is missing.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise InvalidRequest("a load needs aiohttp: pip install 'moesaic[bench]'")
    from moesaic.bench.endpoints import _http

    root, named = endpoints.from_url(target.url)
    dialect = named if named and target.dialect == AUTO else target.dialect
    async with _http.connect(root, target.key, target.headers) as client:
        endpoint = await endpoints.open(client, target.manner, dialect, target.model)
        work = await _workload(endpoint, source, loads[0].timeout)
        runs = []
        for number, load in enumerate(loads):
            tell = None if watch is None else lambda standing, load=load: watch(load, standing)
            runs.append(await measure(endpoint, work.asks(str(number)), load, tell))
            if runs[-1].interrupted:
                break
    about = {
        "backend": endpoint.name,
        "model_id": endpoint.model,
        "workload": work.about(),
        "ignore_eos": endpoint.manner.ignore_eos,
        "temperature": endpoint.manner.temperature,
    }
    return Found(about, runs, [latency.figures(run, promised or {}) for run in runs])


async def _workload(endpoint: Endpoint, source: Source, timeout: float) -> Workload:
    if source.dataset is not None:
        return workload.read(source.dataset, source.words.answer_tokens, chats=endpoint.chats)
    if source.preset is not None:  # AIME's workloads are of so many tokens, whatever the model would say
        endpoint.manner = replace(endpoint.manner, ignore_eos=endpoint.ignores_eos)
    if source.preset == "aime-short":
        return workload.Story()
    context = source.context or endpoint.context
    if source.preset == "aime-context" and context is None:
        raise InvalidRequest("the server does not say how large its context is: name it with --context")
    scale = await calibrate(endpoint, timeout)
    if source.preset == "aime-context" and context is not None:
        return workload.filling(context, source.words.seed, scale)
    return replace(source.words, scale=scale)
