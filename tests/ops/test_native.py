"""The compiled kernels: bits that do not depend on the batch, the threads or the instruction set."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from moesaic import formats, registry
from moesaic.formats import Packed, _rotation
from moesaic.ops import Batch, Cache, _grouping, native, reference
from tests.support import grouped
from tests.support.require import require

require(shutil.which("c++") or not native.why_not("linear", "cpu", "int4"), "no C++ compiler is installed")

FORMATS = sorted(native.formats())
INTEGERS = [name for name in FORMATS if name.startswith("int")]
EXACT = [*INTEGERS, *grouped.TEXTS]
"""Formats whose results are the same bits on every instruction set."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def on_cpu(device):
    if device != "cpu":
        pytest.skip("these kernels run on the CPU only")


@pytest.fixture(autouse=True)
def restore_settings():
    isa = native.instruction_set()
    yield
    native.use_instruction_set(isa)
    native.set_threads(len(os.sched_getaffinity(0)))


def weights(weight_format, experts=4, d=320, f=200):
    packed = formats.load(weight_format)
    return [packed.pack(torch.randn(experts, *shape) / 8) for shape in ((f, d), (f, d), (d, f))]


@pytest.mark.parametrize("weight_format", [*FORMATS, *grouped.KINDS[1:]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_bits_do_not_depend_on_the_batch(weight_format, dtype):
    weight = formats.load(weight_format).pack(torch.randn(70, 900))
    x = torch.randn(61, 900).to(dtype)
    together = native.linear(x, weight)
    assert together.dtype == dtype and together.isfinite().all()
    for count in (1, 2, 3, 4, 5, 12, 13, 25):
        for begin in range(0, 61 - count, 17):
            assert torch.equal(native.linear(x[begin : begin + count], weight), together[begin : begin + count])


@pytest.mark.parametrize("weight_format", [*FORMATS, *grouped.KINDS[1:]])
def test_experts_bits_do_not_depend_on_the_batch(weight_format):
    gate, up, down = weights(weight_format)
    x, scores = torch.randn(50, 320), torch.rand(50, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(50)])
    together = native.experts(x, gate, up, down, ids, scores)
    for begin, end in ((0, 1), (3, 5), (10, 31), (7, 50)):
        part = slice(begin, end)
        assert torch.equal(native.experts(x[part], gate, up, down, ids[part], scores[part]), together[part])


@pytest.mark.parametrize("weight_format", EXACT)
def test_experts_bits_do_not_depend_on_isa_or_threads(weight_format):
    gate, up, down = weights(weight_format)
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


@pytest.mark.parametrize("weight_format", grouped.TEXTS)
def test_a_grouped_weight_equals_its_plain_weight_times_rounded_activations(weight_format):
    """Every instruction set, with activations that 8 bits hold exactly: a scale of 1 for each 32 columns in memory."""
    weight = formats.load(weight_format).pack(torch.randn(70, 400))
    x = torch.randint(-126, 127, (27, 400)).float()
    x[:, weight.parts().get("order", torch.arange(400))[::16].long()] = 127
    expected = x.double() @ weight.dequantize().double().T
    for isa in native.INSTRUCTION_SETS:
        if native.use_instruction_set(isa):
            error = native.linear(x, weight).double() - expected
            assert error.norm() <= (2e-4 if "nf4" in weight_format else 1e-6) * expected.norm()


@pytest.mark.parametrize("weight_format", INTEGERS)
def test_an_integer_weight_equals_its_plain_weight_times_rounded_activations(weight_format):
    """Every instruction set and kernel, with activations whose rotation 8 bits hold exactly, so that the scale is 1."""
    columns = 256 + 192
    weight = formats.load(weight_format).pack(torch.randn(70, columns))
    rotated = torch.randint(-126, 127, (27, columns)).float()
    rotated[:, ::64] = 127
    x = torch.cat([_rotation.restore_weights(part / 64) for part in rotated.split(256, dim=1)], dim=1)
    for begin, end in ((0, 256), (256, 384), (384, 448)):  # each Hadamard matrix, divided by its size
        x[:, begin:end] *= 64 / (end - begin)
    expected = x.double() @ weight.dequantize().double().T
    for isa in native.INSTRUCTION_SETS:
        if native.use_instruction_set(isa):
            for tokens in (1, 2, 3, 27):
                error = native.linear(x[:tokens], weight).double() - expected[:tokens]
                assert error.norm() <= 1e-6 * expected[:tokens].norm()


@pytest.mark.parametrize("weight_format", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_bytes_are_those_of_the_reference_on_every_isa(weight_format, dtype):
    """Columns and rows fill no block, superblock or vector. The reference rotates in another order of sums, so that a
    weight between two levels may get the other one."""
    for rows, columns in ((70, 600), (33, 64), (5, 450)):
        plain = torch.randn(rows, columns).to(dtype)
        plain[:, 17] *= 50
        plain[2] = 0
        expected = formats.load(weight_format).empty((rows, columns))
        reference.quantize(expected, plain)
        results = []
        for isa in native.INSTRUCTION_SETS:
            if native.use_instruction_set(isa):
                packed = formats.load(weight_format).empty((rows, columns))
                packed.tiles.data.fill_(255)
                native.quantize(packed, plain)
                results.append(packed)
        assert all(torch.equal(packed.tiles, results[0].tiles) for packed in results)
        assert (results[0].tiles != expected.tiles).float().mean() < 1e-3
        errors = [(packed.dequantize() - plain.float()).norm() for packed in (results[0], expected)]
        torch.testing.assert_close(*errors, rtol=1e-3, atol=0)


def test_quantize_overwrites_one_entry_or_all():
    plain, stack = torch.randn(3, 40, 70), formats.load("int4").pack(torch.zeros(3, 40, 70))
    native.quantize(stack, plain[1].T.contiguous().T, 1)  # the columns are not contiguous
    assert not stack.dequantize(index=0).any() and not stack.dequantize(index=2).any()
    native.quantize(stack, plain)
    assert torch.equal(stack.tiles, formats.load("int4").pack(plain).tiles)


SORTED = formats.load("grouped:group=32:offset=zero")


def in_order(columns: Packed, order: torch.Tensor) -> Packed:
    """Return a weight whose columns ``order`` are those of ``columns``, a weight in the format ``SORTED``."""
    weight_format = dataclasses.replace(SORTED, order="act")
    return Packed(weight_format, columns.shape, {**columns.parts(), "order": order.int()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_act_order_gives_the_bits_of_sorted_columns(dtype):
    order, columns = torch.randperm(900), SORTED.pack(torch.randn(70, 900))
    weight = in_order(columns, order)
    assert torch.equal(weight.dequantize()[:, order], columns.dequantize())
    for tokens in (1, 7, 40):
        x = torch.randn(tokens, 900).to(dtype)
        assert torch.equal(native.linear(x, weight), native.linear(x[:, order], columns))


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("ordered", ["all", "gate and up", "down"])
def test_experts_in_act_order_give_the_bits_of_sorted_columns(ordered, tokens):
    """Down may have an order for each expert: the rows of gate and up are sorted in the same way."""
    plain = [torch.randn(4, *shape) / 8 for shape in ((200, 320), (200, 320), (320, 200))]
    inputs = torch.randperm(320) if ordered != "down" else torch.arange(320)
    hidden = torch.stack([torch.randperm(200) if ordered != "gate and up" else torch.arange(200) for _ in range(4)])
    gate, up, down = (SORTED.pack(weight) for weight in plain)
    sorted_stacks = [
        SORTED.pack(torch.stack([weight[rows] for weight, rows in zip(stack, hidden, strict=True)]))
        for stack in plain[:2]
    ]
    if ordered != "down":
        gate, up = (in_order(stack, inputs.expand(4, -1)) for stack in (gate, up))
    ordered_down = down if ordered == "gate and up" else in_order(down, hidden)
    x, scores = torch.randn(tokens, 320), torch.rand(tokens, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    found = native.experts(x, gate, up, ordered_down, ids, scores)
    assert torch.equal(found, native.experts(x[:, inputs], *sorted_stacks, down, ids, scores))


def test_gate_and_up_may_have_different_orders():
    plain = [torch.randn(4, *shape) / 8 for shape in ((200, 320), (200, 320), (320, 200))]
    stacks = [SORTED.pack(weight) for weight in plain]
    for number in (0, 1):
        order = torch.stack([torch.randperm(320) for _ in range(4)])
        stacks[number] = in_order(stacks[number], order)
        x, scores, ids = torch.randn(9, 320), torch.rand(9, 2), torch.tensor([[3, 1]]).expand(9, 2)
        found, exact = (backend.experts(x, *stacks, ids, scores) for backend in (native, reference))
        assert (found - exact).norm() <= 0.03 * exact.norm()


def test_a_damaged_order_reads_no_other_memory():
    weight = in_order(SORTED.pack(torch.randn(70, 320)), torch.full((320,), -(1 << 31)))
    with torch.no_grad():
        weight.order[::2] = (1 << 31) - 1
    assert torch.equal(native.linear(torch.zeros(3, 320), weight), torch.zeros(3, 70))


def test_byte_tables_hold_levels_within_14_bits():
    for levels in formats.grouped.TABLES.values():
        tables = _grouping.byte_tables(levels)
        found = [sum(entries[code] * step for entries, step in tables) for code in range(16)]
        assert all(-128 <= entry <= 127 for entries, _ in tables for entry in entries)
        error = max(abs(one - other) for one, other in zip(found, levels, strict=True))
        assert error <= 6.2e-5 * max(map(abs, levels))
        assert len(tables) == 1 or all(max(entries) - min(entries) < 128 for entries, _ in tables)
    assert len(_grouping.byte_tables(formats.grouped.TABLES["mxfp4"])) == 1


@pytest.mark.parametrize("weight_format", ["int4", "grouped", "grouped:bits=8:offset=value"])
def test_nan_and_infinity_affect_only_their_token(weight_format):
    weight = formats.load(weight_format).pack(torch.randn(40, 300))
    x = torch.randn(20, 300)
    clean = native.linear(x, weight)
    x[3, 7], x[11, 299] = math.nan, math.inf
    found = native.linear(x, weight)
    assert not found[3].isfinite().any() and not found[11].isfinite().any()
    others = [t for t in range(20) if t not in (3, 11)]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("weight_format", ["int4", "grouped", "grouped:offset=value"])
def test_zero_weights_and_zero_activations(weight_format):
    weight = formats.load(weight_format).pack(torch.zeros(40, 300))
    assert not native.linear(torch.randn(3, 300), weight).any()
    weight = formats.load(weight_format).pack(torch.randn(40, 300))
    assert not native.linear(torch.zeros(3, 300), weight).any()


def stepwise(backend, cuts, q, k, v, cache_dtype, window, block=16):
    """Attention in steps up to the lengths in ``cuts``, in scattered blocks of a poisoned cache.

    q, k and v are lists with one tensor per complete sequence. Return the output of each sequence, and the cache.
    """
    needed = [-(-len(each) // block) for each in q]
    blocks = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(2)).split([*needed, 2])
    tables = torch.full((len(q), max(needed) + 1), -1)
    for table, mine in zip(tables, blocks, strict=False):
        table[: len(mine)] = mine
    cache = Cache.zeros([tuple(k[0].shape[1:])], sum(needed) + 2, block, cache_dtype)
    for part in cache.tensors():
        part.fill_(-128 if part.dtype == torch.int8 else math.nan)
    out, done = [[] for _ in q], [0] * len(q)
    for lengths in cuts:
        chosen = [s for s, length in enumerate(lengths) if length > done[s]]
        parts = [slice(done[s], lengths[s]) for s in chosen]
        counts = [part.stop - part.start for part in parts]
        at = [torch.arange(part.start, part.stop) for part in parts]
        batch = Batch(
            tokens=torch.zeros(sum(counts), dtype=torch.int64),
            positions=torch.cat(at),
            starts=tuple(sum(counts[:i]) for i in range(len(counts) + 1)),
            lengths=tuple(lengths[s] for s in chosen),
            slots=torch.cat([tables[s][p // block] * block + p % block for s, p in zip(chosen, at, strict=True)]),
            tables=tables[chosen],
            outputs=torch.arange(sum(counts)),
            cache=cache,
        )
        pick = lambda x: torch.cat([x[s][part] for s, part in zip(chosen, parts, strict=True)])  # noqa: B023, E731
        found = backend.attention(pick(q), pick(k), pick(v), batch, 0, window).split(counts)
        for s, part in zip(chosen, found, strict=True):
            out[s].append(part)
        done = lengths
    return [torch.cat(parts) for parts in out], cache


def drawn(lengths, heads, kv_heads, size, dtype=torch.float32):
    torch.manual_seed(1)
    return [[torch.randn(length, n, size).to(dtype) for length in lengths] for n in (heads, kv_heads, kv_heads)]


CACHES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
HEADS = [(8, 2, 128), (4, 4, 64), (3, 1, 40), (8, 1, 96), (6, 2, 33), (20, 1, 64)]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_attention_equals_the_reference_for_prefill_and_decode(heads, kv_heads, size, cache_dtype, window):
    """A long prompt in two chunks beside a decoding sequence, in scattered blocks of a poisoned cache."""
    cuts = [[70, 89, 0], [150, 90, 37]]
    inputs = drawn(cuts[-1], heads, kv_heads, size)
    expected, stored = stepwise(reference, cuts, *inputs, cache_dtype, window)
    found, written = stepwise(native, cuts, *inputs, cache_dtype, window)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    for one, other in zip(written.tensors(), stored.tensors(), strict=True):
        assert torch.equal(one.nan_to_num(9), other.nan_to_num(9))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "cache_dtype"), [(8, 2, 64, torch.int8), (3, 1, 40, torch.bfloat16)]
)
def test_attention_bits_do_not_depend_on_chunks_batch_or_threads(heads, kv_heads, size, cache_dtype):
    lengths = [1040, 530, 3]
    inputs = drawn(lengths, heads, kv_heads, size, torch.bfloat16)
    for window in (None, 600):
        expected, _ = stepwise(reference, [lengths], *inputs, cache_dtype, window)
        whole, _ = stepwise(native, [lengths], *inputs, cache_dtype, window)
        for one, other in zip(whole, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
        for threads, cuts in (
            (1, [[1038, 0, 0], [1039, 529, 2], lengths]),
            (3, [[20, 513, 3], [1030, 513, 3], [1033, 530, 3], [1039, 530, 3], lengths]),
        ):
            native.set_threads(threads)
            found, _ = stepwise(native, cuts, *inputs, cache_dtype, window, block=7)
            assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_attention_bits_do_not_depend_on_the_isa():
    cuts = [[70, 69, 0], [75, 70, 37]]
    for heads, kv_heads, size in HEADS[2:5]:
        inputs = drawn(cuts[-1], heads, kv_heads, size)
        for cache_dtype in (torch.bfloat16, torch.int8):
            answers = []
            for isa in native.INSTRUCTION_SETS:
                if native.use_instruction_set(isa):
                    found, cache = stepwise(native, cuts, *inputs, cache_dtype, 40)
                    answers.append((*found, *(part.nan_to_num(9) for part in cache.tensors())))
            for answer in answers[1:]:
                assert all(torch.equal(one, other) for one, other in zip(answer, answers[0], strict=True))


def test_int8_cache_is_rounded_like_the_reference():
    """Rows of zeros, of tiny and huge numbers, of exact halves, and with non-finite values."""
    rows = torch.randn(12, 2, 40) * torch.logspace(-45, 37, 12)[:, None, None]
    rows[3] = 0
    rows[4, 0] = torch.arange(40) - 20.5
    rows[4, 0, 7] = 127
    rows[5, 1, 39], rows[6, 0, 0], rows[7, 1, 12] = math.nan, math.inf, -math.inf
    _, stored = stepwise(reference, [[12]], [rows], [rows], [rows], torch.int8, None)
    _, written = stepwise(native, [[12]], [rows], [rows], [rows], torch.int8, None)
    for one, other in zip(written.tensors(), stored.tensors(), strict=True):
        assert torch.equal(one.nan_to_num(9), other.nan_to_num(9))
        if one.dtype != torch.int8:
            unwritten = 3 * 16 - 12
            assert int(one.isnan().sum()) == unwritten * 2 + 3


def test_attention_without_a_cache():
    batch = Batch.whole([list(range(50)), [1], list(range(7))])
    q, k, v = torch.randn(58, 4, 64), torch.randn(58, 2, 64), torch.randn(58, 2, 64)
    for window in (None, 5):
        expected = reference.attention(q, k, v, batch, 0, window)
        torch.testing.assert_close(native.attention(q, k, v, batch, 0, window), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norm_and_rope_support_other_dtypes(dtype):
    x, weight = torch.randn(5, 48).to(dtype), torch.rand(48)
    found = native.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, reference.rms_norm(x, weight, 1e-5), atol=1e-2, rtol=1e-2)
    y, angles = torch.randn(5, 3, 16).to(dtype), torch.randn(5, 8)
    torch.testing.assert_close(
        native.rope(y, angles.cos(), angles.sin()), reference.rope(y, angles.cos(), angles.sin()), atol=1e-2, rtol=1e-2
    )


def test_concurrent_callers():
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


def test_a_forked_child_starts_its_own_threads():
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


def test_gradients_use_the_reference_backend():
    from moesaic import ops

    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    ops.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_every_compiled_format_has_a_header_and_a_python_format():
    headers = {path.stem for path in (ROOT / "csrc" / "formats").glob("*.h")}
    assert set(native.formats()) == headers
    assert headers <= set(registry.names("formats"))
