"""Recorded computations: replays give the bits of the ops one by one, and what cannot be repeated is not recorded."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from moesaic import formats, ops
from moesaic.errors import InvalidParameter
from moesaic.ops import native
from moesaic.ops._graph import Arena
from tests.support.require import require

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(device):
    if device != "cpu":
        pytest.skip("only the CPU has graphs")
    require(native.why_not("rms_norm", "cpu", None) is None, "the kernels are not compiled")


def packed(name, *shape):
    return formats.load(name).pack(torch.randn(*shape) / 8)


def poison(graph):
    """Overwrite the memory of a graph with bytes that are NaN as float32 and bfloat16."""
    for buffer in graph._recording.arena.buffers:
        buffer[:] = 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "names", [("int4", "int2", "int8"), ("bfloat16",) * 3, ("grouped", "grouped:offset=value", "grouped")]
)
def test_replays_give_the_bits_of_single_ops(names, tokens, dtype):
    gate, up, down = (packed(name, *shape) for name, shape in zip(names, ((96, 64), (96, 64), (64, 96)), strict=True))
    x, norm = torch.zeros(tokens, 64, dtype=dtype), torch.rand(64)

    def compute():
        inner = ops.rms_norm(x, norm, 1e-5)
        inner = ops.swiglu(ops.linear(inner, gate), ops.linear(inner, up))
        return ops.add(x, ops.linear(inner, down)), ops.linear(inner, down, torch.float32)

    graph = ops.record(CPU, compute)
    for _ in range(3):
        x.copy_(torch.randn(tokens, 64))
        poison(graph)
        graph.replay()
        for found, expected in zip(graph.result, compute(), strict=True):
            assert torch.equal(found, expected)


def test_linear_layers_of_one_input_become_one_call():
    x, weights = (
        torch.randn(2, 64),
        [packed(name, rows, 64) for name, rows in (("int4", 96), ("int8", 32), ("int3", 40))],
    )
    other = packed("bfloat16", 32, 64)
    graph = ops.record(CPU, lambda: [ops.linear(x, weight) for weight in (*weights, other)])
    assert [call.op for call in graph._arguments] == ["linears", "linear"]
    for y in graph.result:
        y.fill_(torch.nan)
    graph.replay()
    for y, weight in zip(graph.result, (*weights, other), strict=True):
        assert torch.equal(y, ops.linear(x, weight))


def test_linear_layers_with_different_orders_of_columns_stay_apart():
    name = "grouped:group=64:offset=zero:order=act"
    x, weights = torch.randn(2, 128), [packed(name, 32, 128) for _ in range(2)]
    graph = ops.record(CPU, lambda: [ops.linear(x, weight) for weight in weights])
    assert [call.op for call in graph._arguments] == ["linear", "linear"]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: ops.add(x, x) * 2,
        lambda x: ops.add(x, torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        lambda x: ops.add(x.T.contiguous(), x),
        lambda x: ops.add(x.T, x),
        lambda x: ops.add(x, x).double(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: ops.linear(x, formats.load("float32").empty((3, 2))),
    ],
    ids=["arithmetic", "constant", "copy", "copy in an op", "conversion", "gather", "reference"],
)
def test_what_torch_computes_is_not_recorded(compute):
    x = torch.randn(2, 2)
    assert ops.record(CPU, lambda: compute(x)) is None
    assert ops.record(CPU, lambda: ops.add(x, x)) is not None  # a refused recording does not disturb the next


def test_views_are_recorded():
    x = torch.randn(6, 8)
    graph = ops.record(
        CPU, lambda: ops.rms_norm(ops.add(x, x).view(2, 24).flatten(0), torch.ones(48), 1e-5).unflatten(0, (6, 8))
    )
    assert graph is None  # the weight of ones is made in the computation
    ones = torch.ones(48)
    graph = ops.record(CPU, lambda: ops.rms_norm(ops.add(x, x).view(2, 24).flatten(0), ones, 1e-5).unflatten(0, (6, 8)))
    x.copy_(torch.randn(6, 8))
    graph.replay()
    assert torch.equal(graph.result, ops.rms_norm((x + x).flatten(), ones, 1e-5).view(6, 8))


def test_an_error_in_a_recording_ends_it():
    x, longer = torch.ones(2), torch.ones(3)
    with pytest.raises(InvalidParameter):
        ops.record(CPU, lambda: ops.add(x, longer))
    assert ops.record(CPU, lambda: ops.add(x, x)) is not None


def test_a_replay_checks_ids():
    ids, weight = torch.tensor([0, 1]), packed("int4", 4, 64)
    graph = ops.record(CPU, lambda: ops.embedding(ids, weight, torch.float32))
    ids[1] = 4
    with pytest.raises(InvalidParameter, match="ids: an id is out of range"):
        graph.replay()


def test_ops_of_other_threads_are_not_recorded():
    x, ready, done = torch.randn(2, 64), threading.Event(), threading.Event()

    def other():
        ready.wait()
        ops.add(x, x)
        done.set()

    def compute():
        ready.set()
        done.wait()
        return ops.add(x, x)

    thread = threading.Thread(target=other)
    thread.start()
    graph = ops.record(CPU, compute)
    thread.join()
    assert len(graph._arguments) == 1


def test_recording_does_not_import_the_compiler_of_torch():
    program = """
import sys, torch
from moesaic import ops
x = torch.ones(2, 4)
assert ops.record(torch.device("cpu"), lambda: ops.add(x, x).flatten()) is not None
raise SystemExit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_numbers_that_are_read_are_not_recorded():
    x = torch.ones(2)
    for read in (bool, torch.Tensor.tolist, lambda y: y.sum().item(), lambda y: y.mul_(2)):
        assert ops.record(CPU, lambda read=read: read(ops.add(x, x)[:1])) is None


def test_memory_is_used_again_when_nothing_refers_to_it():
    arena = Arena()
    kept = arena.empty((10, 10), torch.float32)
    view = arena.empty((20, 10), torch.float32)[:5].view(-1)
    for _ in range(5):
        arena.empty((20, 10), torch.float32).fill_(1)
    assert len(arena.buffers) == 3 and arena.nbytes < 5 * 800
    assert all(address % 64 == 0 for address in (kept.data_ptr(), view.data_ptr()))
    del view
    arena.empty((20, 10), torch.float32)
    arena.empty((20, 10), torch.float32)
    assert len(arena.buffers) == 3
