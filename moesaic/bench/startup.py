"""Time from the start of a process to the first token of an answer, by phases, with cold and with warm files.

Each start is a process of its own: one that loads a model as a chat does, or ``moesaic serve`` until a client gets the
first token of a stream. Cold files are those that were dropped from the page cache; Python's and torch's own files stay
in it, since dropping all takes an administrator. This module needs Linux.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moesaic import memory
from moesaic.errors import InvalidParameter, InvalidRequest
from moesaic.load_options import LoadOptions
from moesaic.plan import make_plan
from moesaic.text_tables import aligned, percent

MODES = ("chat", "serve")
CACHES = ("cold", "warm")
READ_BYTES = 8 << 20
"""Bytes of one read when the speed of the files is measured."""
MEASURED_BYTES = 2 << 30
"""Most bytes that are read to measure that speed."""


@dataclass(frozen=True)
class Sample:
    """One start."""

    phases: Mapping[str, float]
    """Seconds of each phase, in order; together they are the time to the first token."""
    resident_bytes: int
    """Resident memory of the process at the first token."""
    peak_bytes: int
    disk_bytes: int
    """Bytes that the process read from disk. Of cold files it is little if the system kept them in memory."""

    @property
    def seconds(self) -> float:
        """Seconds from the start of the process to the first token."""
        return sum(self.phases.values())


def run(
    path: Path,
    options: LoadOptions,
    runs: int = 3,
    modes: Sequence[str] = MODES,
    show: Callable[[str], object] = str,
) -> dict[str, Any]:
    """Measure starts of a model, and return the medians and all samples for a results file.

    Args:
        path: a checkpoint's folder or file.
        options: how the model is loaded; ``serve`` gets the options that it has flags for.
        runs: number of starts in each mode with cold and with warm files, in turn.
        modes: some of ``MODES``.
        show: called with a line before each start.

    Raises:
        InvalidParameter: a value is out of range.
        InvalidRequest: the system is not Linux, the model gives no answers, or a process failed.
        MoesaicError: the model cannot be loaded; see ``make_plan``.
    """
    if runs < 1:
        raise InvalidParameter("runs", f"is {runs}, expected at least 1")
    if sys.platform != "linux":
        raise InvalidRequest("bench startup needs Linux: it drops files from the page cache and reads /proc")
    if make_plan(path, options).labels:
        raise InvalidRequest(f"{path} is a classifier, which generates no tokens")
    files = model_files(path)
    samples: dict[tuple[str, str], list[Sample]] = {(mode, cache): [] for mode in modes for cache in CACHES}
    for turn in range(runs):
        for (mode, cache), found in samples.items():
            show(f"run {turn + 1} of {runs}: {mode}, {cache} files")
            prepare(files, cache)
            found.append(_STARTS[mode](path, options))
    size = sum(file.stat().st_size for file in files)
    speeds = {cache: _read_speed(files, cache) for cache in CACHES}
    starts = [_row(mode, cache, found, size / 1e9 / speeds[cache]) for (mode, cache), found in samples.items()]
    model = {"name": path.name, "format": options.format or "as stored", "bytes": size}
    return {"model": model, "runs": runs, "read_gb_s": speeds, "starts": starts}


def model_files(path: Path) -> list[Path]:
    """Return the files of a model: a file itself, or all files in a folder and below it."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def prepare(files: Sequence[Path], cache: str) -> None:
    """Drop files from the page cache if ``cache`` is "cold", or read them into it.

    The system keeps pages that another process has mapped.
    """
    for file in files:
        with file.open("rb", buffering=0) as opened:
            if cache == "cold":
                os.fsync(opened.fileno())  # a page that is not on disk yet is never dropped
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                _read(opened, bytearray(READ_BYTES), file.stat().st_size)


def _read(opened: Any, buffer: bytearray, limit: int) -> int:
    """Read up to ``limit`` bytes of a file; return how many there were."""
    total = 0
    while total < limit and (count := opened.readinto(memoryview(buffer)[: limit - total])):
        total += count
    return total


def _read_speed(files: Sequence[Path], cache: str) -> float:
    """Return the GB per second at which cold or warm files are read, one after another."""
    prepare(files, cache)
    buffer, total, start = bytearray(READ_BYTES), 0, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            total += _read(opened, buffer, MEASURED_BYTES - total)
    return total / (time.perf_counter() - start) / 1e9


def _row(mode: str, cache: str, samples: Sequence[Sample], limit_seconds: float) -> dict[str, Any]:
    seconds = statistics.median(sample.seconds for sample in samples)
    names = ("resident_bytes", "peak_bytes", "disk_bytes")
    return {
        "mode": mode,
        "cache": cache,
        "phases": {name: statistics.median(sample.phases[name] for sample in samples) for name in samples[0].phases},
        "seconds": seconds,
        "limit_seconds": limit_seconds,
        "limit_share": limit_seconds / seconds,
        **{name: statistics.median_high(getattr(sample, name) for sample in samples) for name in names},
        "samples": [asdict(sample) for sample in samples],
    }


def phases_from(start: float, ends: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each phase, given the times of its end in order and the time of the first start."""
    times = [start, *ends.values()]
    return {name: end - before for name, before, end in zip(ends, times, times[1:], strict=False)}


def start_chat(path: Path, options: LoadOptions) -> Sample:
    """Load the model in a process, and return the times until it has generated a token.

    Raises:
        InvalidRequest: the process failed.
    """
    command = [sys.executable, "-m", "moesaic.cli.one_start", str(path), json.dumps(asdict(options))]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InvalidRequest(f"the chat ended with exit code {done.returncode}: {_last_line(done.stderr)}")
    figures = json.loads(done.stdout)
    return Sample(phases_from(start, figures.pop("ends")), **figures)


def start_server(path: Path, options: LoadOptions) -> Sample:
    """Serve the model in a process, and return the times until a client has the first token of a stream.

    Raises:
        InvalidRequest: the process failed, or does not stream.
    """
    start = time.monotonic()
    with _server(path, options) as process:
        address = urlsplit(_address(process))
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        try:
            while _status(connection) != 200:
                time.sleep(0.005)
            ready = time.monotonic()
            first = _first_token(connection)
        except (OSError, http.client.HTTPException) as error:
            raise InvalidRequest(f"moesaic serve does not answer: {error}") from error
        finally:
            connection.close()
        about = Path(f"/proc/{process.pid}")
        status = memory.kilobytes(about / "status")
        ends = {"ready": ready, "first token": first}
        return Sample(phases_from(start, ends), status["VmRSS"], status["VmHWM"], memory.disk_bytes(about))


@contextlib.contextmanager
def _server(path: Path, options: LoadOptions) -> Iterator[subprocess.Popen[str]]:
    """Run ``moesaic serve`` with the options that it has flags for."""
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("dtype", "device", "kv_cache_dtype")]
    flags += [f"--{name}={value}" for name in ("format", "context") if (value := getattr(options, name)) is not None]
    flags += ["--requantize"] * options.requantize
    command = [sys.executable, "-m", "moesaic.cli", "serve", "--port=0", "--log-format=json", *flags, f"model={path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    """Return the address of a server, which is in its log.

    Raises:
        InvalidRequest: the process ended before it served.
    """
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        log.append(line)
        if '"event": "serving"' in line:
            return str(json.loads(line)["url"])
    raise InvalidRequest(f"moesaic serve ended with exit code {process.wait()}: {_last_line(''.join(log))}")


def _status(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/health")
    response = connection.getresponse()
    response.read()
    return response.status


def _first_token(connection: http.client.HTTPConnection) -> float:
    """Return the time at which the first text of a stream arrives.

    Raises:
        InvalidRequest: there is none.
    """
    body = {"model": "model", "prompt": "Once upon a time", "max_tokens": 16, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = b""
    for line in response:
        text += line
        if line.startswith(b"data: {") and any(each["text"] for each in json.loads(line[6:]).get("choices", ())):
            arrived = time.monotonic()
            response.read()
            return arrived
    raise InvalidRequest(f"moesaic serve sent no token: {_last_line(text.decode(errors='replace'))}")


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


_STARTS: Mapping[str, Callable[[Path, LoadOptions], Sample]] = {"chat": start_chat, "serve": start_server}


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``results``, a result of ``run``, as lines of text: a table for each mode."""
    model, speeds = results["model"], results["read_gb_s"]
    measured = f"read at {speeds['cold']:.2f} GB/s cold and {speeds['warm']:.2f} GB/s warm"
    yield f"{model['name']}: {model['bytes'] / 1e9:.2f} GB, {measured}; medians of {results['runs']}, in seconds"
    for mode in dict.fromkeys(row["mode"] for row in results["starts"]):
        rows = [row for row in results["starts"] if row["mode"] == mode]
        head = [mode, *rows[0]["phases"], "in all", "of limit", "resident GB", "peak GB", "from disk GB"]
        yield from aligned([head, *map(_cells, rows)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    sizes = (f"{row[name] / 1e9:.2f}" for name in ("resident_bytes", "peak_bytes", "disk_bytes"))
    phases = (f"{seconds:.2f}" for seconds in row["phases"].values())
    return [row["cache"], *phases, f"{row['seconds']:.2f}", percent(row["limit_share"]), *sizes]
