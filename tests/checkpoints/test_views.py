"""Reading any part of a view equals the same part of the tensor that it describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.checkpoints._views import Joined, Part, Replicated, Rotary, Stored, TensorInfo, Transposed, bounds
from moesaic.errors import CheckpointError


class Memory:
    """Store that counts the elements that are read."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.contents = tensors
        self.tensors = {n: TensorInfo(tuple(t.shape), t.dtype, Path(n)) for n, t in tensors.items()}
        self.count = 0

    def read(self, name, index=None):
        tensor = self.contents[name][bounds(index, self.contents[name].shape)]
        self.count += tensor.numel()
        return tensor


def grid(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def stored(tensor: torch.Tensor) -> tuple[Memory, Stored]:
    store = Memory(x=tensor)
    return store, Stored(store, "x")


spans = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: slice(min(pair), max(pair)))
indices = st.lists(spans, max_size=2).map(tuple)


@settings(deadline=None)
@given(indices, st.integers(1, 4))
def test_joined_reads_only_overlapping_pieces(index, count):
    for axis in (0, 1):
        whole = grid(12, 12)
        stores = [stored(piece) for piece in whole.chunk(count, axis)]
        view = Joined([piece for _, piece in stores], axis)
        assert view.info.shape == whole.shape
        got = view.read(index)
        assert torch.equal(got, whole[index])
        assert sum(store.count for store, _ in stores) == got.numel()


@settings(deadline=None)
@given(indices, spans, spans)
def test_part_of_a_part(index, rows, columns):
    whole = grid(12, 12)
    view = Part(stored(whole)[1], (rows, columns))
    assert view.info.shape == whole[rows, columns].shape
    assert torch.equal(view.read(index), whole[rows, columns][index])


@settings(deadline=None)
@given(indices, st.integers(0, 4))
def test_part_without_leading_axis(index, position):
    whole = grid(5, 12, 12)
    store, entry = stored(whole)
    got = Part(entry, (slice(position, position + 1),), drop=True).read(index)
    assert torch.equal(got, whole[position][index]) and store.count == got.numel()


@settings(deadline=None)
@given(indices)
def test_transposed_view(index):
    assert torch.equal(Transposed(stored(grid(8, 11))[1]).read(index), grid(8, 11).T[index])


@settings(deadline=None)
@given(indices, st.sampled_from([2, 4, 6, 12]), st.booleans())
def test_rotary_rows_in_any_slice(index, head_dim, half_split):
    """Row 2i + j of a head in interleaved order is row i + j * D / 2 in half-split order."""
    whole, expected = grid(12, 12), torch.empty(12, 12)
    for row in range(12):
        head, offset = divmod(row, head_dim)
        pair, half = divmod(offset, 2)
        split = head * head_dim + pair + half * head_dim // 2
        if half_split:
            expected[split] = whole[row]
        else:
            expected[row] = whole[split]
    view = Rotary(stored(whole)[1], head_dim, half_split=half_split)
    assert torch.equal(view.read(index), expected[index])
    assert torch.equal(Rotary(view, head_dim, half_split=not half_split).read(index), whole[index])


def test_rotary_reads_one_head():
    store, whole = stored(grid(12, 3))
    Rotary(whole, 4, half_split=True).read((slice(4, 8),))
    assert store.count == 12


def test_replicated_copies_must_be_equal():
    store = Memory(a=grid(3), b=grid(3), c=grid(3) + 1)
    assert torch.equal(Replicated("norm", [Stored(store, "a"), Stored(store, "b")]).read(), grid(3))
    with pytest.raises(CheckpointError, match="c: norm differs from the copy in a"):
        Replicated("norm", [Stored(store, "a"), Stored(store, "c")]).read()
