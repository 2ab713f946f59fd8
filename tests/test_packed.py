"""Packed weights: equal to weights quantized while loading, shared by mapping, and written completely or not at all."""

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

from moesaic import LLM, checkpoints, loading, memory, packed
from moesaic.builtin import TALES_FOLDER
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.plan import make_plan
from tests.support.gguf_files import TinyFile
from tests.support.loading import load_model
from tests.support.memory import resident

GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def folder(talker, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model"
    packed.pack(talker, path, "experts=int2,attention=int8")
    return path


def test_packed_model_answers_as_a_quantized_one(talker, folder):
    with LLM.load(folder) as mapped, LLM.load(talker, format="experts=int2,attention=int8") as read:
        assert mapped.complete("Once", **GREEDY).text == read.complete("Once", **GREEDY).text
        assert mapped.loaded.layout == "packed"


def test_packed_parameters_equal_quantized_ones(talker, folder):
    mapped = dict(load_model(folder).model.named_parameters())
    read = dict(load_model(talker, format="experts=int2,attention=int8").model.named_parameters())
    assert mapped.keys() == read.keys()
    for name, parameter in read.items():
        assert mapped[name].dtype == parameter.dtype and torch.equal(mapped[name], parameter)
        assert mapped[name].data_ptr() % packed.ALIGNMENT == 0
    kinds = {str(parameter.dtype) for name, parameter in read.items() if "router" in name or "norm" in name}
    assert kinds == {"torch.float32"}


def test_weights_are_a_safetensors_file(folder):
    from safetensors.torch import load_file

    assert {name for name in load_file(folder / packed.WEIGHTS) if not name.startswith("pad.")} == {
        name for name, _ in load_model(folder).model.named_parameters()
    }


def test_packed_weights_are_not_quantized_again(folder):
    with pytest.raises(InvalidParameter, match="format: cannot be changed"):
        LLM.load(folder, format="q4")
    with pytest.raises(InvalidParameter, match="dtype: cannot be changed"):
        LLM.load(folder, dtype="float32")


def test_used_folder_and_unknown_format_are_refused(talker, folder, tmp_path):
    with pytest.raises(InvalidParameter, match="exists already"):
        packed.pack(talker, folder, "q4")
    with pytest.raises(InvalidParameter, match="'q5' is unknown; available: q8, q4, q3, q2"):
        packed.pack(talker, tmp_path / "new", "q5")
    assert not any(tmp_path.iterdir())


def damaged(folder: Path, path: Path) -> Path:
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"packed": 1, "dtype": "float32"}', b"\xff"])
def test_damaged_manifest_is_refused(folder, tmp_path, content):
    broken = damaged(folder, tmp_path / "broken")
    (broken / packed.MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"moesaic\.json: damaged"):
        load_model(broken)


def test_later_version_is_refused(folder, tmp_path):
    broken = damaged(folder, tmp_path / "broken")
    content = json.loads((broken / packed.MANIFEST).read_text())
    (broken / packed.MANIFEST).write_text(json.dumps(content | {"packed": packed.VERSION + 1}))
    with pytest.raises(CheckpointError, match=r"version 3, but this build reads 2"):
        load_model(broken)


@pytest.mark.parametrize("keep", [0, 5, 1000, 100_000])
def test_truncated_weights_are_refused(folder, tmp_path, keep):
    broken = damaged(folder, tmp_path / "broken")
    os.truncate(broken / packed.WEIGHTS, keep)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        load_model(broken)


def test_weights_of_another_format_are_refused(folder, tmp_path):
    broken = damaged(folder, tmp_path / "broken")
    content = json.loads((broken / packed.MANIFEST).read_text())
    content["formats"]["experts"] = "int8"
    (broken / packed.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not match the configuration"):
        load_model(broken)


def test_killed_packing_leaves_no_loadable_folder(talker, tmp_path):
    """The process is killed when half of the weights are written."""
    program = """
import os, signal, sys
from moesaic import packed
packed.pack(sys.argv[1], sys.argv[2], "q4",
            progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if 2 * done > total else None)
"""
    new = tmp_path / "new"
    process = subprocess.run([sys.executable, "-c", program, talker, new], timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not new.exists()
    for left in tmp_path.iterdir():
        with pytest.raises(CheckpointError):
            checkpoints.open_checkpoint(left)
        assert not packed.is_packed(left)
    packed.pack(talker, new, "q4")  # the remains of the killed process do not matter
    load_model(new)


READER = """
import sys
from pathlib import Path
from moesaic.loading import load_model
from moesaic.plan import make_plan
model = load_model(make_plan(Path(sys.argv[1]))).model
print("opened", flush=True)
sys.stdin.readline()
assert all(bool(part.view(-1)[::8].isfinite().all()) for part in model.parameters())
print("read", flush=True)
sys.stdin.readline()
"""


def mapping(pid: int, name: str) -> int:
    """Return the bytes of the weights that a process has in memory, by the measure ``name``: Rss or Pss."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.M)
    matches = [re.search(rf"^{name}: +(\d+) kB", block, re.M) for block in blocks if packed.WEIGHTS in block]
    assert matches
    return sum(1024 * int(match[1]) for match in matches if match)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_processes_share_mapped_memory(folder):
    command = [sys.executable, "-c", READER, str(folder)]
    size = (folder / packed.WEIGHTS).stat().st_size
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as two:
        assert one.stdout.readline() == two.stdout.readline() == "opened\n"
        for process in (one, two):
            print(file=process.stdin, flush=True)
        assert one.stdout.readline() == two.stdout.readline() == "read\n"
        for process in (one, two):
            assert mapping(process.pid, "Rss") > 0.9 * size
            assert mapping(process.pid, "Pss") < 0.6 * mapping(process.pid, "Rss")
        for process in (one, two):
            process.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("free", ["enough", "none"])
def test_answers_are_equal_when_weights_are_evicted(folder, monkeypatch, free):
    """All weights that are not locked are evicted from memory before each token."""
    plan = make_plan(folder)
    if free == "none":  # experts are prefetched, and the file is not loaded in the background
        monkeypatch.setattr(memory, "available", lambda: 0)
        monkeypatch.setattr(memory, "load_in_background", None)
    with LLM.from_plan(plan, "model") as llm:
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
            pytest.skip("the answers are equal, but this system cannot drop the file from the page cache")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_packing_evicts_the_new_file(tmp_path, monkeypatch):
    """Data in the page cache is mapped in pages of 4 KiB; only data that is read from disk gets large pages."""
    kept = []
    monkeypatch.setattr(memory, "evict", kept.append)
    packed.pack(TALES_FOLDER, tmp_path / "kept", "q8")
    assert [path.name for path in kept] == [packed.WEIGHTS]
    monkeypatch.undo()
    packed.pack(TALES_FOLDER, tmp_path / "evicted", "q8")
    if resident(memory.map_file(tmp_path / "evicted" / packed.WEIGHTS)):
        memory.evict(tmp_path / "kept" / packed.WEIGHTS)
        assert resident(memory.map_file(tmp_path / "kept" / packed.WEIGHTS))
        pytest.skip("this system cannot drop files from the page cache")


def test_at_most_half_of_memory_is_locked(folder, monkeypatch):
    """Every token reads all weights of a dense model; locking all of them would leave no memory to others."""
    plan = make_plan(folder)
    monkeypatch.setattr(memory, "total", lambda: 100_000)
    calls = []
    monkeypatch.setattr(memory, "lock", lambda parts, max_bytes: calls.append((len(list(parts)), max_bytes)))
    model = loading.load_model(plan).model
    assert calls == [(sum(".experts." not in name for name, _ in model.named_parameters()), 50_000)]


def test_packed_weights_keep_the_codes_of_a_quantized_file(tmp_path):
    path = TinyFile("Q5_K", experts=3).write(tmp_path / "tiny.gguf")
    packed.pack(path, tmp_path / "packed")
    mapped, read = (load_model(source).model for source in (tmp_path / "packed", path))
    weights = dict(read.named_parameters())
    assert weights.keys() == dict(mapped.named_parameters()).keys()
    for name, parameter in mapped.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert mapped.blocks[1].mlp.experts.down.name == "grouped:bits=5:scale=super:offset=value"


def test_plain_weights_are_not_packed_without_a_format(talker, tmp_path):
    with pytest.raises(InvalidParameter, match=r"format: is missing: .* has no quantized weights"):
        packed.pack(talker, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
