"""Files of torch.save, read by a child process; malicious, damaged or unusual files raise one CheckpointError."""

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
    """Object that runs a function when it is unpickled."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def refused(path: Path, match: str = ".", **options: float) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        TorchFiles([path], **options)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    return str(caught.value)


def test_parts_are_read_bit_for_bit(tmp_path):
    torch.manual_seed(1)
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.float64}
    states = [{name: torch.randn(7, 5).to(dtype) for name, dtype in dtypes.items()} for _ in range(2)]
    states[1]["a"] = torch.randn(10, 7).T[:, ::2]  # strided, with a larger storage
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
def test_malicious_pickle_does_not_run(tmp_path, legacy):
    trace, path = tmp_path / "trace", tmp_path / "consolidated.00.pth"
    evil = Evil(os.mkdir, (str(trace),)) if legacy else Evil(os.system, (f"touch {trace}",))
    torch.save({"norm.weight": evil}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, "cannot be read safely: UnpicklingError")
    assert not trace.exists()
    with pytest.raises(pickle.UnpicklingError):  # plain torch refuses the file only with weights_only=True
        torch.load(path, weights_only=True)
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_only_dictionaries_of_dense_floats_are_read(tmp_path):
    path = tmp_path / "x.pth"
    cases = [
        ([torch.ones(2)], "expected a dictionary of tensors, found list"),
        ({"step": 3}, "expected only named tensors, found 'step': int"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "int64 on cpu, expected plain floats"),
        ({"a": torch.ones(2, 2).to_sparse()}, "torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "on meta"),
        ({1: torch.ones(2)}, "found 1: Tensor"),
    ]
    for state, message in cases:
        torch.save(state, path)
        with pytest.raises(ValueError, match=re.escape(message)):
            _torchfile_child.load(torch, str(path))
    assert "expected only named tensors, found 1: Tensor" in refused(path)


def test_torchscript_program_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path)
    for name in ("x/constants.pkl", "x/code/__torch__.py"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"")
        with pytest.raises(ValueError, match="TorchScript program"):
            _torchfile_child.load(torch, str(path))
    refused(path, "cannot be read safely: ValueError: this is a TorchScript program")


def test_damaged_file_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.randn(100, 100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "cannot be read safely")
    path.unlink()
    refused(path, "no such file")


def child(monkeypatch, tmp_path, body: str) -> None:
    """Replace the program of the child process."""
    script = tmp_path / "_torchfile_child.py"
    script.write_text(body)
    monkeypatch.setattr(_torchfile, "__file__", str(tmp_path / "_torchfile.py"))


def test_child_that_dies_or_hangs_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.touch()
    child(monkeypatch, tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    refused(path, r"the process that reads it ended \(exit status -9\)")
    child(monkeypatch, tmp_path, "import time; time.sleep(60)")
    refused(path, "sent nothing for 0 s", timeout_seconds=0.2)


def test_child_that_dies_later_is_an_error(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(3)}, path)
    files = TorchFiles([path])
    files._child.kill()
    with pytest.raises(CheckpointError, match="the process that reads it ended"):
        files.files[0].read("a")
    files.close()


def test_child_has_no_secrets_and_cannot_write(tmp_path, monkeypatch):
    """The probe drops the permissions of the child and then tries to write a file, as a malicious pickle would."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    real = Path(_torchfile.__file__).with_name("_torchfile_child.py").read_text()
    probe = real.rpartition("if __name__")[0] + (
        "import errno\n"
        "drop_permissions(sys.argv[2:])\n"
        "results = ['HF_TOKEN' in os.environ]\n"
        "try:\n"
        f"    Path({str(tmp_path / 'trace')!r}).write_text('x')\n"
        "    results.append('wrote')\n"
        "except OSError as error:\n"
        "    results.append(errno.errorcode[error.errno])\n"
        "send(sys.stdout.buffer, {'error': repr(results)})\n"
    )
    path = tmp_path / "x.pth"
    path.touch()
    child(monkeypatch, tmp_path, probe)
    assert "[False, 'EFBIG']" in refused(path)
    assert (tmp_path / "trace").read_bytes() == b""
