"""Quantized experts that a file stores as one stack for all experts of a layer, as newer versions of transformers do.

A stack ``L.experts.gate_up_proj`` [E, 2f, d] or ``L.experts.down_proj`` [E, d, f] becomes one matrix for each expert,
``L.experts.0.gate_up_proj.weight`` and so on. This module does not depend on how the matrices are quantized.

Legend: E experts, f intermediate size, d hidden size.
"""

from __future__ import annotations

import re

from torch import Tensor

from moesaic.checkpoints._views import CodedView, Index, Part, Shape, TensorInfo, View, bounds
from moesaic.errors import CheckpointError
from moesaic.formats import Codes

MAX_EXPERTS = 1024
"""Maximum number of experts in a stack; bounds the work for a damaged file."""
_STACK = re.compile(r"(.+\.experts)\.((?:gate_up|gate|up|down)_proj)")


def split_name(module: str) -> tuple[str, str] | None:
    """Return the parts of the name of a stack before and after the number of an expert; None if it names no stack."""
    match = _STACK.fullmatch(module)
    return None if match is None else (match[1], match[2])


def is_stack(shape: Shape) -> bool:
    """Return whether a tensor of this shape is a stack of matrices, which are not empty."""
    return len(shape) == 3 and 0 not in shape and shape[0] <= MAX_EXPERTS


def entries(name: str, stack: View, experts: int) -> list[View]:
    """Return the part of each of ``experts`` experts in the tensor ``name``, which has one for each expert.

    Raises:
        CheckpointError: the first axis of the tensor has another length.
    """
    if stack.info.shape[:1] != (experts,):
        problem = f"{name} has shape {list(stack.info.shape)}, expected {experts} experts in the first axis"
        raise CheckpointError(stack.info.file, problem)
    return [Part(stack, (slice(expert, expert + 1),), drop=True) for expert in range(experts)]


class CodedRows:
    """View of consecutive rows of a matrix of quantized weights."""

    def __init__(self, matrix: CodedView, rows: slice) -> None:
        self._matrix, self._first = matrix, rows.start
        info = matrix.info
        self.info = TensorInfo((rows.stop - rows.start, *info.shape[1:]), info.dtype, info.file)
        self.kind, self.format = matrix.kind, matrix.format

    def read(self, index: Index | None = None) -> Tensor:
        return self._matrix.read(self._shifted(index))

    def codes(self, index: Index | None = None) -> Codes:
        return self._matrix.codes(self._shifted(index))

    def _shifted(self, index: Index | None) -> Index:
        rows, *rest = bounds(index, self.info.shape)
        return (slice(self._first + rows.start, self._first + rows.stop), *rest)


def cut_rows(matrix: View, rows: slice) -> View:
    """Return a view of consecutive rows of a matrix; quantized weights keep their codes."""
    return CodedRows(matrix, rows) if isinstance(matrix, CodedView) else Part(matrix, (rows,))
