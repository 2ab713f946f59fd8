"""Weights that a file stores transposed, as codes with a scale and a zero point for each group of columns.

This is what GPTQ and AWQ have in common. A weight is ``scale * (code - zero)``. A group may have any number of columns
that is a multiple of 16. The format ``grouped`` has groups of up to 128 columns, so a larger group becomes several with
equal scales. The columns of a group need not be neighbours (``_act_order``): the codes are then sorted by group.

This module does not depend on the names of tensors or on how codes are packed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moesaic.checkpoints import _act_order
from moesaic.checkpoints._packed_integers import PackedIntegers
from moesaic.checkpoints._views import Index, TensorInfo, View, bounds
from moesaic.errors import CheckpointError
from moesaic.formats import Codes
from moesaic.formats._threads import for_each_chunk
from moesaic.formats.grouped import Format

Order = Literal["consecutive", "act-order", "act-order, groups of unequal size"]
SCALES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
"""Names of the dtypes that scales may have."""


@dataclass(frozen=True)
class Parts:
    """The stored numbers of a weight [rows, columns].

    Attributes:
        codes: [columns, rows].
        zeros: [groups, rows] uint8, the code of each group that means 0.
        scales: [groups, rows], one of the dtypes in ``SCALES``.
        g_idx: [columns], the number of the group of each column; None: groups are consecutive columns.
    """

    codes: PackedIntegers
    zeros: View
    scales: View
    g_idx: View | None = None


class GroupedWeight:
    """View of a weight [rows, columns] in float32, without any rounding; ``codes`` returns its codes instead.

    Attributes:
        info: shape, dtype float32, and the file.

    Args:
        name: name of the weight, for messages.
        parts: the stored numbers.
        bits: bits of a code.
        group_size: columns in a group; the last group may have fewer.
        zero_g_idx: whether a ``g_idx`` of zeros means consecutive groups. Some files without act-order have it.

    Raises:
        CheckpointError: the scales have the wrong dtype, or the columns or groups are not a multiple of 16.
    """

    def __init__(self, name: str, parts: Parts, bits: int, group_size: int, zero_g_idx: bool = False) -> None:
        self._name, self._parts, self._group_size, self._zero_g_idx = name, parts, group_size, zero_g_idx
        columns, rows = parts.codes.info.shape
        self.info = TensorInfo((rows, columns), torch.float32, parts.codes.info.file)
        dtype, group = parts.scales.info.dtype, math.gcd(group_size, columns, 128)
        if dtype not in SCALES:
            raise self._error(f"has scales of {dtype}, expected one of {', '.join(SCALES.values())}")
        if group < 16:
            raise self._error(f"has {columns} columns in groups of {group_size}, expected multiples of 16")
        self._format = Format(bits, group, SCALES[dtype], "zero")

    @property
    def kind(self) -> str:
        return f"{self._format.bits} bits" + ("" if self._order == "consecutive" else f", {self._order}")

    @property
    def format(self) -> Format | None:
        """The format that keeps the numbers of the file; None if its groups have unequal numbers of columns.

        Raises:
            CheckpointError: ``g_idx`` is damaged.
        """
        if self._order == "consecutive":
            return self._format
        return replace(self._format, order="act") if self._order == "act-order" else None

    @functools.cached_property
    def _order(self) -> Order:
        """How groups lie among the columns; only this result is kept of ``g_idx``, which many weights have."""
        g_idx = self._read_g_idx()
        if g_idx is None:
            return "consecutive"
        equal = _act_order.have_equal_sizes(g_idx, self._group_size)
        return "act-order" if equal else "act-order, groups of unequal size"

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(self.info.file, f"{self._name} {problem}")

    def codes(self, index: Index | None = None) -> Codes:
        """Return the codes of the part that ``index`` selects, sorted by group if the weight is in act-order.

        The part must begin and end at the border of a group of the format.

        Raises:
            CheckpointError: ``g_idx`` is damaged, or the part has some columns of a weight in act-order.
        """
        rows, columns = bounds(index, self.info.shape)
        assert columns.start % self._format.group == columns.stop % self._format.group == 0
        codes, order, g_idx = self._parts.codes.read((columns, rows)), None, self._read_g_idx()
        if g_idx is not None:
            _act_order.refuse_cut(columns, self.info.shape, self.info.file)
            order = _act_order.sorted_columns(g_idx)
            codes = codes[order]
        numbers = self._scales_and_zeros(rows, self._consecutive(columns))
        return Codes(codes.T.contiguous(), *numbers, order=None if order is None else order.int())

    def read(self, index: Index | None = None) -> Tensor:
        """Return the weight, or the part that ``index`` selects: [rows, columns] float32.

        Raises:
            CheckpointError: ``g_idx`` is damaged.
        """
        rows, columns = bounds(index, self.info.shape)
        g_idx, group = self._read_g_idx(), self._format.group
        if g_idx is None:
            span = slice(columns.start // group * group, -(-columns.stop // group) * group)
            groups = self._consecutive(span)
        else:  # each column is decoded as a group of its own: the columns then need no sorting
            span, groups = columns, g_idx[columns]
        codes = self._parts.codes.load((span, rows))
        scales, zeros = self._scales_and_zeros(rows, groups)
        out = torch.empty(rows.stop - rows.start, columns.stop - columns.start)

        def decode(part: slice) -> None:
            plain = self._format.dequantize(Codes(codes.read((slice(None), part)).T, scales[part], zeros[part]))
            out[part] = plain[:, columns.start - span.start : columns.stop - span.start]

        if out.numel():
            for_each_chunk(decode, out.shape, out.device)
        return out

    def _read_g_idx(self) -> Tensor | None:
        """Return the group of each column, which is checked; None if the groups are consecutive columns."""
        if self._parts.g_idx is None:
            return None
        g_idx = self._parts.g_idx.read().long()
        if _act_order.are_consecutive(g_idx, self._group_size) or (self._zero_g_idx and not g_idx.any()):
            return None
        _act_order.check_groups(self._name, g_idx, self._parts.scales.info.shape[0], self.info.file)
        return g_idx

    def _consecutive(self, columns: slice) -> Tensor:
        """Return, for each group of the format in these columns, the group of the file that it is a part of.

        The groups of the file are consecutive columns.
        """
        return torch.arange(columns.start, columns.stop, self._format.group) // self._group_size

    def _scales_and_zeros(self, rows: slice, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales and the zero points [rows, groups] of the stored ``groups``, which may be repeated."""
        first, last = (int(groups.min()), int(groups.max())) if len(groups) else (0, -1)
        stored = (slice(first, last + 1), rows)
        scales, zeros = self._parts.scales.read(stored), self._parts.zeros.read(stored)
        return scales[groups - first].T.contiguous(), zeros[groups - first].T.contiguous()
