"""Packed weights: the same answers as quantizing on the way in, mapped, and never half there."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic import LLM, checkpoints, memory, packed
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.llm import BUILT_IN
from moesaic.loading import load_model
from tests.support.memory import resident

GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def folder(talker, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model"
    packed.pack(talker, path, "experts=int2,attention=int8")
    return path


def test_answers_are_those_of_quantizing_on_the_way_in(talker, folder):
    with LLM.load(folder) as mapped, LLM.load(talker, format="experts=int2,attention=int8") as read:
        assert mapped.complete("Once", **GREEDY).text == read.complete("Once", **GREEDY).text
        assert mapped.loaded.layout == "packed"


def test_every_part_is_as_quantizing_made_it(talker, folder):
    mapped = dict(packed.load(folder).named_parameters())
    read = dict(load_model(talker, format="experts=int2,attention=int8").model.named_parameters())
    assert mapped.keys() == read.keys()
    for name, parameter in read.items():
        assert mapped[name].dtype == parameter.dtype and torch.equal(mapped[name], parameter)
        assert mapped[name].data_ptr() % packed.ALIGNED == 0
    kinds = {str(parameter.dtype) for name, parameter in read.items() if "router" in name or "norm" in name}
    assert kinds == {"torch.float32"}


def test_the_file_is_a_safetensors_file(folder):
    from safetensors.torch import load_file

    assert {name for name in load_file(folder / packed.WEIGHTS) if not name.startswith("pad.")} == {
        name for name, _ in packed.load(folder).named_parameters()
    }


def test_what_is_packed_stays_as_it_is(folder):
    with pytest.raises(InvalidParameter, match="format: is decided"):
        LLM.load(folder, format="q4")
    with pytest.raises(InvalidParameter, match="dtype: is decided"):
        LLM.load(folder, dtype="float32")


def test_a_place_that_is_taken_and_a_format_that_is_not_there(talker, folder, tmp_path):
    with pytest.raises(InvalidParameter, match="exists already"):
        packed.pack(talker, folder, "q4")
    with pytest.raises(InvalidParameter, match="'q5' is unknown: there are q8, q4, q3, q2"):
        packed.pack(talker, tmp_path / "new", "q5")
    assert not any(tmp_path.iterdir())


def damaged(folder: Path, path: Path) -> Path:
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"packed": 1, "dtype": "float32"}', b"\xff"])
def test_a_mark_that_is_damaged(folder, tmp_path, content):
    broken = damaged(folder, tmp_path / "broken")
    (broken / packed.MARK).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"moesaic\.json: damaged"):
        packed.load(broken)


def test_a_later_version(folder, tmp_path):
    broken = damaged(folder, tmp_path / "broken")
    content = json.loads((broken / packed.MARK).read_text())
    (broken / packed.MARK).write_text(json.dumps(content | {"packed": 2}))
    with pytest.raises(CheckpointError, match="version 2, this build reads 1"):
        packed.load(broken)


@pytest.mark.parametrize("keep", [0, 5, 1000, 100_000])
def test_weights_that_are_cut_short(folder, tmp_path, keep):
    broken = damaged(folder, tmp_path / "broken")
    os.truncate(broken / packed.WEIGHTS, keep)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        packed.load(broken)


def test_weights_of_another_format(folder, tmp_path):
    broken = damaged(folder, tmp_path / "broken")
    content = json.loads((broken / packed.MARK).read_text())
    content["formats"]["experts"] = "int8"
    (broken / packed.MARK).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is not as its configuration wants it"):
        packed.load(broken)


def test_packing_that_is_killed_leaves_nothing_that_loads(talker, tmp_path):
    """Killed at a moment when half of the weights are written."""
    program = """
import os, signal, sys
from moesaic import packed
packed.pack(sys.argv[1], sys.argv[2], "q4",
            progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if 2 * done > total else None)
"""
    new = tmp_path / "new"
    done = subprocess.run([sys.executable, "-c", program, talker, new], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not new.exists()
    for left in tmp_path.iterdir():
        with pytest.raises(CheckpointError):
            checkpoints.open(left)
        assert not packed.is_packed(left)
    packed.pack(talker, new, "q4")  # and it does not stand in the way
    packed.load(new)


READER = """
import sys
from pathlib import Path
from moesaic import packed
model = packed.load(Path(sys.argv[1]))
print("opened", flush=True)
sys.stdin.readline()
assert all(bool(part.view(-1)[::8].isfinite().all()) for part in model.parameters())
print("read", flush=True)
sys.stdin.readline()
"""


def mapping(pid: int, name: str) -> int:
    """Return how many bytes of ``name`` (Rss, Pss) a process has of the file of weights."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.M)
    found = [re.search(rf"^{name}: +(\d+) kB", block, re.M) for block in blocks if packed.WEIGHTS in block]
    assert found
    return sum(1024 * int(each[1]) for each in found if each)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_processes_share_what_they_read(folder):
    command = [sys.executable, "-c", READER, str(folder)]
    size = (folder / packed.WEIGHTS).stat().st_size
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as two:
        assert one.stdout.readline() == two.stdout.readline() == "opened\n"
        for each in (one, two):
            print(file=each.stdin, flush=True)
        assert one.stdout.readline() == two.stdout.readline() == "read\n"
        for each in (one, two):
            assert mapping(each.pid, "Rss") > 0.9 * size
            assert mapping(each.pid, "Pss") < 0.6 * mapping(each.pid, "Rss")
        for each in (one, two):
            each.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("free", ["enough", "none"])
def test_answers_are_the_same_when_memory_runs_out_all_the_time(folder, monkeypatch, free):
    """Before each token, all the weights that are not locked are taken out of memory."""
    if free == "none":  # then experts are asked for early, and nothing is fetched whole
        monkeypatch.setattr(memory, "available", lambda: 0)
        monkeypatch.setattr(memory, "fetch", None)
    with LLM.load(folder) as llm:
        expected = llm.complete("Once", **GREEDY).text
        libc, pieces, read = ctypes.CDLL(None), [], resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        experts = [part for name, part in llm.loaded.model.named_parameters() if ".experts." in name]
        for piece in llm.complete("Once", stream=True, **GREEDY):
            pieces.append(piece.text)
            for part in experts:
                begin = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
                size = part.data_ptr() + part.nbytes - begin
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 21)  # MADV_PAGEOUT
            with (folder / packed.WEIGHTS).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert "".join(pieces) == expected
        if resource.getrusage(resource.RUSAGE_SELF).ru_inblock == read:
            pytest.skip("the same answer, but the file cannot be dropped from memory here")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_packing_leaves_nothing_in_small_pages(tmp_path, monkeypatch):
    """What is in memory already is mapped as it lies there; only what is read from disk comes in large pages."""
    kept = []
    monkeypatch.setattr(memory, "forget", kept.append)
    packed.pack(BUILT_IN, tmp_path / "kept", "q8")
    assert [path.name for path in kept] == [packed.WEIGHTS]
    monkeypatch.undo()
    packed.pack(BUILT_IN, tmp_path / "forgotten", "q8")
    if resident(memory.map_file(tmp_path / "forgotten" / packed.WEIGHTS)):
        memory.forget(tmp_path / "kept" / packed.WEIGHTS)
        assert resident(memory.map_file(tmp_path / "kept" / packed.WEIGHTS))
        pytest.skip("files cannot be dropped from memory here")


def test_no_more_than_half_of_memory_is_locked(folder, monkeypatch):
    """A dense model is read whole for each token: locked whole, it would leave others nothing."""
    monkeypatch.setattr(memory, "total", lambda: 100_000)
    asked = []
    monkeypatch.setattr(memory, "lock", lambda parts, most: asked.append((len(list(parts)), most)))
    model = packed.load(folder)
    assert asked == [(sum(".experts." not in name for name, _ in model.named_parameters()), 50_000)]
