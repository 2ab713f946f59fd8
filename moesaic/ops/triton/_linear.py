"""``linear`` as one kernel for each weight format, in two shapes.

Up to 4 tokens are multiplied without matrix instructions, because reading the weight takes the time. More tokens use
``tl.dot`` in x's dtype with sums in float32. Activations are rotated for integer weights, but not rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.formats import Packed
from moesaic.ops.triton._product import COMPILED, dot_dtype, inputs, product, specialized, weight_of
from moesaic.ops.triton._rotation import _rotate
from moesaic.ops.triton._specialization import Specialization

FEW = 4
"""The most tokens that are multiplied without matrix instructions."""


def linear(x: Tensor, weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    count, columns = weight.shape
    tokens = len(x)
    out = torch.empty((tokens, count), dtype=dtype or x.dtype, device=x.device)
    if not tokens:
        return out
    read = weight_of(weight)
    (x,) = inputs(x.contiguous(), read)
    m, n = tile(tokens)
    _linear[(triton.cdiv(count, n), triton.cdiv(tokens, m))](
        *(x, out, read.data, read.table, read.order),
        *(tokens, x.shape[1], count, columns, read.padded, read.block_bytes),
        **read.constants,
        DOT=tokens > FEW,
        DTYPE=dot_dtype(x),
        M=m,
        N=n,
        **launch(tokens > FEW),
    )
    return out


def tile(tokens: int) -> tuple[int, int]:
    """Return the tokens and the rows of the weight that one program multiplies, for this number of tokens."""
    if tokens <= FEW:
        return triton.next_power_of_2(tokens), 32
    return min(64, max(16, triton.next_power_of_2(tokens))), 64


def launch(dot: bool) -> dict[str, int]:
    """Return how a product is launched; with fewer warps, ``tl.dot`` tiles spill registers."""
    return {"num_warps": 8, "num_stages": 3} if dot else {"num_warps": 4, "num_stages": 2}


@triton.jit
def _linear(
    x,
    out,
    weight,
    table,
    order,
    tokens,
    x_columns,
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
    M: tl.constexpr,
    N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    token = tl.program_id(1).to(tl.int64) * M + tl.arange(0, M)
    sums = product(
        *(x, token, token < tokens, x_columns, weight, table, order, rows, count, columns, padded, block_bytes),
        *(READ, BITS, GROUP, SCALE, OFFSET, LEVELS, ORDERED, DOT, DTYPE),
    )
    inside = (token < tokens)[:, None] & (rows < count)[None, :]
    tl.store(out + token[:, None] * count + rows[None, :], sums.to(out.dtype.element_ty), mask=inside)


def specializations() -> Iterator[Specialization]:
    """Yield the kernels as they are compiled for activations in bfloat16, for each format and number of tokens."""
    signature = {
        **dict.fromkeys(("x", "out"), "*bf16"),
        **dict.fromkeys(("tokens", "x_columns", "count", "columns", "padded", "block_bytes"), "i32"),
    }
    for name in COMPILED:
        read, data = specialized(name)
        parts = {"weight": data, "table": "*fp32" if read["LEVELS"] else data}
        parts["order"] = "*i32" if read["ORDERED"] else data
        for shape, tokens in (("gemv", 1), ("gemv", FEW), ("dot", 16), ("dot", 64)):
            m, n = tile(tokens)
            constants = {**read, "DOT": shape == "dot", "DTYPE": tl.bfloat16, "M": m, "N": n}
            types = {**signature, **parts, **dict.fromkeys(constants, "constexpr")}
            ordered = {argument: types[argument] for argument in _linear.arg_names}
            label = f"linear-{shape}{m}-{name}"
            warps, stages = launch(shape == "dot").values()
            yield Specialization(label, _linear, ordered, constants, warps, stages, mma=shape == "dot")
    rotation = {"x": "*bf16", "signs": "*fp32", "out": "*bf16", "begin": "i32", "columns": "i32", "padded": "i32"}
    for rows in (16, 8, 4):
        yield Specialization(f"rotate{16 * rows}", _rotate, {**rotation, "ROWS": "constexpr"}, {"ROWS": rows}, warps=4)
