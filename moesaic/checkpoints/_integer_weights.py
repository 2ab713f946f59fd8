"""Quantized weights as integers with a scale and a zero point for each group of columns, to write them into files.

A weight is ``scale * (code - zero)``. Weights of other programs are turned into this form if no number changes: offsets
must be whole multiples of the scale, and codes of another number of bits are shifted into 4 or 8 bits. All of this is
checked on the numbers themselves. This module does not depend on how a file packs the integers.

Legend: R rows, C columns, G groups.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._exact import Inexact, exact_cast
from moesaic.checkpoints._hf_write import write_hf
from moesaic.checkpoints._views import CodedView, Index, TensorInfo, View, bounds
from moesaic.checkpoints._write import WriteOptions, views
from moesaic.errors import CheckpointError
from moesaic.formats.grouped import Format

_MODULE = re.compile(r"(model\.layers\.\d+\..+\.(?:[qkvo]_proj|(?:gate|up|down)_proj|w[123]))\.weight")
"""Names of the weights that methods of quantization store as integers; all other weights are written as floats."""
_PRODUCT = re.compile(r"lm_head\.weight|score\.weight|model\.layers\.\d+\..+\.(?:gate|[a-z]+_proj|w[123])\.weight")
"""Names of the weights of matrix products."""
_SHIFTED = (4, 8)
"""Bits of codes that are shifted."""


@dataclass(frozen=True)
class Integers:
    """A weight [R, C]: ``scale * (code - zero)``.

    Attributes:
        bits: bits of a code.
        codes: [R, C] uint8.
        zeros: [R, G] uint8.
        scale: [R, G], of a floating-point dtype.
        groups: [C], the group of each column; None: groups are consecutive columns.
    """

    bits: int
    codes: Tensor
    zeros: Tensor
    scale: Tensor
    groups: Tensor | None = None

    @property
    def is_symmetric(self) -> bool:
        """Whether each zero point is the middle of the codes."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    @property
    def is_uniform(self) -> bool:
        """Whether all groups of a row have the same scale and zero point."""
        return bool((self.scale == self.scale[:, :1]).all() and (self.zeros == self.zeros[:, :1]).all())


@dataclass(frozen=True)
class Layout:
    """How a file stores the integers of a module.

    Attributes:
        bits: bits of a code.
        group: columns in a group; None: all columns.
        symmetric: whether each zero point is the middle of the codes.
        ordered: whether groups are consecutive columns.
    """

    bits: int
    group: int | None
    symmetric: bool
    ordered: bool


class IntegerWeight:
    """The quantized weight of the module ``name``, read as integers of one of ``widths`` bits."""

    def __init__(self, name: str, view: CodedView, widths: Collection[int]) -> None:
        self.name, self.shape, self.file = name, view.info.shape, view.info.file
        self._view, self._widths = view, widths

    def survey(self) -> tuple[Layout, Tensor, Tensor]:
        """Return the layout, the scales and the zero points of the integers.

        Raises:
            Inexact: the weights are no integers with a scale and a zero point for each group.
        """
        found = self.read(None)
        group = None if found.is_uniform else self.shape[1] // found.scale.shape[1]
        layout = Layout(found.bits, group, found.is_symmetric, found.groups is None or group is None)
        return layout, found.scale, found.zeros

    def read(self, layout: Layout | None) -> Integers:
        """Return the integers; with ``layout``, in groups of its size, which divides those of the weight."""
        found = _narrowed(_integers(self._view), self._widths)
        if layout is None:
            return found
        if found.is_uniform:
            found = replace(found, scale=found.scale[:, :1], zeros=found.zeros[:, :1], groups=None)
        if layout.group is None:
            return found
        times = self.shape[1] // layout.group // found.scale.shape[1]
        scale, zeros = found.scale.repeat_interleave(times, 1), found.zeros.repeat_interleave(times, 1)
        groups = found.groups
        if groups is not None and times > 1:
            places = torch.empty_like(groups)
            places[groups.argsort(stable=True)] = torch.arange(len(groups), dtype=groups.dtype)
            groups = places // layout.group
        return replace(found, scale=scale, zeros=zeros, groups=groups)


def _integers(view: CodedView) -> Integers:
    """Return the weight of ``view`` as integers with the bits of its codes.

    Raises:
        Inexact: there are no such integers.
    """
    stored = view.format
    if not isinstance(stored, Format):
        raise Inexact("they have no integer codes with a scale for each group of columns")
    if stored.levels != "linear":
        raise Inexact(f"they have the levels of {stored.levels}, not integers")
    if view.info.shape[1] % stored.group:
        raise Inexact(f"groups of {stored.group} columns do not divide {view.info.shape[1]}")
    codes = view.codes()
    scale, offset = _factored(codes.scale, codes.super_scale), codes.offset
    if offset is None:
        zeros = torch.full(scale.shape, 1 << (stored.bits - 1), dtype=torch.uint8)
    elif stored.offset == "zero":
        zeros = offset
    else:
        zeros = _zeros(scale.float(), _factored(offset, codes.super_offset).float())
    if codes.order is None:
        return Integers(stored.bits, codes.codes, zeros, scale)
    order = codes.order.long()
    groups = torch.empty_like(order)
    groups[order] = torch.arange(len(order)) // stored.group
    in_order = torch.empty_like(codes.codes)
    in_order[:, order] = codes.codes
    return Integers(stored.bits, in_order, zeros, scale, groups)


def _factored(numbers: Tensor, factors: Tensor | None) -> Tensor:
    """Return ``numbers`` [R, G] times the float16 factors [R, supers] of superblocks; the products are exact."""
    if factors is None:
        return numbers
    return numbers.float() * factors.float().repeat_interleave(numbers.shape[1] // factors.shape[1], 1)


def _zeros(scale: Tensor, offset: Tensor) -> Tensor:
    """Return the zero points of weights ``scale * code - offset``; raise Inexact if they are not whole numbers."""
    zeros = (offset / torch.where(scale == 0, 1, scale)).round()
    if not torch.equal(zeros * scale, offset) or bool((zeros < 0).any() or (zeros > 255).any()):
        raise Inexact("their offsets are no whole multiples of their scales")
    return zeros.to(torch.uint8)


def _narrowed(found: Integers, widths: Collection[int]) -> Integers:
    """Return the integers with a number of bits in ``widths``; they are shifted so that the middle code means 0.

    Raises:
        Inexact: the numbers are too large.
    """
    if found.bits in widths and int(found.zeros.max()) < 1 << found.bits:
        return found
    groups = torch.arange(found.codes.shape[1]) // (found.codes.shape[1] // found.zeros.shape[1])
    levels = found.codes.short() - found.zeros.short()[:, groups if found.groups is None else found.groups]
    low, high = (int(end) for end in torch.aminmax(levels))
    for bits in _SHIFTED:
        middle = 1 << (bits - 1)
        if -middle <= low and high < middle:
            codes, zeros = (levels + middle).to(torch.uint8), torch.full_like(found.zeros, middle)
            return replace(found, bits=bits, codes=codes, zeros=zeros)
    raise Inexact("their codes and zero points need more than 8 bits")


class Made:
    """View of a tensor that a function returns."""

    def __init__(self, info: TensorInfo, make: Callable[[], Tensor]) -> None:
        self.info, self._make = info, make

    def read(self, index: Index | None = None) -> Tensor:
        return self._make()[bounds(index, self.info.shape)]


@dataclass(frozen=True)
class IntegerModules:
    """The quantized modules of a checkpoint that are written as integers.

    Attributes:
        modules: the weight and the layout of each module, by its name.
        scales: the dtype of each module's scales; float32 if they are products.
        least_zero: the smallest zero point of all modules.
    """

    modules: Mapping[str, tuple[IntegerWeight, Layout]]
    scales: Mapping[str, torch.dtype]
    least_zero: int

    def plain(self, source: Checkpoint) -> list[str]:
        """Return the names of the matrix products of ``source`` whose weights are written as floats."""
        names = [name.removesuffix(".weight") for name in source.tensors if _PRODUCT.fullmatch(name)]
        return [name for name in names if name not in self.modules]

    def view(self, module: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[Integers], Tensor]) -> View:
        """Return a view of the tensor that ``make`` returns for the integers of a module."""
        weight, layout = self.modules[module]
        return Made(TensorInfo(shape, dtype, weight.file), lambda: make(weight.read(layout)))

    @functools.cached_property
    def common(self) -> Layout:
        """The layout of most modules."""
        layouts = [layout for _, layout in self.modules.values()]
        return max(dict.fromkeys(layouts), key=layouts.count)


def write_modules(
    source: Checkpoint,
    path: Path,
    options: WriteOptions,
    found: IntegerModules,
    tensors: Callable[[str], Mapping[str, View]],
    settings: Mapping[str, Any],
) -> None:
    """Write Hugging Face's layout: ``tensors`` of each quantized module, and all others of ``source`` as they are.

    ``settings`` become the ``quantization_config``. Errors are those of ``write_hf``.
    """
    out: dict[str, View] = {}
    for name, view in views(source).items():
        module = name.removesuffix(".weight")
        out |= tensors(module) if module in found.modules and name != module else {name: view}
    write_hf(source, path, out, {**source.config, "quantization_config": settings}, options)


def integer_modules(
    source: Checkpoint,
    target: str,
    widths: Collection[int],
    dtypes: Sequence[torch.dtype],
    *,
    decode: bool,
    fits: Callable[[IntegerWeight, Layout], str | None] = lambda _weight, _layout: None,
) -> IntegerModules:
    """Return the modules of ``source`` to write as integers; other weights are written as floats.

    All modules get groups of the same size, the largest that divides those of each, or one group for a row if that
    suffices everywhere.

    Args:
        source: the checkpoint.
        target: name of the method of quantization, for messages.
        widths: the bits that codes may have.
        dtypes: the dtypes that scales may have, the preferred first; scales in none of them are converted to the first
            that holds them exactly.
        decode: whether weights that are not such integers are written as floats; otherwise they are refused.
        fits: returns a clause that says why a module's shape is not possible; None if it is.

    Raises:
        CheckpointError: a weight is not such integers, or no weight is quantized.
    """
    found: dict[str, tuple[IntegerWeight, Layout]] = {}
    scales: dict[str, torch.dtype] = {}
    least = 255
    for name, view in source.quantized.items():
        match = _MODULE.fullmatch(name)
        if match is None:
            continue
        weight = IntegerWeight(match[1], view, widths)
        try:
            layout, scale, zeros = weight.survey()
            dtype = next(
                (dtype for dtype in (scale.dtype, *dtypes) if dtype in dtypes and exact_cast(scale, dtype) is not None),
                None,
            )
            if dtype is None:
                raise Inexact(f"their scales are no {_names(dtypes)} numbers")
            if problem := fits(weight, layout):
                raise Inexact(problem)
        except Inexact as error:
            if decode:
                continue
            problem = f"{name} ({view.kind}) cannot be written exactly as integers of {target}: {error}"
            advice = "add --decode to write it as floats, or convert to hf"
            raise CheckpointError(view.info.file, f"{problem}; {advice}") from error
        found[match[1]], scales[match[1]] = (weight, layout), dtype
        least = min(least, int(zeros.min()))
    if not found:
        problem = f"has no quantized weights that can be written as {target}; convert it to hf"
        raise CheckpointError(source.path, problem)
    sizes = [layout.group for _, layout in found.values() if layout.group is not None]
    group = math.gcd(*sizes, *(weight.shape[1] for weight, _ in found.values())) if sizes else None
    modules = {name: (weight, replace(layout, group=group)) for name, (weight, layout) in found.items()}
    return IntegerModules(modules, scales, least)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
