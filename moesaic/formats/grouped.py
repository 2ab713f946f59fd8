"""Codes with a floating-point scale for each group of columns: what GGUF, GPTQ, AWQ and bitsandbytes files hold.

A weight is ``scale * level - offset`` with a level that follows from the code. The parameters say how scale and offset
are stored, so the numbers of a file are kept as they are:

    bits      2, 3, 4, 5, 6 or 8 bits per code
    group     columns that share a scale: 16, 32, 64 or 128
    scale     float16, bfloat16 or float32: one number for each group
              super: an int8 for each group, times a float16 for 256 columns
              super4: the same with four bits for each group; the offset has the other four bits of the byte
    offset    none: the level is ``code - 2^(bits - 1)``, or comes from a table
              value: a number like the scale, or for a super scale, its own uint8 times its own float16
              zero: the code that means 0, a uint8 for each group
    levels    linear, or the name of a table in ``TABLES``
    order     none, or act: the columns are sorted by their groups ("act-order" of GPTQ). For each column in memory,
              the part ``order`` has the column of the weight that it is

The memory holds blocks of 32 rows, each of superblocks of 256 columns; the last superblock may be narrower. Missing
rows and columns have the scale 0. A superblock consists of these sections:

    super     [32] float16, and [32] float16 of the offsets; only if the scale is super
    scales    [groups][32]
    offsets   [groups][32]; none for super4
    codes     planes, as in ``_tiles``

Files: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, ``ggml-common.h`` for the blocks of each type.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moesaic.errors import InvalidParameter
from moesaic.formats import Codes, Layout, Shape, WeightFormat, _planes
from moesaic.formats._blocks import PAD, SUPER, Blocked, nonzero
from moesaic.formats._planes import ROWS
from moesaic.formats._threads import for_each

Scale = Literal["float16", "bfloat16", "float32", "super", "super4"]
Offset = Literal["none", "value", "zero"]

TABLES: Mapping[str, tuple[float, ...]] = {
    # QLoRA, arXiv:2305.14314, appendix E: quantiles of the normal distribution.
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    # OCP Microscaling Formats 1.0, E2M1 times 2, so that all levels are integers.
    "mxfp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    # bitsandbytes' FP4: sign, and a table of the other three bits.
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


@dataclass(frozen=True)
class Format(Blocked):
    """Codes with a scale for each group of columns."""

    name = "grouped"
    error = 0.13

    bits: int = 4
    group: int = 32
    scale: str = "float16"
    offset: str = "none"
    levels: str = "linear"
    order: str = "none"

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[object, ...]] = {
            "bits": tuple(_planes.PLANES),
            "group": (16, 32, 64, 128),
            "scale": ("float16", "bfloat16", "float32", "super", "super4"),
            "offset": ("none", "value", "zero"),
            "levels": ("linear", *TABLES),
            "order": ("none", "act"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                expected = ", ".join(map(str, values))
                raise InvalidParameter("format", f"{field} is {getattr(self, field)}, expected one of {expected}")
        if self.levels != "linear" and (self.bits != 4 or self.offset != "none"):
            raise InvalidParameter("format", f"levels {self.levels} need 4 bits and no offset")
        if self.scale == "super4" and (self.offset != "value" or self.bits > 4):
            raise InvalidParameter("format", "scale super4 needs at most 4 bits and an offset of its own")

    def largest_error(self) -> float:
        return {2: 0.4, 3: 0.25, 4: 0.13, 5: 0.06, 6: 0.03, 8: 0.008}[self.bits]

    @property
    def is_super(self) -> bool:
        """Whether scales are integers times a number for 256 columns."""
        return self.scale.startswith("super")

    @property
    def padding(self) -> int:
        """Columns are padded to a multiple of this."""
        return max(PAD, self.group)

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.int8 if self.is_super else getattr(torch, self.scale)

    @property
    def _offset_dtype(self) -> torch.dtype:
        return torch.uint8 if self.is_super or self.offset == "zero" else self._scale_dtype

    def _sections(self, width: int) -> tuple[int, int, int, int]:
        """Return the bytes of the sections of a superblock: super, scales, offsets and codes."""
        groups = width // self.group
        supers = (2 if self.offset == "value" else 1) * 2 * ROWS if self.is_super else 0
        scales = groups * ROWS * self._scale_dtype.itemsize
        has_offsets = self.offset != "none" and self.scale != "super4"
        return supers, scales, groups * ROWS * self._offset_dtype.itemsize * has_offsets, ROWS * width * self.bits // 8

    def layout(self, shape: Shape) -> Layout:
        tiles = super().layout(shape)
        return {**tiles, "order": ((*shape[:-2], shape[-1]), torch.int32)} if self.order == "act" else tiles

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        if self.order == "none":
            return self.adopt(self._round(weight.float()))
        order = (
            weight.abs().amax(-2).argsort(dim=-1, descending=True, stable=True)
        )  # columns of like size share a scale
        codes = self._round(_ordered(weight.float(), order))
        return self.adopt(replace(codes, order=order.to(torch.int32)))

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        plain = super().unpack(parts, shape, dtype)
        return _unordered(plain, parts["order"]) if self.order == "act" else plain

    def _round(self, weight: Tensor) -> Codes:
        """Return the nearest codes of ``weight`` [..., rows, columns], with scales from the extremes of each group."""
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[-1] % self.group))
        groups = padded.unflatten(-1, (-1, self.group))  # [..., rows, groups, group]
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if self.offset == "none":
            reach = torch.maximum(high, -low)
            levels = self._level(torch.arange(1 << self.bits, device=weight.device))
            scale, offset = reach / levels.abs().amax(), torch.zeros_like(reach)
        else:
            scale, offset = (high - low) / ((1 << self.bits) - 1), -low
        supers: dict[str, Tensor] = {}
        steps = torch.ones(()), torch.ones(())
        if self.is_super:
            most = 15 if self.scale == "super4" else 127
            scale, supers["super_scale"], scale_step = _two_levels(scale, SUPER // self.group, most)
            offset, supers["super_offset"], offset_step = _two_levels(offset, SUPER // self.group, most)
            steps = scale_step, offset_step
        else:
            scale = scale.to(self._scale_dtype)
        if self.offset == "zero":
            offset = (offset / nonzero(scale.float())).round().clamp(0, 255).to(torch.uint8)
        elif not self.is_super:
            offset = offset.to(self._scale_dtype)
        real_scale, real_offset = scale.float() * steps[0], offset.float() * steps[1]
        if self.offset == "zero":
            real_offset = real_offset * real_scale
        target = (groups + real_offset[..., None]) / nonzero(real_scale)[..., None]
        codes = self._nearest(target).flatten(-2)[..., : weight.shape[-1]]
        if self.offset != "value":
            supers.pop("super_offset", None)
        return Codes(codes, scale, None if self.offset == "none" else offset, **supers)

    def _nearest(self, target: Tensor) -> Tensor:
        """Return the uint8 codes whose levels are nearest to ``target``."""
        if self.levels == "linear":
            bias = 1 << (self.bits - 1) if self.offset == "none" else 0
            return (target + bias).round().clamp(0, (1 << self.bits) - 1).to(torch.uint8)
        levels, order = torch.tensor(TABLES[self.levels], device=target.device).sort()
        return order[torch.bucketize(target, (levels[1:] + levels[:-1]) / 2)].to(torch.uint8)

    def fitted(self, codes: Codes, shape: Shape) -> Codes:
        """Return ``codes`` of a weight of ``shape`` [rows, columns] in the dtypes of this format.

        Raises:
            InvalidParameter: a tensor is missing, unexpected or of another shape.
        """
        rows, columns = shape
        groups, supers = (rows, -(-columns // self.group)), (rows, -(-columns // SUPER))
        expected: dict[str, tuple[Shape, torch.dtype]]
        expected = {"codes": ((rows, columns), torch.uint8), "scale": (groups, self._scale_dtype)}
        if self.offset != "none":
            expected["offset"] = (groups, self._offset_dtype)
        if self.is_super:
            names = ("super_scale", "super_offset") if self.offset == "value" else ("super_scale",)
            expected |= dict.fromkeys(names, (supers, torch.float16))
        if self.order == "act":
            expected["order"] = ((columns,), torch.int32)
        shapes = {name: tuple(tensor.shape) for name, tensor in codes.tensors().items()}
        if shapes != {name: shape for name, (shape, _) in expected.items()}:
            wanted = {name: shape for name, (shape, _) in expected.items()}
            raise InvalidParameter("codes", f"have shapes {shapes}; expected for {self}: {wanted}")
        return Codes(**{name: tensor.to(expected[name][1]) for name, tensor in codes.tensors().items()})

    def holds(self, other: WeightFormat | None) -> bool:
        """Return whether this format can store the codes of ``other`` as other codes of the same weights."""
        return isinstance(other, Format) and common([self, other]) == self

    def converted(self, codes: Codes, source: Format) -> Codes:
        """Return ``codes`` in the format ``source``, which this format holds, as codes of this format.

        They may have more bits, smaller groups and wider scales, but stand for the same weights.
        """
        columns = codes.codes.shape[-1]
        groups, parts = -(-columns // self.group), source.group // self.group

        def spread(numbers: Tensor, dtype: torch.dtype) -> Tensor:
            return numbers.to(dtype).repeat_interleave(parts, -1)[..., :groups]

        bias = (1 << self.bits >> 1) - (1 << source.bits >> 1)
        order = codes.order
        if self.order == "act" and order is None:
            order = torch.arange(columns, dtype=torch.int32).expand(*codes.codes.shape[:-2], -1)
        return replace(
            codes,
            codes=codes.codes + (bias if self.offset == "none" else 0),
            scale=spread(codes.scale, self._scale_dtype),
            offset=None if codes.offset is None else spread(codes.offset, self._offset_dtype),
            order=order,
        )

    def adopt(self, codes: Codes) -> dict[str, Tensor]:
        """Return the parts of a weight that a file holds in this format; no number is rounded."""
        *stack, rows, columns = codes.codes.shape
        values = replace(codes, order=None).tensors()
        flat = {name: tensor.reshape(-1, *tensor.shape[-2:]) for name, tensor in values.items()}
        tiles = []
        for index in range(len(flat["codes"])):
            spans = [(SUPER * number, width) for number, (_, _, width) in enumerate(self._superblocks(columns))]
            tiles.append(torch.cat([self._superblock(index, flat, begin, width) for begin, width in spans], dim=1))
        parts = {"tiles": torch.cat(tiles).reshape(*stack, -(-rows // ROWS), -1)}
        return parts if codes.order is None else parts | {"order": codes.order}

    def _superblock(self, index: int, values: Mapping[str, Tensor], begin: int, width: int) -> Tensor:
        """Return the bytes [blocks, n] of one superblock of matrix ``index``."""
        groups, first = width // self.group, begin // self.group

        def cut(name: str, start: int, count: int) -> Tensor:
            part = values[name][index, :, start : start + count]
            return torch.nn.functional.pad(part, (0, count - part.shape[1], 0, -part.shape[0] % ROWS))

        def by_group(name: str) -> Tensor:  # [blocks, groups, 32]
            return cut(name, first, groups).reshape(-1, ROWS, groups).transpose(1, 2)

        pieces = []
        if self.is_super:
            names = ("super_scale", "super_offset") if self.offset == "value" else ("super_scale",)
            pieces += [_bytes(cut(name, begin // SUPER, 1).reshape(-1, ROWS)) for name in names]
        if self.scale == "super4":
            pieces.append(_bytes(by_group("scale").to(torch.uint8) | by_group("offset").to(torch.uint8) << 4))
        else:
            pieces.append(_bytes(by_group("scale").to(self._scale_dtype)))
            if self.offset != "none":
                pieces.append(_bytes(by_group("offset").to(self._offset_dtype)))
        return torch.cat([*pieces, _planes.pack(cut("codes", begin, width), self.bits)], dim=1)

    def codes(self, parts: Mapping[str, Tensor], shape: Shape) -> Codes:
        """Return the codes and scales of a matrix of ``shape`` [rows, columns] that ``parts`` store.

        This is the reverse of ``adopt``.
        """
        tiles, (rows, columns) = parts["tiles"], shape
        spans, pieces = list(self._superblocks(columns)), dict[int, dict[str, Tensor]]()
        counts = {"codes": columns} | dict.fromkeys(("scale", "offset"), -(-columns // self.group))

        def read(number: int) -> None:
            begin, end, width = spans[number]
            pieces[number] = self._codes(tiles[:, begin:end], width).tensors()

        def joined(name: str) -> Tensor:
            whole = torch.cat([pieces[number][name] for number in range(len(spans))], dim=2).flatten(0, 1)
            return whole[:rows, : counts.get(name, whole.shape[1])].contiguous()

        for_each(read, range(len(spans)), tiles.device)
        return Codes(**{name: joined(name) for name in pieces[0]}, order=parts.get("order"))

    def _untile(self, tile: Tensor, width: int) -> Tensor:
        return self.dequantize(self._codes(tile, width))

    def _codes(self, tile: Tensor, width: int) -> Codes:
        """Return the codes [blocks, 32, width] and scales [blocks, 32, groups] of one superblock's bytes."""
        groups = width // self.group
        supers, scales, offsets, codes = tile.split(self._sections(width), dim=1)

        def by_row(data: Tensor, dtype: torch.dtype) -> Tensor:  # [blocks, 32, groups]
            return data.contiguous().view(dtype).reshape(len(data), groups, ROWS).transpose(1, 2)

        offset = None
        if self.scale == "super4":
            scale, offset = by_row(scales & 15, torch.uint8), by_row(scales >> 4, torch.uint8)
        else:
            scale = by_row(scales, self._scale_dtype)
            offset = by_row(offsets, self._offset_dtype) if self.offset != "none" else None
        factors = [None, None]
        if self.is_super:
            both = supers.contiguous().view(torch.float16).reshape(len(tile), -1, ROWS, 1)
            factors = [both[:, 0], both[:, 1] if self.offset == "value" else None]
        return Codes(_planes.unpack(codes, self.bits, width), scale, offset, *factors)

    def dequantize(self, codes: Codes) -> Tensor:
        """Return the float32 weights [..., rows, columns] that ``codes`` stand for, columns in their own order."""
        scale = codes.scale.float()
        offset = None if codes.offset is None else codes.offset.float()
        if codes.super_scale is not None:
            scale = _by_super(scale, codes.super_scale)
        if codes.super_offset is not None and offset is not None:
            offset = _by_super(offset, codes.super_offset)
        level = self._level(codes.codes).unflatten(-1, (scale.shape[-1], -1))
        if self.offset == "zero" and offset is not None:
            plain: Tensor = scale[..., None] * (level - offset[..., None])
        else:
            plain = scale[..., None] * level
            plain = plain if offset is None else plain.sub_(offset[..., None])
        plain = plain.flatten(-2)
        return plain if codes.order is None else _unordered(plain, codes.order)

    def _level(self, codes: Tensor) -> Tensor:
        if self.levels != "linear":
            return torch.tensor(TABLES[self.levels], device=codes.device)[codes.long()]
        return codes.float() - (1 << (self.bits - 1) if self.offset == "none" else 0)


def _ordered(plain: Tensor, order: Tensor) -> Tensor:
    """Return the columns ``order`` [..., columns] of weights [..., rows, columns], which are all columns."""
    return plain.gather(-1, order.long().unsqueeze(-2).expand_as(plain))


def _unordered(plain: Tensor, order: Tensor) -> Tensor:
    """Return weights whose columns ``order`` are those of ``plain``; the reverse of ``_ordered``."""
    return _ordered(plain, order.argsort(-1))


def common(formats: Collection[Format]) -> Format | None:
    """Return the smallest format that holds all of these formats; None if there is none.

    Their offsets and levels must be alike. Scales must be alike if they are integers times a number for 256 columns.
    """
    first = next(iter(formats))
    for each in formats:
        if (each.offset, each.levels) != (first.offset, first.levels):
            return None
        if (each.is_super or first.is_super) and (each.scale, each.group) != (first.scale, first.group):
            return None
    scales = {each.scale for each in formats}
    return Format(
        bits=max(each.bits for each in formats),
        group=min(each.group for each in formats),
        scale=first.scale if len(scales) == 1 else "float32",
        offset=first.offset,
        levels=first.levels,
        order="act" if any(each.order == "act" for each in formats) else "none",
    )


def _bytes(part: Tensor) -> Tensor:
    """Return the bytes [blocks, n] of a tensor [blocks, ...]."""
    return part.contiguous().view(torch.uint8).flatten(1)


def _two_levels(values: Tensor, count: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return values [..., groups] >= 0 as integers 0 .. most and float16 steps [..., supers], and the step of each."""
    supers = torch.nn.functional.pad(values, (0, -values.shape[-1] % count)).unflatten(-1, (-1, count)).amax(-1) / most
    steps = supers.to(torch.float16)
    step = steps.float().repeat_interleave(count, -1)[..., : values.shape[-1]]
    return (values / nonzero(step)).round().clamp(0, most).to(torch.int8), steps, step


def _by_super(values: Tensor, factors: Tensor) -> Tensor:
    """Return values [..., groups] times the float16 factor of their superblock [..., supers]."""
    scaled: Tensor = values.unflatten(-1, (factors.shape[-1], -1)) * factors.float()[..., None]
    return scaled.flatten(-2)
