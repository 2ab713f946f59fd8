"""Tensors that are described before they are read: pieces of files, cut, turned, permuted and joined.

Knows how a tensor of the common language is put together from what lies on disk, and reads no more
than the overlap of a wanted part with each piece. Does not know names, layouts or file formats.

Legend: an index is one slice per leading axis, with step 1; axes left out are whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moesaic.errors import CheckpointError

Index = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it; ``file`` is where its first byte lies."""

    shape: Shape
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Store(Protocol):
    """Named tensors that can be read in part: a file, several files, or a whole checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, index: Index | None = None) -> Tensor: ...


def bounds(index: Index | None, shape: Shape) -> Index:
    """Return ``index`` with one slice per axis of ``shape``, each with a plain start and stop."""
    given = index or ()
    assert len(given) <= len(shape) and all(part.step in (None, 1) for part in given)
    whole = (*given, *(slice(None) for _ in shape[len(given) :]))
    ranges = [part.indices(size) for part, size in zip(whole, shape, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop, _ in ranges)


def sizes(index: Index) -> Shape:
    """Return the shape that a bounded ``index`` cuts out."""
    return tuple(part.stop - part.start for part in index)


class View(Protocol):
    """One tensor of the common language, not yet read."""

    @property
    def info(self) -> TensorInfo: ...

    def read(self, index: Index | None = None) -> Tensor:
        """Return the part that ``index`` names; it may share memory with a mapped file."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a store."""

    store: Store
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.store.tensors[self.name]

    def read(self, index: Index | None = None) -> Tensor:
        return self.store.read(self.name, index)


class Part:
    """The block ``index`` of another view; ``drop`` removes the leading axis, which must be cut to 1."""

    def __init__(self, whole: View, index: Index, *, drop: bool = False) -> None:
        self._whole = whole
        self._index = bounds(index, whole.info.shape)
        self._drop = drop
        shape = sizes(self._index)
        assert not drop or shape[0] == 1
        self.info = TensorInfo(shape[1:] if drop else shape, whole.info.dtype, whole.info.file)

    def read(self, index: Index | None = None) -> Tensor:
        inner = bounds(index, self.info.shape)
        if self._drop:
            inner = (slice(0, 1), *inner)
        moved = tuple(
            slice(base.start + part.start, base.start + part.stop)
            for base, part in zip(self._index, inner, strict=True)
        )
        tensor = self._whole.read(moved)
        return tensor[0] if self._drop else tensor


class Transposed:
    """A matrix stored the other way round."""

    def __init__(self, other: View) -> None:
        self._other = other
        rows, columns = other.info.shape
        self.info = TensorInfo((columns, rows), other.info.dtype, other.info.file)

    def read(self, index: Index | None = None) -> Tensor:
        rows, columns = bounds(index, self.info.shape)
        return self._other.read((columns, rows)).T.contiguous()


class Joined:
    """Pieces that follow one another along ``axis``: the shards of a model-parallel checkpoint."""

    def __init__(self, pieces: Sequence[View], axis: int) -> None:
        first = pieces[0].info
        self._pieces = pieces
        self._axis = axis
        total = sum(piece.info.shape[axis] for piece in pieces)
        shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])
        self.info = TensorInfo(shape, first.dtype, first.file)

    def read(self, index: Index | None = None) -> Tensor:
        wanted = bounds(index, self.info.shape)
        axis, span = self._axis, wanted[self._axis]
        parts, begin = [], 0
        for piece in self._pieces:
            size = piece.info.shape[axis]
            start, stop = max(span.start - begin, 0), min(span.stop - begin, size)
            if start < stop:
                parts.append(piece.read((*wanted[:axis], slice(start, stop), *wanted[axis + 1 :])))
            begin += size
        if not parts:
            return torch.empty(sizes(wanted), dtype=self.info.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


class Replicated:
    """A tensor that several files each hold whole: read once, and checked to be the same everywhere."""

    def __init__(self, name: str, copies: Sequence[View]) -> None:
        self._name = name
        self._copies = copies
        self.info = copies[0].info

    def read(self, index: Index | None = None) -> Tensor:
        first = self._copies[0].read(index)
        for copy in self._copies[1:]:
            if not torch.equal(first, copy.read(index)):
                raise CheckpointError(
                    copy.info.file,
                    f"{self._name} differs from the copy in {self.info.file.name}: "
                    "these shards are not of one checkpoint; fetch them again",
                )
        return first


class Rotary:
    """Query or key rows in the other of the two orders that rotary embeddings come in.

    Su et al. (RoFormer, 2021) rotate neighbours: row 2i of a head pairs with 2i + 1, and Meta and
    Mistral store rows so. Hugging Face pairs row i with row i + D/2. ``halves`` says which order
    this view presents; the other view holds the opposite. Whole heads are read around any rows asked for.
    """

    def __init__(self, other: View, head_dim: int, *, halves: bool) -> None:
        self._other = other
        self._head_dim = head_dim
        self._halves = halves
        self.info = other.info

    def read(self, index: Index | None = None) -> Tensor:
        rows, *rest = bounds(index, self.info.shape)
        size = self._head_dim
        begin, end = rows.start // size * size, -(-rows.stop // size) * size
        tensor = self._other.read((slice(begin, end), *rest))
        pairs = (size // 2, 2) if self._halves else (2, size // 2)
        turned = tensor.reshape((end - begin) // size, *pairs, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        return turned[rows.start - begin : rows.stop - begin]
