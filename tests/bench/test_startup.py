"""``bench startup``: real processes, their phases and memory; no test checks how long a start takes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from moesaic import cli
from moesaic.bench import report, startup
from moesaic.bench.report import records, sections
from moesaic.bench.startup import Sample
from moesaic.cli import bench
from moesaic.errors import InvalidParameter, InvalidRequest
from moesaic.load_options import LoadOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_command_measures_both_kinds_of_process(talker: Path, tmp_path: Path) -> None:
    out = tmp_path / "startup.json"
    assert cli.main(["bench", "startup", str(talker), "--format", "int8", "--runs", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    figures = record["figures"]
    assert figures["model"]["name"] == talker.name and figures["model"]["format"] == "int8"
    assert figures["model"]["bytes"] == sum(path.stat().st_size for path in talker.rglob("*") if path.is_file())
    assert [(row["mode"], row["cache"]) for row in figures["starts"]] == [
        (mode, cache) for mode in ("chat", "serve") for cache in ("cold", "warm")
    ]
    for row in figures["starts"]:
        names = ["imports", "plan", "weights", "first token"] if row["mode"] == "chat" else ["ready", "first token"]
        assert list(row["phases"]) == names and all(seconds > 0 for seconds in row["phases"].values())
        assert 2**26 < row["resident_bytes"] <= row["peak_bytes"] and row["limit_share"] > 0
    assert "int8" in json.dumps(record["command"])
    shown = "\n".join(startup.lines(figures))
    assert "weights" in shown and "ready" in shown
    page = sections.page([records.read(out)])
    assert page.sections[0].title == "Start" and len(page.sections[0].tables) == 2
    report.write([out], tmp_path / "report.html")


def test_medians_are_those_of_all_runs() -> None:
    samples = [Sample({"ready": float(n), "first token": 1.0}, n, 10 * n, 0) for n in (5, 1, 3)]
    row = startup._row("serve", "cold", samples, limit_seconds=2.0)
    assert row["phases"] == {"ready": 3.0, "first token": 1.0} and row["seconds"] == 4.0 and row["limit_share"] == 0.5
    assert (row["resident_bytes"], row["peak_bytes"], len(row["samples"])) == (3, 30, 3)


def test_phases_end_where_the_next_begin() -> None:
    assert startup.phases_from(10.0, {"imports": 12.0, "plan": 12.5}) == {"imports": 2.0, "plan": 0.5}


def test_cold_files_are_dropped_from_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(8 << 20))
    if _cached(path, "cold"):
        pytest.skip("this file system keeps its pages")
    assert _cached(path, "warm")


def _cached(path: Path, state: str) -> bool:
    """Return whether all of a file can be read without waiting for a disk after it was prepared."""
    startup.prepare([path], state)
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(8 << 20)], 0, os.RWF_NOWAIT) == 8 << 20
        except BlockingIOError:
            return False
        except OSError:
            pytest.skip("this file system cannot tell")


def test_starts_that_cannot_be_measured_are_refused(talker: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=r"^runs: is 0"):
        startup.run(talker, LoadOptions(), runs=0)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in talker.iterdir():
        if not file.name.startswith("tokenizer"):
            (broken / file.name).write_bytes(file.read_bytes())
    for mode, words in (("chat", "the chat ended with exit code 2: .*tokenizer"), ("serve", "ended with exit code 2")):
        with pytest.raises(InvalidRequest, match=words):
            startup.run(broken, LoadOptions(), 1, [mode])


def test_command_line_names_every_mode() -> None:
    assert bench.START_MODES == startup.MODES
