"""Products of activations with a tile of a weight in any format, and the arguments that kernels need for a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic import formats, registry
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed, WeightFormat, grouped
from moesaic.formats._blocks import Blocked
from moesaic.formats._plain import Plain
from moesaic.formats._tiles import Tiled
from moesaic.ops.triton._pointwise import TYPES
from moesaic.ops.triton._rotation import rotated

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def product(
    x,
    x_rows,
    x_inside,
    x_columns,
    weight,
    table,
    order,
    rows,
    count,
    columns,
    padded,
    block_bytes,
    READ: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    LEVELS: tl.constexpr,
    ORDERED: tl.constexpr,
    DOT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the products [m, n] in float32 of rows ``x_rows`` [m] of x and rows ``rows`` [n] of a matrix.

    With DOT, matrix instructions compute them in DTYPE; without, each column has a sum of its own until the end.
    """
    M: tl.constexpr = x_rows.shape[0]
    N: tl.constexpr = rows.shape[0]
    total = tl.zeros([M, N], tl.float32) if DOT else tl.zeros([M, N, 64], tl.float32)
    for k in range(0, padded, 64):
        values, factor = READ(
            weight, table, rows, k, count, columns, padded, block_bytes, BITS, GROUP, SCALE, OFFSET, LEVELS
        )
        at = k + tl.arange(0, 64)
        inside = at < x_columns
        if ORDERED:
            at = tl.load(order + at, mask=inside, other=0)
        part = tl.load(
            x + x_rows[:, None] * x_columns + at[None, :], mask=x_inside[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        if DOT:
            sums = tl.dot(part.to(DTYPE), tl.trans(values.to(DTYPE)), input_precision="ieee")
            total += sums * factor[None, :]
        else:
            total += part[:, None, :] * (values * factor[:, None])[None, :, :]
    return total if DOT else tl.sum(total, 2)


def dot_dtype(x: Tensor) -> tl.dtype:
    """Return the dtype in which matrix instructions multiply activations x.

    Raises:
        InvalidParameter: the kernels do not compute in x's dtype.
    """
    if x.dtype not in _DTYPES:
        raise InvalidParameter("x", f"is {x.dtype}, expected float32, float16 or bfloat16")
    return _DTYPES[x.dtype]


@dataclass(frozen=True)
class Weight:
    """The arguments of ``product`` that belong to a weight."""

    data: Tensor
    """The tiles, or the plain weight."""
    table: Tensor
    order: Tensor
    padded: int
    block_bytes: int
    entry: int
    """Elements of ``data`` between two entries of a stack."""
    constants: dict[str, Any]
    """The constants READ, BITS, GROUP, SCALE, OFFSET, LEVELS and ORDERED."""
    is_rotated: bool


def weight_of(weight: Packed) -> Weight:
    """Return what kernels need to read ``weight``."""
    parts, (rows, columns) = weight.parts(), weight.shape[-2:]
    constants = constants_of(weight.format)
    is_rotated = _reader(weight.format).ROTATED
    if not isinstance(weight.format, Blocked):
        data = parts["weight"]
        padded = -(-columns // 64) * 64
        return Weight(data, data, data, padded, 0, rows * columns, constants, is_rotated)
    data = table = parts["tiles"]
    if isinstance(weight.format, grouped.Format) and constants["LEVELS"]:
        table = levels(weight.format.levels, data.device)
    padded = -(-columns // weight.format.padding) * weight.format.padding
    block_bytes = data.shape[-1]
    entry = data.shape[-2] * block_bytes
    return Weight(data, table, parts.get("order", data), padded, block_bytes, entry, constants, is_rotated)


def _reader(weight_format: WeightFormat) -> Any:
    return registry.load("ops/triton/tiles", weight_format.name)


def constants_of(weight_format: WeightFormat) -> dict[str, Any]:
    """Return the constants of ``product`` for a format.

    LEVELS says for ``grouped`` whether there is a table of levels. For an integer format, it has them itself: hex digit
    i is the i-th absolute level less 1. It is 0 if the codes are the integers less 128.
    """
    constants = {"READ": _reader(weight_format).read, "BITS": 0, "GROUP": 0, "SCALE": "", "OFFSET": "", "LEVELS": 0}
    if isinstance(weight_format, grouped.Format):
        constants |= {name.upper(): getattr(weight_format, name) for name in ("bits", "group", "scale", "offset")}
        constants["LEVELS"] = weight_format.levels != "linear"
    elif isinstance(weight_format, Tiled):
        sizes = [level - 1 for level in weight_format.levels if level > 0]
        constants |= {"BITS": weight_format.bits, "LEVELS": sum(size << 4 * place for place, size in enumerate(sizes))}
    return constants | {"ORDERED": isinstance(weight_format, grouped.Format) and weight_format.order == "act"}


_LEVELS: dict[tuple[str, torch.device], Tensor] = {}


def levels(name: str, device: torch.device) -> Tensor:
    """Return the table of levels ``name`` on ``device``; it stays there, so that it is copied only once."""
    if (name, device) not in _LEVELS:
        _LEVELS[name, device] = torch.tensor(grouped.TABLES[name], dtype=torch.float32, device=device)
    return _LEVELS[name, device]


def inputs(x: Tensor, *weights: Weight) -> list[Tensor]:
    """Return, for each weight, the activations that it is multiplied with: x, or x rotated."""
    turned = rotated(x) if any(weight.is_rotated for weight in weights) else x
    return [turned if weight.is_rotated else x for weight in weights]


def specialized(name: str) -> tuple[dict[str, Any], str]:
    """Return the constants of ``product`` for the format ``name``, and the type of its data, for an offline compile."""
    weight_format = formats.load(name)
    data = TYPES[weight_format.dtype] if isinstance(weight_format, Plain) else "u8"
    return constants_of(weight_format), f"*{data}"


COMPILED = (
    *("bfloat16", "float16", "float32", "int8", "int4", "int3", "int2"),
    *("grouped", "grouped:bits=5:scale=super:offset=value", "grouped:bits=6:group=16:scale=super"),
    *("grouped:bits=2:group=16:scale=super4:offset=value", "grouped:group=64:scale=float32:levels=nf4"),
    *("grouped:bits=3:group=128:offset=zero", "grouped:group=64:offset=zero:order=act", "grouped:bits=8"),
)
"""Formats whose kernels are compiled offline: one for each path through the readers."""
