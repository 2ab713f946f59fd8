"""``experts`` as three kernels: gate and up with SwiGLU, down, and the sum over a token's experts.

The kernels take their work from a list in device memory. With few choices, each one is an item of the list. With
many, the choices are sorted by expert, and an item has up to M choices of one expert. The length of the list is a bound
that follows from the shapes, so that the host never waits; surplus programs exit at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.formats import Packed
from moesaic.ops.triton._linear import FEW
from moesaic.ops.triton._product import COMPILED, Weight, dot_dtype, inputs, product, specialized, weight_of
from moesaic.ops.triton._specialization import Specialization

TILE = 16, 64
"""Choices of an item, and rows of a matrix, that one program multiplies with ``tl.dot``.

With twice as many, the sums of gate and up do not fit in the registers of each GPU, in some formats.
"""
LAUNCH = {True: {"num_warps": 8, "num_stages": 2}, False: {"num_warps": 8, "num_stages": 2}}
"""How products are launched, with ``tl.dot`` and without."""


class Work(NamedTuple):
    """The items that programs work on; a choice is a pair of token and expert, with number token * k + place."""

    experts: Tensor
    """The expert of each item; the number of experts for a surplus item."""
    begins: Tensor
    """Index of the first choice of each item in ``order``."""
    ends: Tensor
    """Index after the last one."""
    order: Tensor
    """Numbers of the choices, sorted by expert."""


def experts(x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor) -> Tensor:
    """Compute ``ops.experts``, but without its check of ids, which would wait for the device.

    A token with an id that is out of range gets NaN, and no memory outside the weights is read.
    """
    (tokens, k), (entries, inner, width) = ids.shape, gate.shape
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    known = (ids >= 0) & (ids < entries)
    scores = torch.where(known, scores.float(), torch.nan).contiguous()
    chosen = torch.where(known, ids, 0).flatten()
    few = tokens <= FEW
    m, n = (1, 32) if few else TILE
    work = _single(chosen) if few else _sorted(chosen, entries, m)
    reads = [weight_of(weight) for weight in (gate, up, down)]
    shape: dict[str, Any] = {"DOT": not few, "DTYPE": dot_dtype(x), "M": m, "N": n, **LAUNCH[not few]}
    hidden = torch.empty((tokens * k, inner), dtype=x.dtype, device=x.device)
    x_gate, x_up = inputs(x.contiguous(), *reads[:2])
    _gate_up[(triton.cdiv(inner, n), len(work.experts))](
        *(x_gate, x_up, hidden, *work, entries, k, x_gate.shape[1], x_up.shape[1], inner, width),
        *(*_arguments(reads[0]), *_arguments(reads[1])),
        *(*reads[0].constants.values(), *reads[1].constants.values()),
        **shape,
    )
    (turned,) = inputs(hidden, reads[2])
    answers = torch.empty((tokens * k, width), dtype=torch.float32, device=x.device)
    _down[(triton.cdiv(width, n), len(work.experts))](
        *(turned, answers, *work, entries, turned.shape[1], width, inner, *_arguments(reads[2])),
        *reads[2].constants.values(),
        **shape,
    )
    _weighted_sum[(tokens, triton.cdiv(width, 1024))](answers, scores, out, k, width, N=1024, num_warps=4)
    return out


def _arguments(read: Weight) -> tuple[Any, ...]:
    return read.data, read.table, read.order, read.padded, read.block_bytes, read.entry


def _single(chosen: Tensor) -> Work:
    """Return one item for each choice."""
    order = torch.arange(len(chosen), device=chosen.device)
    return Work(chosen, order, order + 1, order)


def _sorted(chosen: Tensor, entries: int, m: int) -> Work:
    """Return items of up to ``m`` choices of one expert each."""
    order = chosen.argsort(stable=True)
    counts = torch.zeros(entries, dtype=torch.int64, device=chosen.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))  # bincount would wait for the device
    ends, tiles = counts.cumsum(0), (counts + m - 1) // m
    last = tiles.cumsum(0)
    items = torch.arange(-(-len(chosen) // m) + entries, device=chosen.device)
    expert = torch.searchsorted(last, items, right=True)
    known = expert.clamp(max=entries - 1)
    begins = (ends - counts)[known] + (items - (last - tiles)[known]) * m
    return Work(expert, begins, torch.minimum(begins + m, ends[known]), order)


@triton.jit
def _gate_up(
    x_gate,
    x_up,
    hidden,
    experts,
    begins,
    ends,
    order,
    entries,
    k,
    gate_columns,
    up_columns,
    count,
    columns,
    gate,
    gate_table,
    gate_order,
    gate_padded,
    gate_bytes,
    gate_entry,
    up,
    up_table,
    up_order,
    up_padded,
    up_bytes,
    up_entry,
    READ_GATE: tl.constexpr,
    BITS_GATE: tl.constexpr,
    GROUP_GATE: tl.constexpr,
    SCALE_GATE: tl.constexpr,
    OFFSET_GATE: tl.constexpr,
    LEVELS_GATE: tl.constexpr,
    ORDERED_GATE: tl.constexpr,
    READ_UP: tl.constexpr,
    BITS_UP: tl.constexpr,
    GROUP_UP: tl.constexpr,
    SCALE_UP: tl.constexpr,
    OFFSET_UP: tl.constexpr,
    LEVELS_UP: tl.constexpr,
    ORDERED_UP: tl.constexpr,
    DOT: tl.constexpr,
    DTYPE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Write silu(gate x) * (up x) of each choice: hidden [T k, f]."""
    item = tl.program_id(1)
    expert = tl.load(experts + item)
    if expert < entries:
        rows = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
        place = tl.load(begins + item) + tl.arange(0, M)
        inside = place < tl.load(ends + item)
        choice = tl.load(order + place, mask=inside, other=0)
        token = choice // k
        g = product(
            *(x_gate, token, inside, gate_columns, gate + expert * gate_entry, gate_table),
            *(gate_order + expert * columns, rows, count, columns, gate_padded, gate_bytes),
            *(READ_GATE, BITS_GATE, GROUP_GATE, SCALE_GATE, OFFSET_GATE, LEVELS_GATE, ORDERED_GATE, DOT, DTYPE),
        )
        u = product(
            *(x_up, token, inside, up_columns, up + expert * up_entry, up_table),
            *(up_order + expert * columns, rows, count, columns, up_padded, up_bytes),
            *(READ_UP, BITS_UP, GROUP_UP, SCALE_UP, OFFSET_UP, LEVELS_UP, ORDERED_UP, DOT, DTYPE),
        )
        answer = g / (1.0 + tl.exp(-g)) * u
        mask = inside[:, None] & (rows < count)[None, :]
        tl.store(hidden + choice[:, None] * count + rows[None, :], answer.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _down(
    hidden,
    answers,
    experts,
    begins,
    ends,
    order,
    entries,
    x_columns,
    count,
    columns,
    down,
    table,
    column_order,
    padded,
    block_bytes,
    entry,
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
    """Write down times hidden of each choice: answers [T k, d] float32."""
    item = tl.program_id(1)
    expert = tl.load(experts + item)
    if expert < entries:
        rows = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
        place = tl.load(begins + item) + tl.arange(0, M)
        inside = place < tl.load(ends + item)
        choice = tl.load(order + place, mask=inside, other=0)
        sums = product(
            *(hidden, choice, inside, x_columns, down + expert * entry, table),
            *(column_order + expert * columns, rows, count, columns, padded, block_bytes),
            *(READ, BITS, GROUP, SCALE, OFFSET, LEVELS, ORDERED, DOT, DTYPE),
        )
        mask = inside[:, None] & (rows < count)[None, :]
        tl.store(answers + choice[:, None] * count + rows[None, :], sums, mask=mask)


@triton.jit
def _weighted_sum(answers, scores, out, k, count, N: tl.constexpr):
    """Write the sum of scores times answers over a token's choices, always in the order of the choices."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for j in range(k):
        score = tl.load(scores + token * k + j)
        total += score * tl.load(answers + (token * k + j) * count + at, mask=at < count, other=0.0)
    tl.store(out + token * count + at, total.to(out.dtype.element_ty), mask=at < count)


def specializations() -> Iterator[Specialization]:
    """Yield the kernels as they are compiled for activations in bfloat16, for each format and number of tokens."""
    pointers = {
        **dict.fromkeys(("x_gate", "x_up", "hidden"), "*bf16"),
        **dict.fromkeys(("experts", "begins", "ends", "order"), "*i64"),
        "answers": "*fp32",
    }
    for name in COMPILED:
        read, data = specialized(name)
        table, ordered = "*fp32" if read["LEVELS"] else data, "*i32" if read["ORDERED"] else data
        weights = {
            **dict.fromkeys(("gate", "up", "down"), data),
            **dict.fromkeys(("table", "gate_table", "up_table"), table),
            **dict.fromkeys(("column_order", "gate_order", "up_order"), ordered),
        }
        both = {f"{key}_{side}": value for side in ("GATE", "UP") for key, value in read.items()}
        for shape, m, n in (("gemv", 1, 32), ("dot", *TILE)):
            constants = {"DOT": shape == "dot", "DTYPE": tl.bfloat16, "M": m, "N": n}
            for label, kernel, own in (("gate-up", _gate_up, both), ("down", _down, read)):
                values = {**own, **constants}
                types = {**pointers, **weights, **dict.fromkeys(values, "constexpr")}
                signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
                place = f"experts-{label}-{shape}{m}-{name}"
                warps, stages = LAUNCH[shape == "dot"].values()
                yield Specialization(place, kernel, signature, values, warps, stages, mma=shape == "dot")
    types = {"answers": "*fp32", "scores": "*fp32", "out": "*bf16", "k": "i32", "count": "i32", "N": "constexpr"}
    yield Specialization("experts-sum", _weighted_sum, types, {"N": 1024}, warps=4)
