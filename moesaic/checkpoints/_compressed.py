"""Weights in the formats of compressed-tensors, which LLM Compressor and vLLM use.

A module ``M`` with quantized weights [R, C] has these tensors:

    M.weight               int8 or float8_e4m3fn [R, C]: formats int-quantized, float-quantized, naive-quantized
    M.weight_packed        int32 [R, C * bits / 32], codes plus 2^(bits - 1), lowest bits first: format pack-quantized
    M.weight_shape         R and C, beside weight_packed
    M.weight_scale         one for the matrix, each row, each group of columns of a row, or each block
    M.weight_zero_point    int8 of the scale's shape, or int32 with rows packed; for asymmetric codes only
    M.weight_g_idx         the group of each column (act-order), or -1 everywhere: groups are consecutive columns

The settings have a config group for each kind of module. The tensors of a module show which group describes it. The
``targets`` of groups are not needed: their names of modules depend on the version of transformers.
Scales of activations and of the key/value cache say how another program computes, and are ignored.

Layout: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoints import _act_order
from moesaic.checkpoints._coded import GROUPS, Coded, Decoder, check_matrix, common_step, grouped, refuse_codes
from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._packed_integers import PackedIntegers
from moesaic.checkpoints._packed_modules import by_module
from moesaic.checkpoints._views import Index, Shape, View, bounds, dtype_name
from moesaic.errors import CheckpointError
from moesaic.formats import Codes
from moesaic.formats.grouped import Format

PACKED, FORMATS = "pack-quantized", ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
BITS = (2, 4, 8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
_IGNORED = frozenset(
    f"{kind}_{part}" for kind in ("input", "output", "q", "k", "v") for part in ("scale", "zero_point")
)
"""Tensors of activations and of the key/value cache."""


@dataclass(frozen=True)
class Scheme:
    """How a config group stores weights.

    Attributes:
        packed: whether int32 words hold the codes.
        kind: int or float.
        bits: bits of a code.
        symmetric: whether the weights have no zero points: the signed integer 0 means 0.
        rows, columns: the size of the blocks that share a scale; None: all rows, or all columns.
    """

    packed: bool
    kind: str
    bits: int
    symmetric: bool
    rows: int | None
    columns: int | None

    def block(self, shape: Shape) -> Shape:
        """Return the size of the blocks of a matrix of ``shape`` that share a scale."""
        return min(self.rows or shape[0], shape[0]), min(self.columns or shape[1], shape[1])


def weight_views(stored: Mapping[str, View], settings: Mapping[str, Any], path: Path) -> dict[str, View]:
    """Return the tensors of a checkpoint with one view for each quantized weight; other tensors stay as they are.

    ``_quantized`` describes the arguments.

    Raises:
        ConfigError: a setting is not known or not supported.
        CheckpointError: a tensor is missing, or does not fit the others or the settings.
    """
    schemes = _read_settings(Fields(settings, path))
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


def _read_settings(fields: Fields) -> list[Scheme]:
    """Return the different schemes of the config groups.

    Raises:
        ConfigError: a setting is not known or not supported.
    """
    fields.take("quant_method", None)
    whole = fields.take("format", None)
    sparsity = fields.nested("sparsity_config")
    if sparsity is not None:
        sparsity.allow("format", "dense")
    groups = fields.nested("config_groups")
    if groups is None:
        raise fields.error("has no 'config_groups' in its quantization_config")
    schemes = []
    for name in groups.left:
        group = Fields(groups.left, fields.path).nested(name)
        assert group is not None
        schemes += _read_group(group, whole)
    fields.finish("global_compression_ratio ignore kv_cache_scheme quantization_status run_compressed version".split())
    return list(dict.fromkeys(schemes))


def _read_group(group: Fields, whole: Any) -> list[Scheme]:
    """Return the scheme of a config group as a list; an empty one if the group quantizes no weights.

    ``whole`` is the format of groups that have no format of their own.
    """
    weights = group.nested("weights")
    stored = group.take("format", whole)
    group.finish(("targets", "input_activations", "output_activations"))
    if weights is None or stored == "dense":
        return []
    if stored not in FORMATS:
        raise group.error(f"the format {stored!r} of quantized weights is not supported; use one of {FORMATS}")
    return [_read_weights(weights, packed=stored == PACKED)]


def _read_weights(weights: Fields, *, packed: bool) -> Scheme:
    kind, bits = weights.take("type", "int"), weights.take("num_bits", 8)
    supported = {"int": BITS, "float": () if packed else (8,)}.get(str(kind), ())
    if type(bits) is not int or bits not in supported:
        problem = f"weights of type {kind!r} with {bits!r} bits are not supported"
        raise weights.error(f"{problem}; supported: int with 2, 4 or 8 bits, and unpacked float with 8 bits")
    symmetric = weights.take("symmetric", True)
    if type(symmetric) is not bool:
        raise weights.error(f"symmetric is {symmetric!r}, expected true or false")
    weights.allow("dynamic", False)
    rows, columns = _read_block(weights)
    weights.finish(("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"))
    return Scheme(packed, str(kind), bits, symmetric, rows, columns)


def _read_block(weights: Fields) -> tuple[int | None, int | None]:
    """Return the rows and the columns of the blocks that share a scale; None: all."""
    group, block = weights.take("group_size", None), weights.take("block_structure", None)
    if group is not None and (type(group) is not int or group < -1):
        raise weights.error(f"group_size is {group!r}, expected a positive integer or -1")
    inferred = {None: "tensor", -1: "channel"}.get(group, "group")
    strategy = weights.take("strategy", inferred)
    if strategy in ("tensor", "channel"):
        return (None if strategy == "tensor" else 1), None
    if strategy not in ("group", "block"):
        raise weights.error(
            f"the strategy {strategy!r} is not supported for weights; use tensor, channel, group or block"
        )
    sizes = (1, group) if strategy == "group" else block
    if not isinstance(sizes, tuple | list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        expected = "a group_size" if strategy == "group" else "a block_structure of rows and columns"
        raise weights.error(f"the strategy {strategy!r} needs {expected}, positive integers")
    return sizes[0], sizes[1]


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
    required = {part, "weight_scale", *(("weight_shape",) if scheme.packed else ())}
    file = next(iter(parts.values())).info.file
    missing = sorted(required - parts.keys())
    if missing:
        raise CheckpointError(file, f"{module}.{missing[0]} is missing: found {', '.join(sorted(parts))}")
    unexpected = sorted(parts.keys() - required - {"weight_zero_point", "weight_g_idx"})
    if unexpected:
        raise CheckpointError(file, f"{module}.{unexpected[0]} is unexpected beside {part}")
    codes, name = parts[part], f"{module}.{part}"
    if scheme.packed:
        shape = _read_shape(f"{module}.weight_shape", parts["weight_shape"])
        check_matrix(name, codes, (shape[0], -(-shape[1] * scheme.bits // 32)), torch.int32)
    else:
        shape = codes.info.shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(codes.info.file, f"{name} has shape {list(shape)}, expected rows and columns")
        check_matrix(name, codes, shape, torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn)
    return codes, shape


def _read_shape(name: str, view: View) -> Shape:
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
