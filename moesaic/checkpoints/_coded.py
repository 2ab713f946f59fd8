"""Views of matrices that a file stores as codes with scales; they are decoded when they are read.

Each method of quantization derives a class from ``Coded`` that says where its codes and scales lie. Reading a part of a
matrix reads the codes and scales of that part. This module does not depend on names of tensors or on settings.

Legend: R rows, C columns, G steps. A step is a run of consecutive columns within which each row has a single scale. All
steps of a matrix are equally long, and several of them may have the same scale.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from moesaic.checkpoints._views import Index, Shape, TensorInfo, View, bounds, dtype_name, sizes
from moesaic.errors import CheckpointError
from moesaic.formats import Codes
from moesaic.formats._threads import for_each_chunk
from moesaic.formats.grouped import Format

LARGEST_STEP = 128
GROUPS = (16, 32, 64, 128)
"""The lengths of a step that are also group sizes of the format ``grouped``."""


class Decoder(Protocol):
    """Interface of an object that turns codes [R, C] and scales [R, G] into floats."""

    def dequantize(self, codes: Codes) -> Tensor: ...


class Coded:
    """View of a matrix [R, C] that is stored as codes; reading it returns float32, which holds each weight exactly.

    Attributes:
        info: shape, dtype float32, and the file.
        format: the format that keeps the codes and scales of this matrix as they are; None if there is none.
    """

    def __init__(self, codes: View, shape: Shape, step: int, decoder: Decoder) -> None:
        """Create the view of a matrix of ``shape`` with steps of ``step`` columns."""
        self.info = TensorInfo(shape, torch.float32, codes.info.file)
        self.format = decoder if isinstance(decoder, Format) and step in GROUPS else None
        self._step = step
        self._decoder = decoder

    @property
    def kind(self) -> str:
        if not isinstance(self._decoder, Format):
            return type(self._decoder).__name__.lower()
        return f"{self._decoder.bits} bits" if self._decoder.levels == "linear" else self._decoder.levels

    def codes(self, index: Index | None = None) -> Codes:
        """Read the codes and scales of the matrix, or of the part that ``index`` selects.

        The columns of ``index`` begin and end at multiples of the step.
        """
        rows, columns = bounds(index, self.info.shape)
        assert columns.start % self._step == columns.stop % self._step == 0
        return self._part(rows, columns)

    def read(self, index: Index | None = None) -> Tensor:
        """Read the matrix, or the part that ``index`` selects, as float32."""
        rows, columns = bounds(index, self.info.shape)
        shape = sizes((rows, columns))
        if not math.prod(shape):
            return torch.empty(shape)
        # The steps that hold the columns are decoded completely, and cut afterwards.
        begin, end = columns.start // self._step * self._step, -(-columns.stop // self._step) * self._step
        decoded = self._decode(self._part(rows, slice(begin, end)))
        return decoded[:, columns.start - begin : columns.stop - begin]

    def _part(self, rows: slice, columns: slice) -> Codes:
        """Return the codes [R, C] and scales [R, G] of some rows and columns; the columns are complete steps."""
        raise NotImplementedError

    def _decode(self, codes: Codes) -> Tensor:
        out = torch.empty(codes.codes.shape)

        def decode(span: slice) -> None:
            offset = None if codes.offset is None else codes.offset[span]
            out[span] = self._decoder.dequantize(Codes(codes.codes[span], codes.scale[span], offset))

        for_each_chunk(decode, out.shape, out.device)
        return out


def common_step(*lengths: int) -> int:
    """Return the largest number of columns, at most 128, that divides all ``lengths``; it is a power of two."""
    return math.gcd(LARGEST_STEP, *lengths)


def grouped(step: int, **parameters: object) -> Format:
    """Return the format ``grouped`` with these parameters and groups of ``step`` columns.

    Its ``dequantize`` works for steps of any length. It can store codes only if ``step`` is in ``GROUPS``.
    """
    return Format(group=step if step in GROUPS else LARGEST_STEP, **parameters)  # type: ignore[arg-type]


def check_matrix(name: str, view: View, shape: Shape, *dtypes: torch.dtype) -> None:
    """Raise CheckpointError unless the tensor ``name`` has this shape and one of these dtypes."""
    found = view.info
    if found.shape != shape or found.dtype not in dtypes:
        names = " or ".join(dtype_name(dtype) for dtype in dtypes)
        problem = f"{name} is {list(found.shape)} {dtype_name(found.dtype)}, expected {list(shape)} {names}"
        raise CheckpointError(found.file, problem)


def refuse_codes(name: str, view: View, missing: str) -> None:
    """Raise CheckpointError if the tensor ``name`` holds codes. Call it if the tensor that describes them is absent.

    ``missing`` names the absent tensor for the message.
    """
    if not view.info.dtype.is_floating_point or view.info.dtype.itemsize == 1:
        raise CheckpointError(view.info.file, f"{name} holds {dtype_name(view.info.dtype)}, but {missing} is missing")
