"""Views of the weights of a packed folder, which lie in memory as the kernels read them.

This module does not depend on files or on models: a slot of the model has the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoints import _act_order
from moesaic.checkpoints._views import Index, InMemory, TensorInfo, View, bounds
from moesaic.errors import CheckpointError
from moesaic.formats import Codes, Packed, Slot
from moesaic.formats._blocks import SUPER, Blocked
from moesaic.formats._planes import ROWS
from moesaic.formats.grouped import Format


def packed_view(slot: Slot, file: Path) -> View:
    """Return a view of the weight that fills ``slot``; ``file`` is the file that holds it."""
    weight, entry = slot.weight, slot.entry
    assert weight is not None
    if not isinstance(weight, Packed):
        return InMemory(weight.detach(), file)
    parts = {name: part.detach() if entry is None else part[entry].detach() for name, part in weight.parts().items()}
    if isinstance(weight.format, Blocked):
        return PackedView(weight.format, parts, slot.shape, file)
    return InMemory(parts["weight"], file)


class PackedView:
    """View of a matrix [rows, columns] float32 that is stored in blocks of 32 rows.

    Attributes:
        kind: the name of the format, with its parameters.
        format: the format; None if it has no floating-point scale for each group of columns.
    """

    def __init__(self, weight_format: Blocked, parts: Mapping[str, Tensor], shape: tuple[int, ...], file: Path) -> None:
        self.kind = str(weight_format)
        self.format = weight_format if isinstance(weight_format, Format) else None
        self.info = TensorInfo(shape, torch.float32, file)
        self._format, self._parts = weight_format, parts

    def read(self, index: Index | None = None) -> Tensor:
        rows, columns = bounds(index, self.info.shape)
        parts, shape, cut = self._blocks(rows)
        return self._format.unpack(parts, shape, torch.float32)[cut, columns]

    def codes(self, index: Index | None = None) -> Codes:
        """Return the codes and scales of the matrix, or of the part that ``index`` selects.

        Raises:
            CheckpointError: the part cuts columns that share a scale, or the format has no such codes.
        """
        rows, columns = bounds(index, self.info.shape)
        if self.format is None:
            raise CheckpointError(self.info.file, f"{self.kind} weights have no codes with scales")
        parts, shape, cut = self._blocks(rows)
        whole = self.format.codes(parts, shape).tensors()
        spans = {}
        if (order := whole.pop("order", None)) is not None:
            _act_order.refuse_cut(columns, shape, self.info.file)
            spans["order"] = order
        for name, tensor in whole.items():
            width = 1 if name == "codes" else SUPER if name.startswith("super") else self.format.group
            if columns.start % width or (columns.stop % width and columns.stop != shape[1]):
                raise CheckpointError(self.info.file, f"cannot be cut at columns {columns.start} and {columns.stop}")
            spans[name] = tensor[cut, columns.start // width : -(-columns.stop // width)]
        return Codes(**spans)

    def _blocks(self, rows: slice) -> tuple[dict[str, Tensor], tuple[int, int], slice]:
        """Return the parts of the blocks that hold ``rows``, the shape of their matrix, and the rows within it."""
        first, last = rows.start // ROWS, -(-rows.stop // ROWS)
        shape = (min(last * ROWS, self.info.shape[0]) - first * ROWS, self.info.shape[1])
        parts = {**self._parts, "tiles": self._parts["tiles"][first:last]}
        return parts, shape, slice(rows.start - first * ROWS, rows.stop - first * ROWS)
