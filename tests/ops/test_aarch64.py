"""The kernels of 64-bit Arm processors, run under an emulator: they write the bytes that those here write."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from moesaic import formats
from moesaic.ops import _calls, _grouping, native
from moesaic.ops._arguments import Arguments
from tests.ops.test_native import drawn, stepwise
from tests.support import grouped
from tests.support.require import require, require_program

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-static", "-pthread"]
KERNELS = {"portable": ["-march=armv8-a"], "neon": ["-march=armv8.2-a+dotprod"]}
INTEGERS = ("int8", "int4", "int3", "int2")


class Recorder:
    """Records calls of native ops with the bytes of all tensors that they read and write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        self._file, self.calls = file.open("wb"), 0
        allocate = native._answer

        def answer(*arguments):
            return self.know(allocate(*arguments).zero_())

        monkeypatch.setattr(native, "_answer", answer)
        monkeypatch.setattr(native, "run", self._run)
        monkeypatch.setattr(native, "_native", lambda x: self.know(x.contiguous()))
        monkeypatch.setattr(native, "_float", lambda x: self.know(x.float().contiguous()))

    def know(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Remember tensors by their addresses; return the first."""
        for tensor in tensors:
            self._tensors[tensor.data_ptr()] = tensor
        return tensors[0]

    def weight(self, name: str, *shape: int):
        weight = formats.load(name).pack(torch.randn(*shape) / 8)
        self.know(*(part.data for part in weight.parts().values()))
        return weight

    def close(self) -> None:
        self._file.close()

    def _run(self, arguments: Arguments) -> None:
        found = [(offset, memory) for offset, memory in self._buffers(arguments)]
        before = [bytes(memory) for _, memory in found]
        _calls.run(arguments)
        self.calls += 1
        head = (_calls.op_numbers()[arguments.op], ctypes.sizeof(arguments), len(found))
        self._file.write(struct.pack("3q", *head) + bytes(arguments))
        for (offset, memory), old in zip(found, before, strict=True):
            new = bytes(memory)
            self._file.write(struct.pack("3q", offset, len(old), old != new) + old + (new if old != new else b""))

    def _buffers(self, arguments: Arguments):
        """Yield the offset of each pointer in ``arguments``, and the memory that it refers to."""
        for name, kind in arguments._fields_:
            address = getattr(arguments, name)
            if kind is not ctypes.c_void_p or not address:
                continue
            tensor = self._tensors.get(address)
            size = tensor.nbytes if tensor is not None else ctypes.sizeof(_grouping.Grouping)
            assert tensor is not None or "grouping" in name, f"{arguments.op} reads unknown memory: {name}"
            yield getattr(type(arguments), name).offset, (ctypes.c_char * size).from_address(address)


@pytest.fixture
def recorder(monkeypatch, tmp_path, device):
    if device != "cpu":
        pytest.skip("these kernels run on the CPU only")
    require(native.why_not("rms_norm", "cpu", None) is None, "the kernels are not compiled")
    return Recorder(monkeypatch, tmp_path / "calls")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The kernels and the program that replays calls, built for Arm."""
    compiler, folder = require_program("aarch64-linux-gnu-g++"), tmp_path_factory.mktemp("aarch64")
    objects, running = [], []
    has = [f"-DMOESAIC_HAS_{isa}" for isa in KERNELS]
    sources = [("plain", path, has) for path in ("api", "feedback", "packing", "pool")]
    sources += [(isa, path, flags) for isa, flags in KERNELS.items() for path in ("kernels", "quantize")]
    for isa, path, flags in sources:
        objects.append(folder / f"{path}_{isa}.o")
        running.append(subprocess.Popen([compiler, *FLAGS, *flags, "-c", ROOT / f"csrc/{path}.cpp", "-o", objects[-1]]))
    assert not any(process.wait() for process in running)
    built = folder / "replay"
    subprocess.run([compiler, *FLAGS, Path(__file__).parent / "replay_calls.cpp", *objects, "-o", built], check=True)
    return built


def record_products(recorder: Recorder) -> None:
    for name in (*INTEGERS, *grouped.KINDS):
        for tokens, columns in ((1, 320), (5, 576), (20, 256)):
            native.linear(recorder.know(torch.randn(tokens, columns)), recorder.weight(name, 70, columns))
        stacks = [recorder.weight(name, 4, *shape) for shape in ((96, 64), (96, 64), (64, 96))]
        ids = recorder.know(torch.tensor([[0, 3], [3, 1], [2, 0]]))
        scores = recorder.know(torch.rand(3, 2))
        native.experts(recorder.know(torch.randn(3, 64).bfloat16()), *stacks, ids, scores)
        rows = recorder.know(torch.tensor([0, 69, 33]))
        native.embedding(rows, recorder.weight(name, 70, 576), torch.float32)


def record_small_ops(recorder: Recorder) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = (recorder.know(torch.randn(5, 70).to(dtype)) for _ in range(2))
        native.rms_norm(x, recorder.know(torch.rand(70)), 1e-5)
        native.swiglu(x, y)
        native.add(x, y)
        native.route(x, recorder.know(torch.randn(8, 70)), 3)
        native.finite(x)
        angles = torch.randn(5, 7)
        native.rope(x.view(5, 5, 14), recorder.know(angles.cos()), recorder.know(angles.sin()))
    logits = recorder.know(torch.randn(4, 900))
    native.argmax(logits)
    native.draw(
        native.truncate(logits, recorder.know(torch.tensor([[0.7, 40, 0.9, 0.01, 0.95]] * 4))),
        recorder.know(torch.rand(4).double()),
    )


def record_attention(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = native.attention

    def known(q, k, v, batch, layer, window):
        recorder.know(*batch.cache.tensors(), batch.slots, batch.tables, batch.offsets, batch.positions)
        return attention(q, k, v, batch, layer, window)

    monkeypatch.setattr(native, "attention", known)
    for cache_dtype in (torch.float32, torch.bfloat16, torch.int8):
        stepwise(native, [[70, 69, 0], [75, 70, 37]], *drawn([75, 70, 37], 6, 2, 40), cache_dtype, 40)


@pytest.mark.parametrize("isa", KERNELS)
def test_arm_kernels_write_the_same_bytes(isa, program, recorder, monkeypatch, tmp_path):
    emulator = require_program("qemu-aarch64")
    record_products(recorder)
    record_small_ops(recorder)
    record_attention(recorder, monkeypatch)
    recorder.close()
    run = subprocess.run([emulator, "-cpu", "max", program, tmp_path / "calls", isa], capture_output=True, text=True)
    assert run.returncode == 0 and f"{recorder.calls} calls with {isa}\n" == run.stdout, run.stdout + run.stderr
