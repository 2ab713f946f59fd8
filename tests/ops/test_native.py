"""What the compiled kernels promise beyond the ops' contract: the same bits, whatever the company."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from moesaic import formats
from moesaic.ops import Batch, Cache, native, reference

if shutil.which("c++") is None and native.why_not("linear", "cpu", "int4"):
    pytest.skip("there is no compiler here, and so no kernels", allow_module_level=True)

FORMATS = sorted(native.FORMATS)
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def on_cpu(device):
    if device != "cpu":
        pytest.skip("these kernels run on the CPU only")


@pytest.fixture(autouse=True)
def as_before():
    isa = native.instruction_set()
    yield
    native.use_instruction_set(isa)
    native.set_threads(len(os.sched_getaffinity(0)))


def weights(format, experts=4, d=320, f=200):
    packed = formats.load(format)
    return [packed.pack(torch.randn(experts, *shape) / 8) for shape in ((f, d), (f, d), (d, f))]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_gets_the_same_bits_alone_and_in_a_crowd(format, dtype):
    weight = formats.load(format).pack(torch.randn(70, 900))
    x = torch.randn(61, 900).to(dtype)
    together = native.linear(x, weight)
    assert together.dtype == dtype and together.isfinite().all()
    for count in (1, 2, 3, 4, 5, 12, 13, 25):
        for begin in range(0, 61 - count, 17):
            assert torch.equal(native.linear(x[begin : begin + count], weight), together[begin : begin + count])


@pytest.mark.parametrize("format", FORMATS)
def test_experts_too(format):
    gate, up, down = weights(format)
    x, scores = torch.randn(50, 320), torch.rand(50, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(50)])
    together = native.experts(x, gate, up, down, ids, scores)
    for begin, end in ((0, 1), (3, 5), (10, 31), (7, 50)):
        part = slice(begin, end)
        assert torch.equal(native.experts(x[part], gate, up, down, ids[part], scores[part]), together[part])


@pytest.mark.parametrize("format", [name for name in FORMATS if name.startswith("int")])
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(format):
    gate, up, down = weights(format)
    for tokens in (1, 2, 4, 30):
        x, scores = torch.randn(tokens, 320), torch.rand(tokens, 2)
        ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
        found = []
        for isa in native.INSTRUCTION_SETS:
            if not native.use_instruction_set(isa):
                continue
            assert native.instruction_set() == isa
            for threads in (1, 2, 5):
                native.set_threads(threads)
                found.append(native.experts(x, gate, up, down, ids, scores))
        assert all(torch.equal(each, found[0]) for each in found)


def test_nan_and_infinity_stay_with_their_token():
    weight = formats.load("int4").pack(torch.randn(40, 300))
    x = torch.randn(20, 300)
    clean = native.linear(x, weight)
    x[3, 7], x[11, 299] = math.nan, math.inf
    found = native.linear(x, weight)
    assert not found[3].isfinite().any() and not found[11].isfinite().any()
    others = [t for t in range(20) if t not in (3, 11)]
    assert torch.equal(found[others], clean[others])


def test_columns_of_zeros():
    weight = formats.load("int4").pack(torch.zeros(40, 300))
    assert not native.linear(torch.randn(3, 300), weight).any()
    weight = formats.load("int4").pack(torch.randn(40, 300))
    assert not native.linear(torch.zeros(3, 300), weight).any()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 128), (4, 4, 64), (6, 1, 40), (20, 1, 96)])
def test_attention_equals_the_reference_for_prefill_and_decode(heads, kv_heads, size, cache_dtype, window):
    """A long prompt in two chunks beside a sequence that decodes, in scattered blocks of a poisoned cache."""
    lengths, cached, block = [150, 90, 37], [70, 89, 0], 16
    blocks = torch.randperm(40)
    tables = torch.full((3, 10), -1)
    for s, length in enumerate(lengths):
        tables[s, : -(-length // block)] = blocks[10 * s : 10 * s + -(-length // block)]
    places = [range(c, n) for c, n in zip(cached, lengths, strict=True)]
    answers = []
    for backend in (reference, native):
        torch.manual_seed(1)
        cache = Cache(*([torch.full((40, block, kv_heads, size), math.nan, dtype=cache_dtype)] for _ in range(2)))
        for s, count in enumerate(cached):
            slots = [int(tables[s, p // block]) * block + p % block for p in range(count)]
            cache.keys[0].flatten(0, 1)[slots] = torch.randn(count, kv_heads, size).to(cache_dtype)
            cache.values[0].flatten(0, 1)[slots] = torch.randn(count, kv_heads, size).to(cache_dtype)
        tokens = sum(map(len, places))
        q = torch.randn(tokens, heads, size)
        k, v = (torch.randn(tokens, kv_heads, size).to(cache_dtype).float() for _ in range(2))
        batch = Batch(
            tokens=torch.zeros(tokens, dtype=torch.int64),
            positions=torch.tensor([p for each in places for p in each]),
            starts=(0, 80, 81, 118),
            lengths=tuple(lengths),
            slots=torch.tensor(
                [int(tables[s, p // block]) * block + p % block for s, each in enumerate(places) for p in each]
            ),
            tables=tables,
            outputs=torch.arange(tokens),
            cache=cache,
        )
        answers.append(
            (backend.attention(q, k, v, batch, 0, window), cache.keys[0].nan_to_num(9), cache.values[0].nan_to_num(9))
        )
    (expected, *stored), (found, *written) = answers
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(one, other) for one, other in zip(stored, written, strict=True))


def test_attention_without_a_cache():
    batch = Batch.whole([list(range(50)), [1], list(range(7))])
    q, k, v = torch.randn(58, 4, 64), torch.randn(58, 2, 64), torch.randn(58, 2, 64)
    for window in (None, 5):
        expected = reference.attention(q, k, v, batch, 0, window)
        torch.testing.assert_close(native.attention(q, k, v, batch, 0, window), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_of_activations(dtype):
    x, weight = torch.randn(5, 48).to(dtype), torch.rand(48)
    found = native.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, reference.rms_norm(x, weight, 1e-5), atol=1e-2, rtol=1e-2)
    y, angles = torch.randn(5, 3, 16).to(dtype), torch.randn(5, 8)
    torch.testing.assert_close(
        native.rope(y, angles.cos(), angles.sin()), reference.rope(y, angles.cos(), angles.sin()), atol=1e-2, rtol=1e-2
    )


def test_two_callers_at_once():
    gate, up, down = weights("int4")
    x, ids, scores = torch.randn(8, 320), torch.randint(0, 4, (8, 1)), torch.rand(8, 1)
    expected = native.experts(x, gate, up, down, ids, scores)
    wrong = []

    def call():
        for _ in range(50):
            if not torch.equal(native.experts(x, gate, up, down, ids, scores), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_child_makes_its_own_threads():
    program = """
import os, torch
from moesaic import formats
from moesaic.ops import native
torch.set_num_threads(1)  # those of torch itself do not survive a fork
weight, x = formats.load("int4").pack(torch.randn(4096, 512)), torch.randn(40, 512)
expected = native.linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(native.linear(x, weight), expected) else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60).returncode == 0


def test_gradients_go_by_the_reference():
    from moesaic import ops

    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    ops.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and x.grad.any()
