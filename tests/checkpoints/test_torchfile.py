"""Files of torch.save are read by a child: what is hostile, damaged or odd is one CheckpointError."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

from moesaic.checkpoints import _torchfile, _torchfile_child
from moesaic.checkpoints._torchfile import TorchFiles
from moesaic.errors import CheckpointError


class Evil:
    """What unpickling would run."""

    def __init__(self, *what: object) -> None:
        self.what = what

    def __reduce__(self):
        return self.what


def refused(path: Path, match: str = ".", **options: float) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        TorchFiles([path], **options)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    return str(caught.value)


def test_parts_of_tensors_in_several_files_arrive_bit_for_bit(tmp_path):
    torch.manual_seed(1)
    kinds = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.float64}
    states = [{name: torch.randn(7, 5).to(kind) for name, kind in kinds.items()} for _ in range(2)]
    states[1]["a"] = torch.randn(10, 7).T[:, ::2]  # strided, and longer than what it shows
    paths = [tmp_path / "one.pth", tmp_path / "two.pt"]
    torch.save(states[0], paths[0])
    torch.save(states[1], paths[1], _use_new_zipfile_serialization=False)
    files = TorchFiles(paths)
    try:
        for state, file in zip(states, files.files, strict=True):
            assert list(file.tensors) == list(state)
            for name, tensor in state.items():
                assert file.tensors[name].shape == tensor.shape and file.tensors[name].dtype == tensor.dtype
                for index in (None, (slice(2, 5),), (slice(None), slice(1, 3)), (slice(3, 3),)):
                    got = file.read(name, index)
                    assert got.dtype == tensor.dtype and torch.equal(got, tensor[index or ()])
    finally:
        files.close()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_does_not_run(tmp_path, legacy):
    trace, path = tmp_path / "trace", tmp_path / "consolidated.00.pth"
    evil = Evil(os.mkdir, (str(trace),)) if legacy else Evil(os.system, (f"touch {trace}",))
    torch.save({"norm.weight": evil}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, "cannot be read safely: UnpicklingError")
    assert not trace.exists()
    with pytest.raises(pickle.UnpicklingError):  # the same file is not one that plain torch would have refused anyway
        torch.load(path, weights_only=True)
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_only_plain_dictionaries_of_dense_floats_are_taken(tmp_path):
    path = tmp_path / "x.pth"
    odd = [
        ([torch.ones(2)], "expected a dictionary of tensors, found list"),
        ({"step": 3}, "expected only named tensors, found 'step': int"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "int64 on cpu, expected plain floats"),
        ({"a": torch.ones(2, 2).to_sparse()}, "torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "on meta"),
        ({1: torch.ones(2)}, "found 1: Tensor"),
    ]
    for state, message in odd:
        torch.save(state, path)
        with pytest.raises(ValueError, match=re.escape(message)):
            _torchfile_child.load(torch, str(path))
    assert "expected only named tensors, found 1: Tensor" in refused(path)


def test_a_torchscript_program_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path)
    for name in ("x/constants.pkl", "x/code/__torch__.py"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"")
        with pytest.raises(ValueError, match="TorchScript program"):
            _torchfile_child.load(torch, str(path))
    refused(path, "cannot be read safely: ValueError: this is a TorchScript program")


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.randn(100, 100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "cannot be read safely")
    path.unlink()
    refused(path, "no such file")


def child(monkeypatch, tmp_path, body: str) -> None:
    """Have another program stand in for the child."""
    script = tmp_path / "_torchfile_child.py"
    script.write_text(body)
    monkeypatch.setattr(_torchfile, "__file__", str(tmp_path / "_torchfile.py"))


def test_a_child_that_dies_or_hangs_is_one_error(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.touch()
    child(monkeypatch, tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    refused(path, r"ended while reading it \(exit status -9\)")
    child(monkeypatch, tmp_path, "import time; time.sleep(60)")
    refused(path, "said nothing for 0 s", patience=0.2)


def test_a_child_that_dies_later_is_one_error(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(3)}, path)
    files = TorchFiles([path])
    files._child.kill()
    with pytest.raises(CheckpointError, match="ended while reading it"):
        files.files[0].read("a")
    files.close()


def test_the_child_sees_no_secrets_and_may_not_write(tmp_path, monkeypatch):
    """Run the child's own limits, and then what an escaped pickle would try."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    real = Path(_torchfile.__file__).with_name("_torchfile_child.py").read_text()
    probe = real.rpartition("if __name__")[0] + (
        "import errno\n"
        "limit(sys.argv[2:])\n"
        "seen = ['HF_TOKEN' in os.environ]\n"
        "try:\n"
        f"    Path({str(tmp_path / 'trace')!r}).write_text('x')\n"
        "    seen.append('wrote')\n"
        "except OSError as error:\n"
        "    seen.append(errno.errorcode[error.errno])\n"
        "say(sys.stdout.buffer, {'error': repr(seen)})\n"
    )
    path = tmp_path / "x.pth"
    path.touch()
    child(monkeypatch, tmp_path, probe)
    assert "[False, 'EFBIG']" in refused(path)
    assert (tmp_path / "trace").read_bytes() == b""
