"""Views: tensors that are described first and read later, and that combine or reorder tensors on disk.

Reading a part of a view reads only the data that the part needs. This module does not depend on tensor names,
layouts or file formats.

Legend: an index is one slice per leading axis, with step 1; axes that are left out are read completely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.formats import Codes
from moesaic.formats.grouped import Format

Index = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, and the file that holds its first byte."""

    shape: Shape
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Store(Protocol):
    """Interface of an object that describes tensors and reads them by name: a file, several files, or a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, index: Index | None = None) -> Tensor: ...


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bounds(index: Index | None, shape: Shape) -> Index:
    """Return ``index`` with one slice for each axis of ``shape``, each with an explicit start and stop.

    ``index`` None selects the whole tensor.
    """
    index = index or ()
    assert len(index) <= len(shape) and all(part.step in (None, 1) for part in index)
    whole = (*index, *(slice(None) for _ in shape[len(index) :]))
    ranges = [part.indices(size) for part, size in zip(whole, shape, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop, _ in ranges)


def sizes(index: Index) -> Shape:
    """Return the shape of the part that ``index`` selects; ``index`` comes from ``bounds``."""
    return tuple(part.stop - part.start for part in index)


class View(Protocol):
    """A tensor that is described by ``info`` and read later."""

    @property
    def info(self) -> TensorInfo: ...

    def read(self, index: Index | None = None) -> Tensor:
        """Read the tensor, or the part that ``index`` selects; the result may share memory with a mapped file."""
        ...


@runtime_checkable
class CodedView(View, Protocol):
    """A view of quantized weights."""

    @property
    def kind(self) -> str:
        """The kind of quantization, such as Q4_1, for display."""
        ...

    @property
    def format(self) -> Format | None:
        """The format that keeps the codes and scales of the file; None if there is none."""
        ...

    def codes(self, index: Index | None = None) -> Codes:
        """Return the codes and scales of the weights, or of the part that ``index`` selects.

        Raises:
            CheckpointError: the part cuts a group of weights that share a scale.
        """
        ...


@dataclass(frozen=True)
class Stored:
    """View of the tensor ``name`` in a store, unchanged."""

    store: Store
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.store.tensors[self.name]

    def read(self, index: Index | None = None) -> Tensor:
        return self.store.read(self.name, index)


def renamed(stored: Mapping[str, View], rename: Callable[[str, View], Iterable[tuple[str, View]]]) -> dict[str, View]:
    """Return the (name, view) pairs that ``rename`` returns for each stored tensor.

    Raises:
        CheckpointError: two tensors have the same new name.
    """
    views: dict[str, View] = {}
    for name, view in stored.items():
        for other, part in rename(name, view):
            if other in views:
                raise CheckpointError(view.info.file, f"{name} holds {other}, which another tensor holds as well")
            views[other] = part
    return views


class InMemory:
    """View of a tensor in memory that was read from ``file``."""

    def __init__(self, tensor: Tensor, file: Path) -> None:
        self._tensor = tensor
        self.info = TensorInfo(tuple(tensor.shape), tensor.dtype, file)

    def read(self, index: Index | None = None) -> Tensor:
        return self._tensor[bounds(index, self.info.shape)]


class Part:
    """View of the part of another view that ``index`` selects.

    ``drop`` removes the leading axis, which must have length 1.
    """

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
        shifted = tuple(
            slice(base.start + part.start, base.start + part.stop)
            for base, part in zip(self._index, inner, strict=True)
        )
        tensor = self._whole.read(shifted)
        return tensor[0] if self._drop else tensor


class Transposed:
    """View of the transpose of another view, which is a matrix."""

    def __init__(self, other: View) -> None:
        self._other = other
        rows, columns = other.info.shape
        self.info = TensorInfo((columns, rows), other.info.dtype, other.info.file)

    def read(self, index: Index | None = None) -> Tensor:
        rows, columns = bounds(index, self.info.shape)
        return self._other.read((columns, rows)).T.contiguous()


class Joined:
    """View of other views concatenated along ``axis``, such as the shards of a model-parallel checkpoint."""

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
    """View of a tensor that several files hold completely; reading it checks that all copies are equal."""

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
                    "the files do not belong to the same checkpoint; fetch them again",
                )
        return first


class Rotary:
    """View of query or key rows, or of their biases, reordered between the two orders that rotary embeddings use.

    The interleaved order pairs row 2i of a head with row 2i + 1 (Su et al., RoFormer, 2021); Meta and Mistral store it.
    The half-split order of Hugging Face pairs row i with row i + D/2, for heads of size D. If ``half_split``, this view
    has the half-split order and ``other`` the interleaved one; otherwise the reverse. Reading a row reads its whole
    head.
    """

    def __init__(self, other: View, head_dim: int, *, half_split: bool) -> None:
        self._other = other
        self._head_dim = head_dim
        self._half_split = half_split
        self.info = other.info

    def read(self, index: Index | None = None) -> Tensor:
        rows, *rest = bounds(index, self.info.shape)
        size = self._head_dim
        begin, end = rows.start // size * size, -(-rows.stop // size) * size
        tensor = self._other.read((slice(begin, end), *rest))
        pairs = (size // 2, 2) if self._half_split else (2, size // 2)
        parts = tensor.reshape((end - begin) // size, *pairs, *tensor.shape[1:])
        reordered = parts.transpose(1, 2).reshape(tensor.shape)
        return reordered[rows.start - begin : rows.stop - begin]
