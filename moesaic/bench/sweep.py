"""Measure several loads on one server, one after another, and collect the results.

This module turns options into an endpoint, a workload and runs. The command ``moesaic bench serving`` adds the flags.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesaic.bench import endpoints, latency, provenance, workload
from moesaic.bench.endpoints import AUTO, Endpoint, RequestOptions
from moesaic.bench.serving import LoadProfile, Progress, Run, calibrate, measure
from moesaic.bench.workload import RandomWords, Workload
from moesaic.errors import InvalidParameter, InvalidRequest


@dataclass(frozen=True)
class Target:
    """The server to measure, and the options of every request."""

    url: str
    dialect: str = AUTO
    model: str | None = None
    """Name of the model; None: the model that the server lists first."""
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    options: RequestOptions = field(default_factory=RequestOptions)


@dataclass(frozen=True)
class WorkloadSource:
    """Where the requests come from: random words, a workload for which the company AIME publishes results, or a file.

    Raises:
        InvalidParameter: there is no such preset.
        InvalidRequest: two fields exclude each other.
    """

    words: RandomWords = field(default_factory=RandomWords)
    """Parameters of random words; ``answer_tokens`` also applies to lines of a file without "max_tokens"."""
    preset: str | None = None
    """Name of a workload for which the company AIME publishes results, one of ``workload.PRESETS``."""
    dataset: Path | None = None
    context: int | None = None
    """Context length for the preset aime-context; None: the length that the server announces."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in workload.PRESETS:
            raise InvalidParameter("workload", f"is {self.preset!r}, expected one of {', '.join(workload.PRESETS)}")
        if self.preset is not None and self.dataset is not None:
            raise InvalidRequest("--workload and --dataset exclude each other")
        if self.context is not None and self.preset != "aime-context":
            raise InvalidRequest("--context requires --workload aime-context")


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep: a run and its figures for each load profile."""

    about: dict[str, Any]
    """Description of the server and the workload."""
    runs: list[Run]
    figures: list[dict[str, Any]]

    @property
    def failed(self) -> int:
        """Number of failed requests in all runs together."""
        return sum(figures["failed"] for figures in self.figures)

    @property
    def interrupted(self) -> bool:
        """Whether the last run was cancelled."""
        return self.runs[-1].interrupted

    def record(self, command: str) -> dict[str, Any]:
        """Return the result for a JSON file.

        The figures of a single load are at the top level, as vLLM's benchmark writes them; those of several loads are
        in the list ``settings``.
        """
        origin = provenance.record(command, {})
        del origin["figures"]
        origin["versions"]["aiohttp"] = importlib.metadata.version("aiohttp")
        figures = self.figures[0] if len(self.figures) == 1 else {"settings": self.figures}
        return origin | self.about | figures


async def sweep(
    target: Target,
    source: WorkloadSource,
    loads: Sequence[LoadProfile],
    slos: dict[str, float] | None = None,
    on_progress: Callable[[LoadProfile, Progress], object] | None = None,
) -> SweepResult:
    """Measure each of ``loads`` on a server; if the task is cancelled, return the results so far.

    Args:
        target: the server.
        source: the requests.
        loads: when the requests are sent.
        slos: limits of a good request in milliseconds, by metric.
        on_progress: called about once per second with the current load and its progress.

    Raises:
        InvalidRequest: the server cannot be used, its first answers failed, or aiohttp is not installed.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise InvalidRequest("bench serving needs aiohttp: pip install 'moesaic[bench]'")
    from moesaic.bench.endpoints import _http

    root, implied = endpoints.from_url(target.url)
    dialect = implied if implied and target.dialect == AUTO else target.dialect
    async with _http.connect(root, target.key, target.headers) as client:
        endpoint = await endpoints.open_endpoint(client, target.options, dialect, target.model)
        requests = await _workload(endpoint, source, loads[0].timeout)
        runs = []
        for number, load in enumerate(loads):
            callback = None if on_progress is None else lambda progress, load=load: on_progress(load, progress)
            runs.append(await measure(endpoint, requests.requests(str(number)), load, callback))
            if runs[-1].interrupted:
                break
    about = {
        "backend": endpoint.name,
        "model_id": endpoint.model,
        "workload": requests.describe(),
        "ignore_eos": endpoint.options.ignore_eos,
        "temperature": endpoint.options.temperature,
    }
    return SweepResult(about, runs, [latency.summarize(run, slos or {}) for run in runs])


async def _workload(endpoint: Endpoint, source: WorkloadSource, timeout: float) -> Workload:
    if source.dataset is not None:
        tokens = source.words.answer_tokens
        return workload.read_dataset(source.dataset, tokens, supports_messages=endpoint.supports_messages)
    if source.preset is not None:  # AIME's workloads have a fixed number of tokens, where the model cannot stop early
        endpoint.options = replace(endpoint.options, ignore_eos=endpoint.supports_ignore_eos)
    if source.preset == "aime-short":
        return workload.AimeShortPrompt()
    context = source.context or endpoint.context
    if source.preset == "aime-context" and context is None:
        raise InvalidRequest("the server does not announce its context length: pass --context")
    scale = await calibrate(endpoint, timeout)
    if source.preset == "aime-context" and context is not None:
        return workload.aime_context(context, source.words.seed, scale)
    return replace(source.words, scale=scale)
