"""Weights in the formats of compressed-tensors, which LLM Compressor and vLLM use.

A module ``M`` with quantized weights [R, C] has these tensors:

    M.weight               int8 or float8_e4m3fn [R, C]: formats int-quantized, float-quantized, naive-quantized
    M.weight_packed        int32 [R, C * bits / 32], codes plus 2^(bits - 1), lowest bits first: format pack-quantized
    M.weight_shape         R and C, beside weight_packed; without it, each row fills whole words
    M.weight_scale         one for the matrix, each row, each group of columns of a row, or each block
    M.weight_zero_point    int8 of the scale's shape, or int32 with rows packed; for asymmetric codes only
    M.weight_g_idx         the group of each column (act-order), or -1 everywhere: groups are consecutive columns

A stack of experts M has the same tensors with a first axis for the experts. Their names may be ``M``, ``M_packed``,
``M_scale`` and so on instead.

The settings have a config group for each kind of module. The tensors of a module show which group describes it. The
``targets`` of groups are not needed: their names of modules depend on the version of transformers.
Scales of activations and of the key/value cache say how another program computes, and are ignored.

Layout: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoints import _act_order, _expert_stacks
from moesaic.checkpoints._coded import GROUPS, Coded, Decoder, check_matrix, common_step, grouped, refuse_codes
from moesaic.checkpoints._compressed_settings import Scheme, read_settings
from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._packed_integers import PackedIntegers
from moesaic.checkpoints._packed_modules import by_module
from moesaic.checkpoints._views import Index, Part, Shape, View, bounds, dtype_name
from moesaic.errors import CheckpointError
from moesaic.formats import Codes
from moesaic.formats.grouped import Format

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
_STACKED = re.compile(
    r"(.+\.experts\.(?:gate_up|gate|up|down)_proj)(?:\.weight)?"
    r"(?:[._]((?:(?:in|out)put_)?(?:packed|shape|scale|zero_point|g_idx)))?"
)
"""The tensors of a stack of experts: the name of the module, and the last part of the name."""
_IGNORED = frozenset(
    f"{kind}_{part}" for kind in ("input", "output", "q", "k", "v") for part in ("scale", "zero_point")
)
"""Tensors of activations and of the key/value cache."""


def weight_views(stored: Mapping[str, View], settings: Mapping[str, Any], path: Path) -> dict[str, View]:
    """Return the tensors of a checkpoint with one view for each quantized weight; other tensors stay as they are.

    ``_quantized`` describes the arguments.

    Raises:
        ConfigError: a setting is not known or not supported.
        CheckpointError: a tensor is missing, or does not fit the others or the settings.
    """
    schemes = read_settings(Fields(settings, path))
    stored = _unstacked(stored)
    modules = by_module(stored, _PARTS)
    views: dict[str, View] = {}
    for name, view in stored.items():
        module, _, part = name.rpartition(".")
        if part in _PARTS:
            weight = f"{module}.weight"
            if weight not in views:
                views[weight] = _view(module, modules[module], schemes)
        elif part not in _IGNORED:
            views[name] = view
    return views


def _unstacked(stored: Mapping[str, View]) -> dict[str, View]:
    """Return the tensors of a checkpoint, with those of each expert in place of the tensors of quantized stacks."""
    stacks: dict[str, dict[str, View]] = {}
    for name, view in stored.items():
        if match := _STACKED.fullmatch(name):
            parts, part = stacks.setdefault(match[1], {}), f"weight_{match[2]}" if match[2] else "weight"
            if part in parts:
                raise CheckpointError(view.info.file, f"{name} holds {part}, which another tensor holds as well")
            parts[part] = view
    quantized = {module: parts for module, parts in stacks.items() if "weight_scale" in parts}
    views: dict[str, View] = {}
    for name, view in stored.items():
        match = _STACKED.fullmatch(name)
        if match is None or match[1] not in quantized:
            views[name] = view
        elif parts := quantized[match[1]]:
            views |= _unstack(match[1], parts)
            quantized[match[1]] = {}  # all tensors of this stack are done
    return views


def _unstack(module: str, parts: Mapping[str, View]) -> dict[str, View]:
    """Return the tensors of each expert, by name.

    Raises:
        CheckpointError: the stack has no codes, or another tensor does not have one part for each expert.
    """
    stack = _expert_stacks.split_name(module)
    codes = parts.get("weight_packed", parts.get("weight"))
    assert stack is not None
    if codes is None or not _expert_stacks.is_stack(codes.info.shape):
        found = ", ".join(f"{part} {list(view.info.shape)}" for part, view in parts.items())
        raise CheckpointError(next(iter(parts.values())).info.file, f"{module} is no stack of experts: found {found}")
    views: dict[str, View] = {}
    for part, view in parts.items():
        if part not in _PARTS:
            continue  # the scale of activations
        if part in ("weight_shape", "weight_g_idx") and len(view.info.shape) == 1:  # the same for all experts
            matrices = [Part(view, (slice(-2, None),)) if part == "weight_shape" else view] * codes.info.shape[0]
        else:
            matrices = _expert_stacks.entries(f"{module}.{part}", view, codes.info.shape[0])
        views |= {f"{stack[0]}.{expert}.{stack[1]}.{part}": matrix for expert, matrix in enumerate(matrices)}
    return views


def _view(module: str, parts: Mapping[str, View], schemes: list[Scheme]) -> View:
    """Return the view of a module's weight; a plain weight is returned as it is.

    Raises:
        CheckpointError: tensors are missing, or fit none of the schemes, or fit several whose ``meaning`` differs.
    """
    if parts.keys() == {"weight"}:
        refuse_codes(f"{module}.weight", parts["weight"], "its weight_scale")
        return parts["weight"]
    file = next(iter(parts.values())).info.file
    error = CheckpointError(file, f"{module} has quantized weights, but no config group describes any")
    fitting: dict[Any, Matrix] = {}
    for scheme in schemes:
        try:
            view = Matrix(module, parts, scheme)
        except CheckpointError as problem:
            error = problem
        else:
            fitting[view.meaning] = view
    if not fitting:
        raise error
    if len(fitting) > 1:
        raise CheckpointError(file, f"{module} fits several config groups with different blocks; keep one of them")
    return next(iter(fitting.values()))


class Float8:
    """Decoder of codes [R, C] that are eight-bit floats themselves."""

    def dequantize(self, codes: Codes) -> Tensor:
        level: Tensor = codes.codes.float().unflatten(-1, (codes.scale.shape[-1], -1))
        return level.mul_(codes.scale.float()[..., None]).flatten(-2)


class Matrix(Coded):
    """The quantized weight of a module.

    Attributes:
        meaning: kind, bits and block of the codes. Schemes that agree in these decode the tensors in the same way.
    """

    def __init__(self, module: str, parts: Mapping[str, View], scheme: Scheme) -> None:
        """Create the view; raise CheckpointError if the tensors do not fit the scheme."""
        codes, shape = _codes(module, parts, scheme)
        self._codes, self._scale, self._zero = codes, parts["weight_scale"], parts.get("weight_zero_point")
        self._packed, self._bits = scheme.packed, scheme.bits if scheme.packed else 8
        self._block = scheme.block(shape)
        self._grid = -(-shape[0] // self._block[0]), -(-shape[1] // self._block[1])
        self._name = module
        _check_grid(f"{module}.weight_scale", self._scale, self._grid, *FLOATS)
        self._check_zero(shape, scheme)
        self._g_idx = _read_g_idx(module, parts, shape[1], self._block)
        self.meaning = (scheme.kind, self._bits, self._block)
        step = common_step(*self._widths(shape[1]))
        if self._g_idx is None:
            super().__init__(codes, shape, step, self._decoder_for(step, scheme.kind))
        else:  # each column is decoded as a group of its own: the columns then need no sorting
            super().__init__(codes, shape, 1, self._decoder_for(1, scheme.kind))
            decoder = self._decoder_for(step, scheme.kind)
            are_equal = _act_order.have_equal_sizes(self._g_idx, self._block[1])
            if isinstance(decoder, Format) and step in GROUPS and are_equal:
                self.format = replace(decoder, order="act")

    @property
    def kind(self) -> str:
        if self._g_idx is None:
            return super().kind
        return f"{super().kind}, act-order" + ("" if self.format else ", groups of unequal size")

    def codes(self, index: Index | None = None) -> Codes:
        """Read the codes and scales of a part, sorted by group if the matrix is in act-order.

        Raises:
            CheckpointError: the part has some columns of a matrix in act-order.
        """
        if self._g_idx is None:
            return super().codes(index)
        assert self.format is not None
        rows, columns = bounds(index, self.info.shape)
        _act_order.refuse_cut(columns, self.info.shape, self.info.file)
        order = _act_order.sorted_columns(self._g_idx)
        codes = self._read_codes(rows, columns)[:, order]
        return Codes(codes, *self._read_numbers(rows, self._g_idx[order[:: self.format.group]]), order=order.int())

    def _widths(self, columns: int) -> Shape:
        return (columns,) if self._block[1] == columns else (columns, self._block[1])

    def _decoder_for(self, step: int, kind: str) -> Decoder:
        if kind == "float":
            return Float8()
        dtype = dtype_name(self._scale.info.dtype)
        return grouped(step, bits=self._bits, scale=dtype, offset="none" if self._zero is None else "zero")

    def _check_zero(self, shape: Shape, scheme: Scheme) -> None:
        """Raise CheckpointError unless the zero points fit the scheme."""
        name, zero = f"{self._name}.weight_zero_point", self._zero
        if zero is None:
            if not scheme.symmetric:
                raise CheckpointError(self._scale.info.file, f"{name} is missing: the weights are not symmetric")
        elif scheme.kind == "float":
            raise CheckpointError(zero.info.file, f"{name} is not supported for weights of type float")
        elif zero.info.dtype == torch.int32 and self._packed and self._block[0] == 1:
            check_matrix(name, zero, (-(-shape[0] * self._bits // 32), self._grid[1]), torch.int32)
        else:
            _check_grid(name, zero, self._grid, torch.int8)

    def _part(self, rows: slice, columns: slice) -> Codes:
        across = torch.arange(columns.start, columns.stop, self._step)
        across = across // self._block[1] if self._g_idx is None else self._g_idx[across]
        return Codes(self._read_codes(rows, columns), *self._read_numbers(rows, across))

    def _read_codes(self, rows: slice, columns: slice) -> Tensor:
        if self._packed:
            return PackedIntegers(self._codes, 1, self._bits).read((rows, columns))
        codes = self._codes.read((rows, columns))
        return codes.view(torch.uint8) ^ 128 if codes.dtype == torch.int8 else codes  # int8 plus 128

    def _read_numbers(self, rows: slice, across: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scales and the zero points of rows and of the columns ``across`` of the grid of blocks."""
        down = torch.arange(rows.start, rows.stop) // self._block[0]
        return self._spread(self._scale, down, across), self._read_zero(rows, down, across)

    def _spread(self, view: View, down: Tensor, across: Tensor) -> Tensor:
        """Return the scales or zero points of the blocks in rows ``down`` and columns ``across`` of the grid."""
        rows = slice(int(down[0]), int(down[-1]) + 1)
        columns = slice(int(across.min()), int(across.max()) + 1)
        whole = view.info.shape == self._grid
        part = view.read((rows, columns)) if whole else view.read().reshape(self._grid)[rows, columns]
        return part[down - rows.start][:, across - columns.start]

    def _read_zero(self, rows: slice, down: Tensor, across: Tensor) -> Tensor | None:
        """Return the codes [R, G] uint8 that mean 0; None if there are none."""
        if self._zero is None:
            return None
        if self._zero.info.dtype == torch.int32:
            groups = slice(int(across.min()), int(across.max()) + 1)
            return PackedIntegers(self._zero, 0, self._bits).read((rows, groups))[:, across - groups.start]
        zero = self._spread(self._zero, down, across).short() + (1 << (self._bits - 1))
        if int(zero.min()) < 0 or int(zero.max()) >= 1 << self._bits:
            problem = f"{self._name}.weight_zero_point holds numbers of more than {self._bits} bits"
            raise CheckpointError(self._zero.info.file, problem)
        return zero.to(torch.uint8)


def _codes(module: str, parts: Mapping[str, View], scheme: Scheme) -> tuple[View, Shape]:
    """Return the view of the codes and the shape of the matrix; raise CheckpointError if they do not fit the scheme."""
    part = "weight_packed" if scheme.packed else "weight"
    required, optional = {part, "weight_scale"}, {"weight_zero_point", "weight_g_idx"}
    file = next(iter(parts.values())).info.file
    missing = sorted(required - parts.keys())
    if missing:
        raise CheckpointError(file, f"{module}.{missing[0]} is missing: found {', '.join(sorted(parts))}")
    unexpected = sorted(parts.keys() - required - optional - ({"weight_shape"} if scheme.packed else set()))
    if unexpected:
        raise CheckpointError(file, f"{module}.{unexpected[0]} is unexpected beside {part}")
    codes, name = parts[part], f"{module}.{part}"
    if scheme.packed:
        shape = _read_shape(module, parts, scheme.bits)
        check_matrix(name, codes, (shape[0], -(-shape[1] * scheme.bits // 32)), torch.int32)
    else:
        shape = codes.info.shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(codes.info.file, f"{name} has shape {list(shape)}, expected rows and columns")
        check_matrix(name, codes, shape, torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn)
    return codes, shape


def _read_shape(module: str, parts: Mapping[str, View], bits: int) -> Shape:
    """Return the rows and columns of a matrix; without the tensor that has them, each row fills whole words."""
    name, view = f"{module}.weight_shape", parts.get("weight_shape")
    if view is None:
        shape = parts["weight_packed"].info.shape
        return (*shape[:-1], shape[-1] * 32 // bits) if len(shape) == 2 and 0 not in shape else (1, 1)
    check_matrix(name, view, (2,), torch.int64, torch.int32)
    rows, columns = view.read().tolist()
    if rows < 1 or columns < 1:
        raise CheckpointError(view.info.file, f"{name} is {[rows, columns]}, expected positive numbers")
    return rows, columns


def _check_grid(name: str, view: View, grid: Shape, *dtypes: torch.dtype) -> None:
    """Raise CheckpointError unless the tensor has a number for each block; last axes of length 1 may be absent."""
    allowed = [grid]
    while allowed[-1] and allowed[-1][-1] == 1:
        allowed.append(allowed[-1][:-1])
    check_matrix(name, view, view.info.shape if view.info.shape in allowed else grid, *dtypes)


def _read_g_idx(module: str, parts: Mapping[str, View], columns: int, block: Shape) -> Tensor | None:
    """Return the group [C] of each column; None if groups are consecutive columns.

    Raises:
        CheckpointError: the tensor has the wrong shape or dtype, or does not name the groups that the settings imply.
    """
    view = parts.get("weight_g_idx")
    if view is None:
        return None
    name = f"{module}.weight_g_idx"
    check_matrix(name, view, (columns,), torch.int32, torch.int64)
    g_idx = view.read().long()
    if bool((g_idx == -1).all()) or _act_order.are_consecutive(g_idx, block[1]):
        return None
    if block[0] != 1:
        raise CheckpointError(view.info.file, f"{name} is not supported for blocks of {block[0]} rows")
    _act_order.check_groups(name, g_idx, -(-columns // block[1]), view.info.file)
    return g_idx
