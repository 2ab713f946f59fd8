"""Every backend against a naive twin that a person can check by eye; caches poisoned with NaN."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic import formats, ops, registry
from moesaic.ops import Batch, Cache, Group

BACKENDS = registry.names("ops")


@pytest.fixture(params=BACKENDS)
def backend(request, device, monkeypatch):
    found = registry.load("ops", request.param)
    if why := found.why_not("rms_norm", device, None):
        pytest.skip(f"{request.param}: {why}")
    if hasattr(found, "_answer"):  # what a kernel forgets to write is NaN
        monkeypatch.setattr(
            found, "_answer", lambda x, shape: torch.full(shape, math.nan, dtype=x.dtype, device=x.device)
        )
    return found


def rounded(x, backend, format):
    """Return activations [T, n] as the backend multiplies them with weights of this format.

    With whole-numbered weights, kernels round them to 8 bits, with a scale for each 256 columns; with
    bfloat16 weights to bfloat16.
    """
    if backend.__name__ == "moesaic.ops.reference":
        return x
    if not format.startswith("int"):
        return x.to(formats.load(format).dtype).float()
    parts = []
    for part in x.float().split(256, dim=1):
        size = part.abs().amax(1, keepdim=True)
        # Not 127 / size, which torch computes as 127 times the rounded reciprocal.
        parts.append((part * torch.where(size > 0, torch.full_like(size, 127) / size, 0)).round() * (size / 127))
    return torch.cat(parts, dim=1)


def skip_unless_read(backend, op, device, format):
    if why := backend.why_not(op, device, format):
        pytest.skip(f"{backend.__name__}: {why}")


def naive_attention(q, keys, values, positions, window):
    """One query, one head, one score at a time."""
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
    """Each head of x [tokens, heads, D] as an int8 cache gives it back, one number at a time."""
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
    # Infinity in a key of a float cache gives scores of infinity, and these may be negative: no weight, which is sound.
    [(math.nan, torch.float32), (math.nan, torch.int8), (math.inf, torch.int8), (-math.inf, torch.int8)],
)
def test_what_is_not_finite_comes_out_of_the_cache_again(backend, bad, cache_dtype, which):
    """And only in the sequence, and the heads, that it belongs to."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_cache_takes_what_it_says(dtype):
    shapes = [(2, 8), (3, 16)]
    cache = Cache.zeros(shapes, 5, 4, dtype)
    assert sum(part.nbytes for part in cache.tensors()) == 5 * 4 * Cache.bytes_per_token(shapes, dtype)
    assert all(len(part) == 5 and not part.any() for part in cache.tensors())
    assert cache.block_size == 4


@pytest.mark.parametrize("format", registry.names("formats"))
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "d", "f"),
    [(1, 4, 1, 24, 16), (7, 8, 2, 24, 16), (5, 3, 3, 300, 33), (64, 8, 2, 64, 320), (40, 2, 1, 33, 600)],
)
def test_experts(backend, device, format, tokens, experts, k, d, f):
    skip_unless_read(backend, "experts", device, format)
    packed = formats.load(format)
    gate, up, down = (packed.pack(torch.randn(experts, *shape) / 4) for shape in ((f, d), (f, d), (d, f)))
    x = torch.randn(tokens, d)
    ids = torch.stack([torch.randperm(max(experts - 1, k))[:k] for _ in range(tokens)])  # the last one stays empty
    scores = torch.rand(tokens, k)
    expected = torch.zeros(tokens, d)
    sent = rounded(x, backend, format)
    for t in range(tokens):
        for e, score in zip(ids[t].tolist(), scores[t], strict=True):
            g, u, w = (stack.dequantize(index=e) for stack in (gate, up, down))
            inner = g @ sent[t]
            hidden = inner / (1 + (-inner).exp()) * (u @ sent[t])
            expected[t] += score * (w @ rounded(hidden[None], backend, format)[0])
    found = backend.experts(x, gate, up, down, ids, scores)
    # A hidden value next to a half may be rounded the other way; no more than a few are.
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    if backend.__name__ == "moesaic.ops.reference" and not format.startswith("int"):
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


@pytest.mark.parametrize("format", registry.names("formats"))
@pytest.mark.parametrize(
    ("tokens", "inp", "out"),
    [(1, 8, 3), (5, 33, 17), (64, 64, 128), (2, 4096, 40), (3, 320, 31), (4, 256, 32), (13, 700, 65), (300, 128, 33)],
)
def test_linear(backend, device, format, tokens, inp, out):
    skip_unless_read(backend, "linear", device, format)
    weight = formats.load(format).pack(torch.randn(out, inp))
    x = torch.randn(tokens, inp)
    plain = weight.dequantize().double()
    expected = torch.stack([(plain * row).sum(-1) for row in rounded(x, backend, format).double()])
    torch.testing.assert_close(backend.linear(x, weight).double(), expected, atol=1e-3, rtol=1e-5)


def test_rms_norm(backend):
    x, weight = torch.randn(5, 33), torch.rand(33)
    expected = torch.stack([row / math.sqrt((row.double() ** 2).mean() + 1e-5) * weight for row in x])
    torch.testing.assert_close(backend.rms_norm(x, weight, 1e-5), expected, atol=1e-5, rtol=1e-5)


def test_rope_turns_each_pair_by_its_angle(backend):
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


def test_a_group_divides_only_what_divides():
    assert Group(1, 4).share(8, "heads") == slice(2, 4)
    with pytest.raises(Exception, match="3 ranks do not divide 8 heads"):
        Group(0, 3).share(8, "heads")
