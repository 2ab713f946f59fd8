"""Every backend against naive implementations, with caches poisoned by NaN; and the argument checks of ``ops``."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from moesaic import formats, ops, registry
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed, _rotation
from moesaic.ops import Batch, Cache, Group, reference
from tests.support import grouped
from tests.support.memory import resident

BACKENDS = registry.names("ops")


@pytest.fixture(params=BACKENDS)
def backend(request, device, monkeypatch):
    found = registry.load("ops", request.param)
    if why := found.why_not("rms_norm", device, None):
        pytest.skip(f"{request.param}: {why}")
    if hasattr(found, "_answer"):  # values that a kernel does not write are NaN
        monkeypatch.setattr(found, "_answer", lambda x, shape, dtype=None: poisoned(shape, dtype or x.dtype, x.device))
    return found


def poisoned(shape, dtype, device):
    return torch.full(shape, math.nan if dtype.is_floating_point else -1, dtype=dtype, device=device)


def rounded(x, backend, weight, entry=None):
    """Return activations [T, n] rounded as the backend rounds them for a weight, or for an entry of a stack.

    The CPU's kernels rotate and round to 8 bits for integer weights, with a scale for each 256 columns. For grouped
    weights, they round with a scale for each 32 columns in memory, and for bfloat16 to bfloat16.
    """
    if backend.__name__ != "moesaic.ops.native":
        return x
    if not weight.name.startswith(("int", "grouped")):
        return x.to(weight.format.dtype).float()
    if (order := weight.parts().get("order")) is not None:
        order = (order if entry is None else order[entry]).long()
        return rounded_columns(x[:, order], 32)[:, order.argsort()]
    return rounded_rotation(x) if weight.name.startswith("int") else rounded_columns(x, 32)


def multiplied(weight, backend, entry=None):
    """Return the plain weight, or an entry of it, that the backend multiplies with ``rounded`` activations.

    The kernels of integer weights also multiply the columns that fill up the last 64. They hold zeros, but a rotation
    spreads the errors of rounding over them, on both sides.
    """
    if backend.__name__ != "moesaic.ops.native" or not weight.name.startswith("int"):
        return weight.dequantize(index=entry)
    tiles = weight.tiles if entry is None else weight.tiles[entry]
    rows, columns = weight.shape[-2:]
    return weight.format.unpack({"tiles": tiles}, (rows, -(-columns // 64) * 64), torch.float32)


def rounded_rotation(x):
    """Return x [T, n] as it is after each 256 columns were rotated and rounded to 8 bits with one scale.

    The result has the columns that fill up the last 64.
    """
    pieces = []
    for part in x.split(256, dim=1):
        padded = torch.nn.functional.pad(part, (0, -part.shape[1] % 64))
        width = padded.shape[1]
        signs, sizes = _rotation._all_signs()[:width], [size for size in (256, 128, 64) if width & size]
        found = rounded_columns(hadamard(padded * signs, sizes), width).double()
        back = torch.cat([p / size for p, size in zip(found.split(sizes, dim=1), sizes, strict=True)], dim=1)
        pieces.append((hadamard(back, sizes) * signs).to(x.dtype))
    return torch.cat(pieces, dim=1)


def hadamard(x, sizes):
    """Return the parts of x [T, n] transformed by Hadamard matrices, with the sums in the order of the kernels."""
    parts = list(x.split(sizes, dim=1))
    for number, size in enumerate(sizes):
        for distance in (8, 4, 2, 1, 16, 32, 64, 128):
            if distance < size:
                a, b = parts[number].reshape(len(x), -1, 2, distance).unbind(2)
                parts[number] = torch.stack([a + b, a - b], dim=2).flatten(1)
    return torch.cat(parts, dim=1)


def rounded_columns(x, width):
    """Return x [T, n] rounded to 8 bits, with a scale for each ``width`` columns."""
    parts = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % width)).unflatten(1, (-1, width))
    size = parts.abs().amax(2, keepdim=True)
    # torch computes 127 / size as 127 times the rounded reciprocal.
    parts = (parts * torch.where(size > 0, torch.full_like(size, 127) / size, 0)).round() * (size / 127)
    return parts.flatten(1)[:, : x.shape[1]]


def skip_unless_read(backend, op, device, weight_format):
    if why := backend.why_not(op, device, weight_format):
        pytest.skip(f"{backend.__name__}: {why}")


def naive_attention(q, keys, values, positions, window):
    """Attention computed one query, one head and one score at a time."""
    out = torch.full_like(q, math.nan)
    heads, group = q.shape[1], q.shape[1] // keys.shape[1]
    for t, place in enumerate(positions):
        first = 0 if window is None else max(0, place - window + 1)
        for h in range(heads):
            scores = torch.stack([q[t, h] @ keys[p, h // group] for p in range(first, place + 1)]) / q.shape[2] ** 0.5
            weights = (scores - scores.max()).exp()
            weights = weights / weights.sum()
            out[t, h] = sum(w * values[p, h // group] for w, p in zip(weights, range(first, place + 1), strict=True))
    return out


def naive_int8(x):
    """Return x [tokens, heads, D] as an int8 cache returns it, computed one number at a time."""
    out = torch.full_like(x, math.nan)
    for row, to in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        most = max(abs(value) for value in row)
        for i, value in enumerate(row):
            to[i] = round(float(value * (torch.tensor(127.0) / most))) * (most / 127)
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_over_a_poisoned_cache(backend, heads, kv_heads, cache_dtype, block, window):
    """Three sequences, each computed in two steps of uneven size, through scattered blocks."""
    size, lengths, first = 6, [5, 1, 9], [3, 1, 4]
    needed = [-(-length // block) for length in lengths]
    order = torch.randperm(sum(needed) + 3).tolist()
    blocks = [[order.pop() for _ in range(count)] for count in needed]
    cache = Cache.zeros([(kv_heads, size)], sum(needed) + 3, block, cache_dtype)
    for part in cache.tensors():
        part.fill_(-128 if part.dtype == torch.int8 else math.nan)
    q, k, v = ([torch.randn(length, n, size) for length in lengths] for n in (heads, kv_heads, kv_heads))
    found = [[] for _ in lengths]
    for begin, end in (([0, 0, 0], first), (first, lengths)):
        chosen = [s for s in range(3) if end[s] > begin[s]]
        flat = [(s, p) for s in chosen for p in range(begin[s], end[s])]
        tables = torch.full((len(chosen), max(needed)), -1)
        for row, s in enumerate(chosen):
            tables[row, : needed[s]] = torch.tensor(blocks[s])
        counts = [end[s] - begin[s] for s in chosen]
        batch = Batch(
            tokens=torch.zeros(len(flat), dtype=torch.int64),
            positions=torch.tensor([p for _, p in flat]),
            starts=tuple(sum(counts[:i]) for i in range(len(counts) + 1)),
            lengths=tuple(end[s] for s in chosen),
            slots=torch.tensor([blocks[s][p // block] * block + p % block for s, p in flat]),
            tables=tables,
            outputs=torch.arange(len(flat)),
            cache=cache,
        )
        pick = lambda x: torch.cat([x[s][begin[s] : end[s]] for s in chosen])  # noqa: B023, E731
        out = backend.attention(pick(q), pick(k), pick(v), batch, 0, window)
        for s, part in zip(chosen, out.split(counts), strict=True):
            found[s].append(part)
    seen = naive_int8 if cache_dtype == torch.int8 else lambda x: x
    for s, length in enumerate(lengths):
        expected = naive_attention(q[s], seen(k[s]), seen(v[s]), range(length), window)
        torch.testing.assert_close(torch.cat(found[s]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize(
    ("bad", "cache_dtype"),
    # An infinite key in a float cache may give a score of -inf, hence weight 0 and a finite result.
    [(math.nan, torch.float32), (math.nan, torch.int8), (math.inf, torch.int8), (-math.inf, torch.int8)],
)
def test_non_finite_values_survive_the_cache(backend, bad, cache_dtype, which):
    """Only the sequence and the heads of the bad value are affected."""
    inputs = {"q": torch.randn(6, 4, 16), "k": torch.randn(6, 2, 16), "v": torch.randn(6, 2, 16)}
    inputs[which][2, 1, 5] = bad
    batch = Batch(
        tokens=torch.zeros(6, dtype=torch.int64),
        positions=torch.tensor([0, 1, 2, 0, 1, 2]),
        starts=(0, 3, 6),
        lengths=(3, 3),
        slots=torch.tensor([4, 5, 6, 0, 1, 2]),
        tables=torch.tensor([[1], [0]]),
        outputs=torch.arange(6),
        cache=Cache.zeros([(2, 16)], 2, 4, cache_dtype),
    )
    sound = backend.attention(inputs["q"], inputs["k"], inputs["v"], batch, 0, None).isfinite().all(-1)
    assert not sound[2, 2:].any()
    assert sound[3:].all() and sound[:, :2].all()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_cache_size_is_bytes_per_token(dtype, lazy):
    shapes = [(2, 8), (3, 16)]
    cache = Cache.zeros(shapes, 5, 4, dtype, lazy=lazy)
    assert sum(part.nbytes for part in cache.tensors()) == 5 * 4 * Cache.bytes_per_token(shapes, dtype)
    assert all(len(part) == 5 and not part.any() for part in cache.tensors())
    assert cache.block_size == 4


def test_a_lazy_cache_takes_memory_when_it_is_written():
    keys = Cache.zeros([(2, 64)], 1024, 16, torch.float32, lazy=True).keys[0]
    assert resident(keys) == 0
    keys[3] = 1
    assert 0 < resident(keys) <= keys.nbytes // 4  # pages may be large
    assert keys[3].all() and not keys[2].any()
    assert Cache.zeros([(2, 64)], 1, 16, torch.float32, "meta", lazy=True).keys[0].device.type == "meta"


@pytest.mark.parametrize("weight_format", [*registry.names("formats"), *grouped.KINDS[2:6:3], grouped.KINDS[-1]])
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "d", "f"),
    [(1, 4, 1, 24, 16), (7, 8, 2, 24, 16), (5, 3, 3, 300, 33), (64, 8, 2, 64, 320), (40, 2, 1, 33, 600)],
)
def test_experts(backend, device, weight_format, tokens, experts, k, d, f):
    skip_unless_read(backend, "experts", device, weight_format)
    packed = formats.load(weight_format)
    gate, up, down = (packed.pack(torch.randn(experts, *shape) / 4) for shape in ((f, d), (f, d), (d, f)))
    x = torch.randn(tokens, d)
    ids = torch.stack([torch.randperm(max(experts - 1, k))[:k] for _ in range(tokens)])  # the last expert gets no token
    scores = torch.rand(tokens, k)
    expected = torch.zeros(tokens, d)
    plain = [[multiplied(stack, backend, e) for stack in (gate, up, down)] for e in range(experts)]
    for t in range(tokens):
        for e, score in zip(ids[t].tolist(), scores[t], strict=True):
            g, u, w = plain[e]
            inner = g @ rounded(x[t : t + 1], backend, gate, e)[0]
            hidden = inner / (1 + (-inner).exp()) * (u @ rounded(x[t : t + 1], backend, up, e)[0])
            expected[t] += score * (w @ rounded(hidden[None], backend, down, e)[0])
    found = backend.experts(x, gate, up, down, ids, scores)
    # A few hidden values near a rounding boundary may be rounded differently.
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    if backend.__name__ == "moesaic.ops.reference" and not weight_format.startswith("int"):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_experts_gradients(backend):
    if backend.__name__ != "moesaic.ops.reference":
        pytest.skip("only the reference is differentiable")
    packed = formats.load("float32")
    stacks = [packed.pack(torch.randn(3, *shape).double().float()) for shape in ((4, 5), (4, 5), (5, 4))]
    for stack in stacks:
        stack.requires_grad_(True)
    x, scores = torch.randn(6, 5, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    ids = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [0, 1], [1, 0]])
    backend.experts(x, *stacks, ids, scores).square().sum().backward()
    with torch.no_grad():
        for tensor in (x, scores, *(stack.weight for stack in stacks)):
            place = tuple(0 for _ in tensor.shape)
            base, h = tensor[place].item(), 1e-2
            values = []
            for shift in (h, -h):
                tensor[place] = base + shift
                values.append(backend.experts(x, *stacks, ids, scores).square().sum().item())
            tensor[place] = base
            slope = (values[0] - values[1]) / (2 * h)
            assert tensor.grad[place].item() == pytest.approx(slope, rel=0.05, abs=0.05)


@pytest.mark.parametrize("weight_format", [*registry.names("formats"), *grouped.TEXTS])
@pytest.mark.parametrize(
    ("tokens", "inp", "out"),
    [(1, 8, 3), (5, 33, 17), (64, 64, 128), (2, 4096, 40), (3, 320, 31), (4, 256, 32), (13, 700, 65), (300, 128, 33)],
)
def test_linear(backend, device, weight_format, tokens, inp, out):
    skip_unless_read(backend, "linear", device, weight_format)
    weight = formats.load(weight_format).pack(torch.randn(out, inp))
    x = torch.randn(tokens, inp)
    plain = multiplied(weight, backend).double()
    expected = torch.stack([(plain * row).sum(-1) for row in rounded(x, backend, weight).double()])
    atol = 2e-2 if "nf4" in weight_format else 1e-3  # kernels round the levels of NF4 to 14 bits
    torch.testing.assert_close(backend.linear(x, weight).double(), expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", [*registry.names("formats"), *grouped.TEXTS])
@pytest.mark.parametrize(("rows", "columns"), [(70, 40), (33, 576), (40, 1024)])
def test_an_embedding_has_the_rows_of_the_plain_weight(backend, device, weight_format, rows, columns, dtype):
    skip_unless_read(backend, "embedding", device, weight_format)
    weight = formats.load(weight_format).pack(torch.randn(rows, columns))
    ids = torch.tensor([rows - 1, 0, 17, 31, 32, 17])
    expected = weight.dequantize(torch.float32)[ids].to(dtype)
    atol = 1e-3 if "nf4" in weight_format else 1e-5  # kernels round the levels of NF4 to 14 bits
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(backend.embedding(ids, weight, dtype), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("bad", [-1, 70, 2**40])
@pytest.mark.parametrize("weight_format", ["int4", "float32"])
def test_rows_out_of_range_are_refused(device, weight_format, bad):
    weight = formats.load(weight_format).pack(torch.randn(70, 40))
    if ops.chosen("embedding", device, weight_format) == "triton":
        pytest.skip("the rows are NaN: a check would wait for the device")
    with pytest.raises(InvalidParameter, match="ids: an id is out of range: there are 70 rows"):
        ops.embedding(torch.tensor([0, bad], device=device), weight, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "experts", "k"), [(32, 8, 2), (33, 3, 3), (100, 40, 7), (5, 1, 1)])
def test_route_takes_the_largest_logits(backend, dtype, size, experts, k):
    x, weight = torch.randn(9, size).to(dtype), torch.randn(experts, size)
    ids, scores = backend.route(x, weight, k)
    for row, chosen, found in zip(x.double() @ weight.double().T, ids.tolist(), scores, strict=True):
        assert chosen == sorted(range(experts), key=lambda e: -row[e])[:k]
        torch.testing.assert_close(found, row[chosen].softmax(0).float(), atol=1e-5, rtol=1e-4)
    assert ids.dtype == torch.int64 and scores.dtype == torch.float32


def test_route_gives_valid_experts_for_nan(backend):
    ids, scores = backend.route(torch.full((2, 8), math.nan), torch.randn(4, 8), 2)
    assert all(0 <= a < 4 and 0 <= b < 4 and a != b for a, b in ids.tolist())
    assert scores.isnan().all()


def test_rotary_angles_are_positions_times_frequencies(backend):
    frequencies, positions = torch.rand(7), torch.tensor([0, 1, 3, 4000, 131071])
    cos, sin = backend.rotary(frequencies, positions)
    for t, position in enumerate(positions.tolist()):
        angles = (frequencies * float(position)).tolist()
        torch.testing.assert_close(cos[t], torch.tensor([math.cos(angle) for angle in angles]), atol=1e-6, rtol=0)
        torch.testing.assert_close(sin[t], torch.tensor([math.sin(angle) for angle in angles]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (40, 700)])
def test_add_rounds_once(backend, dtype, shape):
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    found = backend.add(x, y)
    assert found.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(found, x + y, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(found, (x.float() + y.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (40, 700)])
def test_swiglu(backend, dtype, shape):
    gate, up = (10 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    expected = torch.tensor(
        [g / (1 + math.exp(-g)) * u for g, u in zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)]
    )
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(backend.swiglu(gate, up).float().flatten(), expected, atol=1e-5, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 16, 33, 700])
def test_finite_finds_every_bad_value(backend, dtype, size):
    x = (torch.randn(7, size) * 1e4).to(dtype)
    x[2, 0], x[4, size // 2], x[6, -1] = math.nan, math.inf, -math.inf
    assert backend.finite(x).tolist() == [True, True, False, True, False, True, False]


@pytest.mark.parametrize("size", [1, 16, 33, 700])
def test_argmax_finds_the_largest(backend, size):
    x = torch.randn(5, size)
    x[0], x[1, -1], x[2, 0], x[3] = -math.inf, 9, 9, -math.inf
    x[3, size // 2] = -1e30
    assert backend.argmax(x)[1:].tolist() == [size - 1, 0, size // 2, int(x[4].double().argmax())]
    assert 0 <= backend.argmax(x)[0] < size


def test_linear_answers_in_the_dtype_that_is_asked_for(backend, device):
    weight = formats.load("bfloat16").pack(torch.randn(17, 64))
    x = torch.randn(3, 64).bfloat16()
    exact = x.double() @ weight.dequantize(torch.float64).T
    wide = backend.linear(x, weight, torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact, atol=5e-2, rtol=1e-2)
    assert backend.linear(x, weight).dtype == torch.bfloat16


def test_rms_norm(backend):
    x, weight = torch.randn(5, 33), torch.rand(33)
    expected = torch.stack([row / math.sqrt((row.double() ** 2).mean() + 1e-5) * weight for row in x])
    torch.testing.assert_close(backend.rms_norm(x, weight, 1e-5), expected, atol=1e-5, rtol=1e-5)


def test_rope_rotates_each_pair_by_its_angle(backend):
    x, angles = torch.randn(4, 2, 6), torch.randn(4, 3)
    found = backend.rope(x, angles.cos(), angles.sin())
    for t in range(4):
        for i in range(3):
            pair = torch.complex(x[t, :, i], x[t, :, i + 3])
            turned = pair * torch.polar(torch.tensor(1.0), angles[t, i])
            torch.testing.assert_close(found[t, :, i], turned.real, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[t, :, i + 3], turned.imag, atol=1e-5, rtol=1e-5)


def test_the_choice_of_backend_is_explained():
    for op in ops.OPS:
        reasons = ops.explain(op, "cpu", "float32")
        assert list(reasons)[-1] == "reference"
        assert reasons["reference"] is None


def test_a_group_must_divide_evenly():
    assert Group(1, 4).share(8, "heads") == slice(2, 4)
    with pytest.raises(Exception, match="3 ranks do not divide 8 heads"):
        Group(0, 3).share(8, "heads")


def packed_experts(gate="int4", up="int4", down="int4", experts=4, d=64, f=96):
    shapes = ((gate, (f, d)), (up, (f, d)), (down, (d, f)))
    return [formats.load(name).pack(torch.randn(experts, *shape) / 8) for name, shape in shapes]


@pytest.mark.parametrize(
    "names",
    [("int4", "int4", "int8"), ("int4", "bfloat16", "int4"), ("int2", "int8", "int8"), ("float32", "int4", "int3")],
)
def test_experts_read_each_matrix_in_its_own_format(device, names):
    stacks = packed_experts(*names)
    x, scores = torch.randn(5, 64), torch.rand(5, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    plain = [formats.load("float32").pack(stack.dequantize()) for stack in stacks]
    expected = reference.experts(x, *plain, ids, scores)
    torch.testing.assert_close(ops.experts(x, *stacks, ids, scores), expected)


def test_native_experts_read_each_matrix_in_its_own_grouping(device):
    """Files of mixed types, such as Q4_K_M, hold the matrices of one layer in several types."""
    names = tuple(grouped.FILE_TYPES[kind] for kind in ("Q4_K", "NF4", "Q6_K"))
    if ops.chosen("experts", device, grouped.TEXTS[0]) == "reference":
        pytest.skip("the reference reads any mix")
    assert ops.chosen("experts", device, names) == "native"
    gate, up, down = packed_experts(*names, d=320)
    x, scores = torch.randn(5, 320), torch.rand(5, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    expected = reference.experts(x, gate, up, down, ids, scores)
    assert (ops.experts(x, gate, up, down, ids, scores) - expected).norm() < 0.02 * expected.norm()


def test_mixed_formats_show_in_the_choice_of_backend():
    mixed = ("int4", "int4", "int8")
    assert ops.chosen("experts", "cpu", mixed) == "reference"
    why = ops.explain("experts", "cpu", mixed)["native"]
    assert why is not None
    if ops.chosen("experts", "cpu", "int4") == "native":
        assert why == "it needs one format for gate, up and down, not int4, int4, int8"


@pytest.mark.parametrize("ids", [[[0, 4]], [[-1, 0]], [[2**40, 1]]])
@pytest.mark.parametrize("down", ["int4", "int8"])  # with int8, the formats are mixed
def test_expert_ids_out_of_range_are_refused(device, ids, down):
    stacks = packed_experts(down=down)
    if ops.chosen("experts", device, (stacks[0].name, stacks[1].name, stacks[2].name)) == "triton":
        pytest.skip("the results are NaN: a check would wait for the device")
    with pytest.raises(InvalidParameter, match="ids: an id is out of range: there are 4 experts"):
        ops.experts(torch.randn(1, 64), *stacks, torch.tensor(ids), torch.rand(1, 2))


def test_linear_refuses_arguments_that_do_not_fit(device):
    weight = formats.load("int8").pack(torch.randn(8, 64))
    with pytest.raises(
        InvalidParameter, match=r"x: has shape \(3, 128\), expected \[T, in\] for a weight of shape \(8, 64\)"
    ):
        ops.linear(torch.randn(3, 128), weight)
    with pytest.raises(InvalidParameter, match=r"x: has shape \(64,\)"):
        ops.linear(torch.randn(64), weight)
    with pytest.raises(InvalidParameter, match=r"x: is torch.int64, expected a floating-point dtype"):
        ops.linear(torch.ones(3, 64, dtype=torch.int64), weight)
    with pytest.raises(InvalidParameter, match=f"weight: is on {weight.device}, but x is on meta"):
        ops.linear(torch.randn(3, 64, device="meta"), weight)
    with pytest.raises(InvalidParameter, match="weight: is on meta"):
        ops.linear(torch.randn(3, 64), formats.load("int8").empty((8, 64), device="meta"))


def test_experts_refuse_arguments_that_do_not_fit(device):
    gate, up, down = packed_experts()
    x, ids, scores = torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int64), torch.rand(3, 1)
    for change in (
        {"x": torch.randn(3, 96)},
        {"x": torch.randn(2, 64)},
        {"x": torch.ones(3, 64, dtype=torch.int32)},
        {"x": torch.randn(3, 64, device="meta")},
        {"ids": ids.int()},
        {"ids": ids.expand(3, 2)},
        {"scores": ids},
        {"gate": down},
        {"down": up},
        {"up": packed_experts(experts=5)[1]},
    ):
        arguments = {"x": x, "gate": gate, "up": up, "down": down, "ids": ids, "scores": scores} | change
        with pytest.raises(InvalidParameter):
            ops.experts(**arguments)


def test_attention_refuses_arguments_that_do_not_fit(device):
    batch = Batch.whole([[1, 2, 3]], device)
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    cached = dataclasses.replace(
        batch, slots=torch.arange(3), tables=torch.tensor([[0]]), cache=Cache.zeros([(4, 8)], 1, 4, torch.float32)
    )
    for arguments in (
        (q, torch.randn(2, 2, 8), torch.randn(2, 2, 8), batch),
        (q, torch.randn(3, 3, 8), torch.randn(3, 3, 8), batch),
        (q, k, torch.randn(3, 2, 4), batch),
        (q, k.bfloat16(), k.bfloat16(), batch),
        (q[:2], k[:2], k[:2], batch),
        (q, k, k.to("meta"), batch),
        (q, k, k, cached),
    ):
        with pytest.raises(InvalidParameter):
            ops.attention(*arguments, 0, None)


def test_small_ops_refuse_arguments_that_do_not_fit(device):
    x = torch.randn(3, 2, 8)
    for call in (
        lambda: ops.rms_norm(torch.randn(3, 8), torch.ones(9), 1e-5),
        lambda: ops.rms_norm(torch.randn(3, 8), torch.ones(8, device="meta"), 1e-5),
        lambda: ops.rope(x, torch.ones(3, 8), torch.ones(3, 8)),
        lambda: ops.route(torch.randn(3, 8), torch.randn(4, 9), 2),
        lambda: ops.route(torch.randn(3, 8), torch.randn(4, 8), 5),
        lambda: ops.route(torch.randn(3, 8), torch.randn(4, 8).bfloat16(), 2),
        lambda: ops.rotary(torch.ones(4), torch.ones(3)),
        lambda: ops.add(torch.randn(3, 8), torch.randn(3, 9)),
        lambda: ops.add(torch.randn(3, 8), torch.randn(3, 8).bfloat16()),
        lambda: ops.swiglu(torch.randn(3, 8), torch.randn(3, 9)),
        lambda: ops.embedding(torch.ones(3), formats.load("int4").pack(torch.randn(4, 8)), torch.float32),
        lambda: ops.rope(x, torch.ones(2, 4), torch.ones(2, 4)),
        lambda: ops.truncate(torch.randn(3, 9), torch.ones(2, 5)),
        lambda: ops.draw(torch.randn(3, 9), torch.ones(2, dtype=torch.float64)),
    ):
        with pytest.raises(InvalidParameter):
            call()


def test_a_weight_refuses_parts_of_another_layout():
    int4 = formats.load("int4").pack(torch.randn(40, 300))
    tiles = int4.tiles.data
    for parts in ({"weight": tiles}, {"tiles": tiles[:1]}, {"tiles": tiles.to(torch.int16)}):
        with pytest.raises(InvalidParameter, match="weight: int4"):
            Packed(formats.load("int4"), (40, 300), parts)
    with pytest.raises(InvalidParameter, match=r"plain"):
        ops.quantize(int4, torch.randn(300, 40))
    with pytest.raises(InvalidParameter, match="weight: int4 part 'tiles'"):
        int4.tiles = torch.nn.Parameter(tiles[:, :-1], requires_grad=False)
    with pytest.raises(InvalidParameter, match="weight: bfloat16 part 'weight'"):
        formats.load("bfloat16").pack(torch.randn(4, 8)).float()


def test_a_transposed_weight_is_packed_contiguously(backend, device):
    skip_unless_read(backend, "linear", device, "bfloat16")
    plain, x = torch.randn(64, 32).bfloat16(), torch.randn(3, 64).bfloat16()
    weight = formats.load("bfloat16").pack(plain.T)
    torch.testing.assert_close(backend.linear(x, weight), x @ plain, atol=0.1, rtol=0.02)
