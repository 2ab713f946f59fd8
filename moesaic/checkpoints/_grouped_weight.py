"""Weights that a file stores transposed, as codes with a scale and a zero point for each group of columns.

This is what GPTQ and AWQ have in common. A weight is ``scale * (code - zero)``. A group may have any number of columns
that is a multiple of 16. The format ``grouped`` has groups of up to 128 columns, so a larger group becomes several with
equal scales. The columns of a group need not be neighbours: GPTQ with "act-order" numbers the group of each column
(``g_idx``), because it quantizes columns in the order of their importance and groups them in that order.

This module does not depend on the names of tensors or on how codes are packed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.checkpoints._packed_integers import PackedIntegers
from moesaic.checkpoints._views import Index, TensorInfo, View, bounds
from moesaic.errors import CheckpointError
from moesaic.formats import Codes
from moesaic.formats._threads import for_each_chunk
from moesaic.formats.grouped import Format

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
        sorted_format: the format that keeps the numbers of the file after the columns are sorted by their groups.

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
        self.sorted_format = Format(bits, group, SCALES[dtype], "zero")

    @property
    def kind(self) -> str:
        return f"{self.sorted_format.bits} bits" + ("" if self._is_sorted else ", act-order")

    @property
    def format(self) -> Format | None:
        """The format that keeps the numbers of the file; None if its columns are not sorted by their groups.

        Raises:
            CheckpointError: ``g_idx`` is damaged.
        """
        return self.sorted_format if self._is_sorted else None

    @functools.cached_property
    def _is_sorted(self) -> bool:
        """Whether groups are consecutive columns; only this result is kept of ``g_idx``, which many weights have."""
        return self._read_g_idx() is None

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(self.info.file, f"{self._name} {problem}")

    def order(self) -> Tensor | None:
        """Return, for each column of ``codes``, the column of the weight that it is; None if the two are the same.

        Raises:
            CheckpointError: ``g_idx`` names a group that does not exist, or groups have the wrong size.
        """
        g_idx = self._read_g_idx()
        return None if g_idx is None else g_idx.argsort(stable=True)

    def codes(self, index: Index | None = None) -> Codes:
        """Return the codes of the part that ``index`` selects; the columns are in the order that ``order`` returns.

        The part must begin and end at the border of a group of the format.

        Raises:
            CheckpointError: ``g_idx`` is damaged.
        """
        rows, columns = bounds(index, self.info.shape)
        assert columns.start % self.sorted_format.group == columns.stop % self.sorted_format.group == 0
        order = self.order()
        if order is None:
            codes = self._parts.codes.read((columns, rows))
        else:
            codes = self._parts.codes.read((slice(None), rows))[order[columns]]
        return Codes(codes.T.contiguous(), *self._scales_and_zeros(rows, self._consecutive(columns)))

    def read(self, index: Index | None = None) -> Tensor:
        """Return the weight, or the part that ``index`` selects: [rows, columns] float32.

        Raises:
            CheckpointError: ``g_idx`` is damaged.
        """
        rows, columns = bounds(index, self.info.shape)
        g_idx, group = self._read_g_idx(), self.sorted_format.group
        if g_idx is None:
            span = slice(columns.start // group * group, -(-columns.stop // group) * group)
            groups = self._consecutive(span)
        else:  # each column is decoded as a group of its own: the columns then need no sorting
            span, groups = columns, g_idx[columns]
        codes = self._parts.codes.load((span, rows))
        scales, zeros = self._scales_and_zeros(rows, groups)
        out = torch.empty(rows.stop - rows.start, columns.stop - columns.start)

        def decode(part: slice) -> None:
            plain = self.sorted_format.dequantize(Codes(codes.read((slice(None), part)).T, scales[part], zeros[part]))
            out[part] = plain[:, columns.start - span.start : columns.stop - span.start]

        if out.numel():
            for_each_chunk(decode, out.shape, out.device)
        return out

    def _read_g_idx(self) -> Tensor | None:
        """Return the group of each column, which is checked; None if the groups are consecutive columns."""
        if self._parts.g_idx is None:
            return None
        g_idx = self._parts.g_idx.read().long()
        consecutive = torch.arange(len(g_idx)) // self._group_size
        if torch.equal(g_idx, consecutive) or (self._zero_g_idx and not g_idx.any()):
            return None
        low, high, last = int(g_idx.min()), int(g_idx.max()), int(consecutive[-1])
        if low < 0 or high > last:
            raise self._error(f"has group {high if high > last else low} in g_idx, expected 0 to {last}")
        if not torch.equal(g_idx.sort().values, consecutive):
            raise self._error(f"has groups of unequal size in g_idx, expected {self._group_size} columns in each")
        return g_idx

    def _consecutive(self, columns: slice) -> Tensor:
        """Return, for each group of the format in these columns, the group of the file that it is a part of.

        The groups of the file are consecutive columns.
        """
        return torch.arange(columns.start, columns.stop, self.sorted_format.group) // self._group_size

    def _scales_and_zeros(self, rows: slice, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales and the zero points [rows, groups] of the stored ``groups``, which may be repeated."""
        first, last = (int(groups.min()), int(groups.max())) if len(groups) else (0, -1)
        stored = (slice(first, last + 1), rows)
        scales, zeros = self._parts.scales.read(stored), self._parts.zeros.read(stored)
        return scales[groups - first].T.contiguous(), zeros[groups - first].T.contiguous()
