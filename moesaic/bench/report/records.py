"""Result files of the benchmarks, read into values of one kind for each thing that a report shows.

This module knows the layouts of the files. ``READERS`` recognises them; old files may lack what newer ones have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.bench.load_report import load_name
from moesaic.errors import InvalidRequest

Json = Mapping[str, Any]
UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Throughput:
    """Speed of a model in the engine or behind a server, with several sessions at once."""

    model: str
    format: str
    """Format of the weights that was asked for; "" if the record does not have it."""
    load: str
    """The load in words, such as "batch 8"."""
    sessions: int | None
    """Concurrent answers; None if requests arrive at a rate."""
    prompt: int
    """Tokens of a prompt, on average."""
    total: float
    """Generated tokens per second of all answers together."""
    each: float
    """Generated tokens per second of one answer."""
    first_token_s: float
    share: float | None = None
    """Bytes that a step reads, as a fraction of the memory bandwidth; None: not measured."""
    prompt_tokens_s: float | None = None
    prompt_share: float | None = None
    """Speed of prompts as a fraction of the arithmetic peak."""
    peak_bytes: int | None = None
    failed: int = 0


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text in a format, as (value, standard error)."""

    model: str
    format: str
    bits: float
    perplexity: tuple[float, float]
    divergence: tuple[float, float] | None = None
    """KL divergence from the reference, in nats per token."""


@dataclass(frozen=True)
class Peer:
    """An engine with weights in a format."""

    name: str
    bits: float
    peak_bytes: int | None
    cells: Mapping[tuple[int, int], tuple[float, float | None]]
    """By tokens and batch, where batch 0 is a prompt: tokens per second, and their share of the limit."""


@dataclass(frozen=True)
class Comparison:
    """Engines on one model."""

    model: str
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    peers: list[Peer]


@dataclass(frozen=True)
class Kernel:
    """An op with its shares of memory bandwidth and of the arithmetic peak."""

    op: str
    format: str
    tokens: int
    context: int
    milliseconds: float
    read_share: float
    peak_share: float


@dataclass(frozen=True)
class Start:
    """A start of a model: the median seconds of each phase, in order."""

    model: str
    mode: str
    cache: str
    """cold or warm."""
    phases: Mapping[str, float]
    total_s: float
    share: float | None
    """The time that reading the same bytes takes at the measured speed, as a fraction of ``total_s``."""
    resident_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Record:
    """A result file: its origin, and what it has."""

    file: str
    kind: str
    origin: Mapping[str, str]
    """The command, date, commit, machine and versions as texts."""
    engine: list[Throughput] = field(default_factory=list)
    server: list[Throughput] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    tasks: list[Json] = field(default_factory=list)
    """Rows of ``evaluation.row``."""
    starts: list[Start] = field(default_factory=list)


def read(path: Path) -> Record:
    """Return the record in a result file.

    Raises:
        InvalidRequest: the file cannot be read, is no JSON, or is no result that a report understands.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}: is no JSON: {error}") from error
    if isinstance(content, list) or (isinstance(content, dict) and "perplexity" in content):
        content = {"figures": {"formats": content if isinstance(content, list) else [content]}}  # from --json
    try:
        for kind, (recognises, reader) in READERS.items():
            if recognises(content):
                return Record(path.name, kind, _origin(content), **reader(content))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InvalidRequest(f"{path}: is a damaged result of {kind}: {type(error).__name__}: {error}") from error
    raise InvalidRequest(f"{path}: is not a result of {', '.join(READERS)}")


def _origin(content: Json) -> dict[str, str]:
    machine, versions = content.get("machine"), content.get("versions") or {}
    return {
        "command": str(content.get("command", UNKNOWN)),
        "date": str(content.get("date", UNKNOWN)),
        "commit": str(content.get("commit") or UNKNOWN),
        "machine": _machine(machine) if machine else UNKNOWN,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or UNKNOWN,
    }


def _machine(machine: Json) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}"


def _finite(value: Any) -> float:
    """Return a number of a record.

    Raises:
        ValueError: it is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return value


def _optional(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _whole(value: Any) -> int:
    return round(_finite(value))


def _offline(content: Json) -> dict[str, Any]:
    figures = content["figures"]
    model, peak = figures["model"], (figures.get("memory") or {}).get("peak")
    return {"engine": [_setting(model, peak, each) for each in figures.get("settings", [figures])]}


def _setting(model: Json, peak: Any, figures: Json) -> Throughput:
    work, speed = figures["work"], figures["speed"]
    batch, total = _whole(work["batch"]), _finite(speed["decode_tokens_s"])
    return Throughput(
        model=str(model["name"]),
        format=str(model.get("format") or " + ".join(sorted(model["weights"]))),
        load=f"batch {batch}",
        sessions=batch,
        prompt=_whole(work["prompt"]),
        total=total,
        each=total / batch,
        first_token_s=_finite(speed["first_token_seconds"]),
        share=_optional(figures.get("read_share")),
        prompt_tokens_s=_finite(speed["prefill_tokens_s"]),
        prompt_share=_optional(figures.get("prompt_share")),
        peak_bytes=None if peak is None else _whole(peak),
    )


def _serving(content: Json) -> dict[str, Any]:
    return {"server": [_load(content, figures) for figures in content.get("settings", [content])]}


def _load(content: Json, figures: Json) -> Throughput:
    users = figures["max_concurrency"]
    return Throughput(
        model=str(content["model_id"]),
        format="",
        load=load_name(dict(figures)),
        sessions=None if users is None else _whole(users),
        prompt=_whole(figures["mean_prompt_tokens"] or 0),
        total=_finite(figures["output_throughput"] or 0),
        each=_finite(figures["mean_stream_throughput"] or 0),
        first_token_s=_finite(figures["median_ttft_ms"] or 0) / 1e3,
        failed=_whole(figures["failed"]),
    )


def _peers(content: Json) -> dict[str, Any]:
    figures = content["figures"]
    plan, shape = figures["plan"], figures["shape"]
    experts = f", {shape['experts']} experts of which {shape['chosen']} are used" if shape["experts"] > 1 else ""
    model = f"{shape['layers']} layers of {shape['hidden']} × {shape['inner']}{experts}"
    prompts, contexts, batches = (tuple(map(_whole, plan[name])) for name in ("prompts", "contexts", "batches"))
    peers = [_peer(row, plan) for row in figures["rows"]]
    return {"comparisons": [Comparison(model, prompts, contexts, batches, peers)]}


def _peer(row: Json, plan: Json) -> Peer:
    names = {(tokens, 0): f"prefill {tokens}" for tokens in plan["prompts"]}
    names |= {(tokens, n): f"decode {n} after {tokens}" for tokens in plan["contexts"] for n in plan["batches"]}
    cells = {}
    for cell, name in names.items():
        speed, limit = _finite(row["medians"][name]), row["limits"].get(name)
        cells[cell] = (speed, None if limit is None else speed / _finite(limit))
    return Peer(f"{row['label']}, {row['format']}", _finite(row["bits"]), row["peak_bytes"], cells)


def _kernels(content: Json) -> dict[str, Any]:
    names = ("op", "format"), ("tokens", "context"), ("milliseconds", "read_share", "peak_share")
    readers: tuple[Callable[[Any], Any], ...] = (str, _whole, _finite)
    rows = content["figures"]["rows"]
    return {
        "kernels": [
            Kernel(**{name: reader(row[name]) for group, reader in zip(names, readers, strict=True) for name in group})
            for row in rows
        ]
    }


def _perplexity(content: Json) -> dict[str, Any]:
    model = str(content["figures"].get("model", ""))
    return {"quality": [_format(model, row) for row in content["figures"]["formats"]]}


def _format(model: str, row: Json) -> Quality:
    distance = row.get("kl_divergence")
    mean = distance and (_finite(distance["mean"]["value"]), _finite(distance["mean"]["standard_error"]))
    perplexity = _finite(row["perplexity"]), _finite(row["perplexity_standard_error"])
    return Quality(model, str(row["format"]), _finite(row["bits_per_weight"]), perplexity, mean)


def _quantization(content: Json) -> dict[str, Any]:
    return {"quality": [_method(row) for row in content["figures"]["rows"]]}


def _method(row: Json) -> Quality:
    name = ", ".join(filter(None, (str(row["name"]), str(row["method"]))))
    perplexity, divergence = map(_finite, row["perplexity"]), map(_finite, row["kl_divergence"])
    value, error = perplexity
    mean, mean_error = divergence
    return Quality(f"{row['model']}, {row['engine']}", name, _finite(row["bits"]), (value, error), (mean, mean_error))


def _tasks(content: Json) -> dict[str, Any]:
    rows = content["figures"]["formats"]
    if not all(isinstance(figures, dict) for row in rows for figures in row["results"].values()):
        raise TypeError("a task has no metrics")
    return {"tasks": rows}


def _startup(content: Json) -> dict[str, Any]:
    figures = content["figures"]
    return {"starts": [_start(str(figures["model"]["name"]), row) for row in figures["starts"]]}


def _start(model: str, row: Json) -> Start:
    phases = {str(name): _finite(seconds) for name, seconds in row["phases"].items()}
    sizes = _whole(row["resident_bytes"]), _whole(row["peak_bytes"])
    speed = _finite(row["seconds"]), _optional(row["limit_share"])
    return Start(model, str(row["mode"]), str(row["cache"]), phases, *speed, *sizes)


def _has(*keys: str) -> Callable[[Any], bool]:
    """Return whether the figures of a record have all of these keys."""
    return lambda content: _figures(content).keys() >= set(keys)


def _is_serving(content: Any) -> bool:
    return isinstance(content, dict) and {"backend", "model_id", "workload"} <= content.keys()


def _figures(content: Any) -> Json:
    figures = content.get("figures") if isinstance(content, dict) else None
    return figures if isinstance(figures, dict) else {}


def _rows_have(rows: str, key: str) -> Callable[[Any], bool]:
    """Return whether the figures of a record have a list ``rows`` of dictionaries, all of them with ``key``."""

    def recognises(content: Any) -> bool:
        found = _figures(content).get(rows)
        return isinstance(found, list) and bool(found) and all(isinstance(row, dict) and key in row for row in found)

    return recognises


READERS: Mapping[str, tuple[Callable[[Any], bool], Callable[[Json], dict[str, Any]]]] = {
    "bench startup": (_has("model", "starts"), _startup),
    "bench offline": (_has("model", "limits"), _offline),
    "bench serving": (
        lambda content: isinstance(content, dict) and {"backend", "model_id"} <= content.keys(),
        _serving,
    ),
    "bench peers": (_has("shape", "plan", "rows"), _peers),
    "bench kernels": (_has("isa", "rows"), _kernels),
    "perplexity": (_rows_have("formats", "perplexity"), _perplexity),
    "eval": (_rows_have("formats", "results"), _tasks),
    "benchmarks.quantization": (_rows_have("rows", "kl_divergence"), _quantization),
}
"""For each command: whether a file is a result of it, and how to read it."""
