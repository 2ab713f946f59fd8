"""The tests of all backends again, for Triton's kernels under its interpreter; and what only these kernels promise."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch

from moesaic import formats, ops
from moesaic.ops import Batch, Cache, reference
from tests.ops import test_sampling
from tests.ops.test_ops import (  # noqa: F401
    test_add_rounds_once,
    test_argmax_finds_the_largest,
    test_attention_over_a_poisoned_cache,
    test_finite_finds_every_bad_value,
    test_non_finite_values_survive_the_cache,
    test_rms_norm,
    test_rope_rotates_each_pair_by_its_angle,
    test_rotary_angles_are_positions_times_frequencies,
    test_route_gives_valid_experts_for_nan,
    test_route_takes_the_largest_logits,
    test_swiglu,
)
from tests.ops.test_sampling import (  # noqa: F401
    on_cpu,
    test_draw_inverts_the_cumulative_distribution,
    test_each_truncation_equals_transformers,
    test_equal_logits_are_kept_together,
    test_every_row_has_its_own_settings,
    test_kernels_draw_what_the_reference_draws,
    test_tokens_without_mass_are_never_drawn,
)

# numpy warns of the infinities and NaN that the tests contain, and of how the interpreter reads the bounds of a loop.
pytestmark = [
    pytest.mark.usefixtures("these_kernels"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("size", "scale", "forbidden"), [(1, 1.0, 0.0), (17, 0.0, 0.0), (333, 8.0, 0.5), (5000, 1.0, 0.0)]
)
def test_combined_truncations_keep_what_the_reference_keeps(size, scale, forbidden):
    chosen = [(0.2, 0, 0.95, 0.05, 0.9), (1.0, 40, 0.5, 0.0, 0.3), (3.0, 0, 0.999, 0.0, 1.0), (1.0, 0, 1.0, 0.05, 0.9)]
    check = test_sampling.test_kernels_keep_what_the_reference_keeps.hypothesis.inner_test
    check(seed=1, size=size, scale=scale, forbidden=forbidden, chosen=chosen)


def step(lengths, new, block, cache, *, window=None):
    """Return a batch of the last ``new[s]`` tokens of sequences of these lengths, in scattered blocks.

    The table has -1 for blocks that have left the window before the first new token.
    """
    needed = [-(-length // block) for length in lengths]
    order = iter(torch.randperm(sum(needed)).tolist())
    blocks = [[next(order) for _ in range(count)] for count in needed]
    flat = [(s, p) for s, length in enumerate(lengths) for p in range(length - new[s], length)]
    slots = torch.tensor([blocks[s][p // block] * block + p % block for s, p in flat])
    tables = torch.full((len(lengths), max(needed) + 1), -1)
    for s, row in enumerate(blocks):
        tables[s, : len(row)] = torch.tensor(row)
        if window is not None:
            tables[s, : max(0, lengths[s] - new[s] - window + 1) // block] = -1
    return Batch(
        tokens=torch.zeros(len(flat), dtype=torch.int64),
        positions=torch.tensor([p for _, p in flat]),
        starts=tuple(itertools.accumulate(new, initial=0)),
        lengths=tuple(lengths),
        slots=slots,
        tables=tables,
        outputs=torch.arange(len(flat)),
        cache=cache,
    )


def filled(blocks, block, kv_heads, size, dtype):
    """Return a cache of random keys and values."""
    cache = Cache.zeros([(kv_heads, size)], blocks, block, dtype)
    for part in cache.tensors():
        part.copy_(random_part(part, dtype))
    return cache


def random_part(part, dtype):
    if part.dtype == torch.int8:
        return torch.randint(-127, 128, part.shape)
    return torch.rand(part.shape) / 50 if dtype == torch.int8 else torch.randn(part.shape)


@pytest.mark.parametrize("programs", [1, 24, 600])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.int8),
        (torch.float16, torch.float16),
        (torch.float16, torch.int8),
    ],
)
def test_attention_over_long_sequences(backend, monkeypatch, dtype, cache_dtype, window, programs):
    """Decoding and prompts in one step, over several tiles and splits, with blocks that were freed."""
    from moesaic.ops.triton import _attention

    monkeypatch.setattr(_attention, "PROGRAMS", programs)
    lengths, new, heads, kv_heads, size = (150, 70, 33), (1, 5, 33), 6, 2, 20
    cache = filled(20, 16, kv_heads, size, cache_dtype)
    batch = step(lengths, new, 16, cache, window=window)
    q, k, v = (torch.randn(sum(new), n, size).to(dtype) for n in (heads, kv_heads, kv_heads))
    copy = dataclasses.replace(
        cache,
        **{
            field.name: tuple(part.clone() for part in getattr(cache, field.name))
            for field in dataclasses.fields(cache)
        },
    )
    found = backend.attention(q, k, v, batch, 0, window)
    expected = reference.attention(q, k, v, dataclasses.replace(batch, cache=copy), 0, window)
    assert all(torch.equal(one, other) for one, other in zip(cache.tensors(), copy.tensors(), strict=True))
    rough = dtype == torch.float16
    torch.testing.assert_close(found, expected, atol=4e-3 if rough else 1e-5, rtol=1e-2 if rough else 1e-4)


@pytest.mark.parametrize("programs", [1, 600])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_without_a_cache(backend, monkeypatch, window, programs):
    from moesaic.ops.triton import _attention

    monkeypatch.setattr(_attention, "PROGRAMS", programs)
    batch = Batch.whole([[1] * 3, [1] * 50, [1]])
    q, k, v = (torch.randn(54, n, 8) for n in (4, 2, 2))
    expected = reference.attention(q, k, v, batch, 0, window)
    torch.testing.assert_close(backend.attention(q, k, v, batch, 0, window), expected, atol=1e-5, rtol=1e-5)


def test_attention_reads_lengths_from_tensors_only(backend):
    """A graph of these kernels can therefore run again after the tensors have changed."""
    cache = filled(8, 4, 2, 8, torch.float32)
    batch = step((9, 5), (1, 1), 4, cache)
    q, k, v = (torch.randn(2, n, 8) for n in (4, 2, 2))
    expected = reference.attention(q, k, v, batch, 0, None)
    found = backend.attention(q, k, v, dataclasses.replace(batch, lengths=(0, 0)), 0, None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 2.0**-101, 2.0**-99, 1.0, 65000.0, 3e38, float("inf"), float("nan")])
def test_int8_caches_are_rounded_as_they_promise(backend, value):
    cache = Cache.zeros([(3, 40)], 2, 4, torch.int8)
    batch = step((5,), (5,), 4, cache)
    q, k = torch.randn(5, 3, 40), torch.randn(5, 3, 40)
    k[1, 2, 7], k[4, 0] = value, torch.linspace(-1, 1, 40) * value
    k[2, 1] = torch.arange(40) - 20.5  # ties
    backend.attention(q, k, k, batch, 0, None)
    rounded, scale = reference.round_heads(k)
    for memory, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        assert torch.equal(memory[0].flatten(0, 1)[batch.slots], rounded)
        torch.testing.assert_close(scales[0].flatten(0, 1)[batch.slots], scale, rtol=0, atol=0, equal_nan=True)


def test_tokens_without_a_slot_are_not_stored(backend):
    """A step that is filled up to the size of a graph has tokens whose slot is -1."""
    memory = torch.zeros(2, 4, 4, 2, 8)
    batch = step((5,), (5,), 4, Cache([memory[0, 1:]], [memory[1, 1:]]))
    batch.slots[3] = -1
    k = torch.randn(5, 2, 8)
    backend.attention(torch.randn(5, 2, 8), k, k, batch, 0, None)
    stored = sorted(4 + slot for slot in batch.slots.tolist() if slot >= 0)
    for part in memory:
        assert part.flatten(0, 1).flatten(1).any(-1).nonzero()[:, 0].tolist() == stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["float32", "float16"])
def test_an_embedding_has_the_rows_of_a_plain_weight(backend, name, dtype):
    weight = formats.load(name).pack(torch.randn(70, 1100))
    ids = torch.tensor([69, 0, 17, 17, -1, 70, 2**40])
    found = backend.embedding(ids, weight, dtype)
    assert found.dtype == dtype and torch.equal(found[:4], weight.dequantize(torch.float32)[ids[:4]].to(dtype))
    assert found[4:].isnan().all()


def test_a_number_at_the_edge_of_an_interval_belongs_to_the_next_token(backend):
    numbers = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert backend.draw(torch.zeros(4, 4), numbers).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_step_may_be_empty(backend, tokens):
    x, positions = torch.randn(tokens, 2, 8), torch.zeros(tokens, dtype=torch.int64)
    batch = Batch.whole([[1]] * tokens)
    assert backend.attention(x, x, x, batch, 0, None).shape == x.shape
    assert backend.rope(x, torch.ones(tokens, 4), torch.ones(tokens, 4)).shape == x.shape
    assert backend.rms_norm(x, torch.ones(8), 1e-5).shape == backend.add(x, x).shape == x.shape
    assert backend.rotary(torch.ones(4), positions)[0].shape == (tokens, 4)
    assert backend.route(x[:, 0], torch.randn(4, 8), 2)[0].shape == (tokens, 2)
    assert backend.draw(x[:, 0], torch.zeros(tokens, dtype=torch.float64)).shape == (tokens,)
    assert backend.truncate(x[:, 0], torch.ones(tokens, 5)).shape == (tokens, 8)
    assert backend.finite(x[:, 0]).shape == backend.argmax(x[:, 0]).shape == (tokens,)


def test_the_backend_says_why_it_does_not_run(backend):
    assert ops.explain("attention", "cpu", None)["triton"] == "it runs on NVIDIA GPUs only"
    assert backend.why_not("attention", "cuda", None) is None
    assert backend.why_not("embedding", "cuda", "int4") == "it does not read int4"
    assert backend.why_not("quantize", "cuda", "int8") == "it has no kernel for quantize"
    with pytest.raises(AttributeError, match="has no attribute 'attend'"):
        _ = backend.attend


def test_triton_is_imported_with_the_first_op():
    code = "import sys, moesaic.ops.triton as t; t.why_not('add', 'cuda', None); print('triton' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
