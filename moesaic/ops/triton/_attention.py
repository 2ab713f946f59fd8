"""Paged attention for prompts and decoding in one launch (FlashAttention, arXiv:2205.14135).

A first kernel stores the new keys and values in the cache. A program of the second one then handles one block of
queries: some tokens of one sequence and all query heads of one key/value head, which are the rows of a matrix product.
It finds its sequence by binary search in ``Batch.offsets``, so the grid depends on the number of tokens and sequences
only, and never on lengths. With few blocks, the keys are split over several programs (Flash-Decoding), whose results a
third kernel combines.

Legend: T tokens, S sequences, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops import Batch
from moesaic.ops.triton._pointwise import TYPES, readable
from moesaic.ops.triton._specialization import Specialization

PROGRAMS = 264
"""The keys are split until about as many programs run: two for each multiprocessor of an H100."""
MAX_SPLITS = 16
NO_WINDOW = 2**31 - 1


@triton.jit
def _store_head(x, at, inside, memory, scales, head, INT8: tl.constexpr):
    value = tl.load(x + at[0] + at[2], mask=inside, other=0.0).to(tl.float32)
    to = memory + at[1] + at[2]
    if INT8:
        # The magnitude's bits are compared as integers, so that a NaN is the largest.
        most = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        magnitude = most.to(tl.float32, bitcast=True)
        finite = most < 0x7F800000
        large = finite & (magnitude > 7.888609052210118e-31)  # 2^-100, below which 127 / x may overflow
        factor = tl.where(large, tl.math.div_rn(127.0, tl.where(large, magnitude, 1.0)), 0.0)
        scaled = tl.where(finite, value, 0.0) * factor
        rounded = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2^23: to nearest, ties to even
        tl.store(to, rounded.to(tl.int32).to(tl.int8), mask=inside)
        tl.store(scales + head, tl.where(finite, tl.math.div_rn(magnitude, 127.0), float("nan")))
    else:
        tl.store(to, value, mask=inside)


@triton.jit
def _store(
    k, v, slots, keys, values, key_scales, value_scales, heads, SIZE: tl.constexpr, PADDED: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    at = ((token * heads + head) * SIZE, (slot * heads + head) * SIZE, columns)
    _store_head(k, at, inside, keys, key_scales, slot * heads + head, INT8)
    _store_head(v, at, inside, values, value_scales, slot * heads + head, INT8)


@triton.jit
def _load_heads(memory, scales, head_rows, inside, SIZE: tl.constexpr, PADDED: tl.constexpr, INT8: tl.constexpr):
    columns = tl.arange(0, PADDED)[None, :]
    at = head_rows[:, None] * SIZE + columns
    x = tl.load(memory + at, mask=inside[:, None] & (columns < SIZE), other=0)
    if INT8:
        x = x.to(tl.float32) * tl.load(scales + head_rows, mask=inside, other=0.0)[:, None]
    return x


@triton.jit(do_not_specialize=["sequences", "blocks", "tokens", "window"])
def _attend(
    q, keys, values, key_scales, value_scales, tables, offsets, positions, y, states,
    sequences, blocks, tokens, window, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    PAGED: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    index, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    TOKENS: tl.constexpr = ROWS // GROUP
    low, high = sequences * 0, sequences  # the last sequence s with offsets[s] // TOKENS + s <= index
    while low < high - 1:
        middle = (low + high) // 2
        if tl.load(offsets + middle) // TOKENS + middle <= index:
            low = middle
        else:
            high = middle
    begin, end = tl.load(offsets + low), tl.load(offsets + low + 1)
    first_token = begin + (index - (begin // TOKENS + low)) * TOKENS
    if first_token >= end:
        return

    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP
    used = (row // GROUP < TOKENS) & (token < end)
    columns = tl.arange(0, PADDED)[None, :]
    first_position = tl.load(positions + first_token).to(tl.int32)
    position = first_position + row // GROUP
    last = first_position + (tl.minimum(first_token + TOKENS, end) - first_token).to(tl.int32)  # keys: first .. last-1
    first = tl.maximum(first_position - window + 1, 0)
    out_row = token * HEADS + head * GROUP + row % GROUP
    query = tl.load(q + out_row[:, None] * SIZE + columns, mask=used[:, None] & (columns < SIZE), other=0.0)

    tiles = (last - 1) // KEYS + 1 - first // KEYS
    share = (tiles + SPLITS - 1) // SPLITS
    first_tile = first // KEYS + split * share
    last_tile = tl.minimum(first_tile + share, (last - 1) // KEYS + 1)
    best = tl.full([ROWS], -1e30, tl.float32)  # finite, so that no difference of two masked scores is NaN
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    for tile in range(first_tile, last_tile):
        place = tile * KEYS + tl.arange(0, KEYS)
        inside = (place >= first) & (place < last)
        if PAGED:
            block = tl.load(tables + low.to(tl.int64) * blocks + place // BLOCK, mask=inside, other=0)
            slot = block * BLOCK + place % BLOCK
        else:
            slot = begin + place
        head_rows = slot * (HEADS // GROUP) + head
        key = _load_heads(keys, key_scales, head_rows, inside, SIZE, PADDED, INT8).to(q.dtype.element_ty)
        value = _load_heads(values, value_scales, head_rows, inside, SIZE, PADDED, INT8).to(q.dtype.element_ty)
        seen = inside[None, :] & (place[None, :] <= position[:, None])
        seen = seen & (place[None, :] > position[:, None] - window)
        scores = tl.where(seen, tl.dot(query, tl.trans(key), input_precision="ieee") * scale, -1e30)
        largest = tl.maximum(best, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - largest[:, None]), 0.0)
        shrink = tl.exp2(best - largest)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        out += tl.dot(weights.to(q.dtype.element_ty), value, input_precision="ieee")
        best = largest

    inside = used[:, None] & (columns < SIZE)
    if SPLITS == 1:
        tl.store(y + out_row[:, None] * SIZE + columns, out / total[:, None], mask=inside)
    else:
        at = out_row * SPLITS + split
        tl.store(y + at[:, None] * SIZE + columns, out, mask=inside)
        tl.store(states + at, best, mask=used)
        tl.store(states + tokens.to(tl.int64) * HEADS * SPLITS + at, total, mask=used)


@triton.jit(do_not_specialize=["rows"])
def _combine(partial, states, y, rows, SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = row * SPLITS + tl.arange(0, SPLITS)
    columns = tl.arange(0, PADDED)
    best = tl.load(states + at)
    weights = tl.exp2(best - tl.max(best, 0))  # 0 for a split without keys
    total = tl.sum(tl.load(states + rows.to(tl.int64) * SPLITS + at) * weights, 0)
    inside = (columns < SIZE)[None, :]
    parts = tl.load(partial + at[:, None] * SIZE + columns[None, :], mask=inside, other=0.0)
    tl.store(y + row * SIZE + columns, tl.sum(parts * weights[:, None], 0) / total, mask=columns < SIZE)


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, window: int | None) -> Tensor:
    dtype, q, k, v = q.dtype, readable(q), readable(k), readable(v)
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    (tokens, heads, size), groups, cache = q.shape, k.shape[1], batch.cache
    if not tokens:
        return y.to(dtype)
    keys, values, key_scales, value_scales = k, v, k, v  # pointers to scales are read only if the cache is int8
    int8 = cache is not None and bool(cache.key_scales)
    padded = max(16, triton.next_power_of_2(size))
    if cache is not None:
        keys, values = cache.keys[layer], cache.values[layer]
        if int8:
            key_scales, value_scales = cache.key_scales[layer], cache.value_scales[layer]
        memory = (keys, values, key_scales, value_scales)
        _store[(tokens, groups)](k, v, batch.slots, *memory, groups, SIZE=size, PADDED=padded, INT8=int8, num_warps=1)
    sizes, (count, splits) = block_sizes(q.dtype, heads // groups, tokens, len(batch.lengths), groups)
    partial, states = y, y
    if splits > 1:
        partial = torch.empty((tokens, heads, splits, size), dtype=torch.float32, device=q.device)
        states = torch.empty((2, tokens, heads, splits), dtype=torch.float32, device=q.device)
    tables = batch.tables.contiguous()
    _attend[(count, groups, splits)](
        *(q, keys, values, key_scales, value_scales, tables, batch.offsets, batch.positions, partial, states),
        *(len(batch.lengths), tables.shape[1], tokens, window or NO_WINDOW, math.log2(math.e) / math.sqrt(size)),
        *(heads, heads // groups, size, padded, 1 if cache is None else cache.block_size, cache is not None, int8),
        **sizes,
        SPLITS=splits,
    )
    if splits > 1:
        rows = tokens * heads
        _combine[(rows,)](partial, states, y, rows, SIZE=size, PADDED=padded, SPLITS=splits, num_warps=2)
    return y.to(dtype)


def block_sizes(
    dtype: torch.dtype, group: int, tokens: int, sequences: int, groups: int
) -> tuple[dict[str, int], tuple[int, int]]:
    """Return the sizes of a program, and the numbers of blocks of queries and of splits.

    They depend on shapes only. For each sequence, one block may be partly filled, so the number of blocks is a bound.
    The sizes are those at which no registers are spilled on the architectures that are compiled for.

    Args:
        dtype: that of the queries; products of float32 take more registers.
        group: query heads of a key/value head.
        tokens, sequences: of the batch.
        groups: key/value heads.
    """
    few = tokens <= sequences * max(1, 16 // group)
    rows, keys, warps, stages = (16, 16, 8, 3) if dtype == torch.float32 else (16 if few else 64, 32, 4, 2)
    rows = max(rows, triton.next_power_of_2(group))
    count = tokens // (rows // group) + sequences
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * count * groups <= PROGRAMS:
        splits *= 2
    return {"ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}, (count, splits)


def specializations() -> Iterator[Specialization]:
    """Yield the kernels as Mixtral 8x7B and Llama 3 need them: 32 query heads of size 128, 8 key/value heads."""
    for dtype, name in TYPES.items():
        for cache in (name, "i8", None):
            kind = {"i8": "-int8", None: "-no-cache"}.get(cache, "")
            if cache is not None:
                types = _types(_store, name, cache) | {"heads": "i32"}
                constants: dict[str, Any] = {"SIZE": 128, "PADDED": 128, "INT8": cache == "i8"}
                yield Specialization(f"attention-store-{name}{kind}", _store, types, constants, 1)
            for use, tokens in (("prompt", 2048), ("decode", 1)):
                if cache is None and use == "decode":
                    continue
                sizes, (_, splits) = block_sizes(dtype, 4, tokens, 1, 8)
                types = _types(_attend, name, cache or name)
                types |= {"y": f"*{name}" if splits == 1 else "*fp32", "states": "*fp32", "scale": "fp32"}
                types |= dict.fromkeys(("sequences", "blocks", "tokens", "window"), "i32")
                constants = {"HEADS": 32, "GROUP": 4, "SIZE": 128, "PADDED": 128, "BLOCK": 16, "PAGED": bool(cache)}
                constants |= {"INT8": cache == "i8", "SPLITS": splits, "ROWS": sizes["ROWS"], "KEYS": sizes["KEYS"]}
                title, mma = f"attention-{use}-{name}{kind}", dtype != torch.float32
                yield Specialization(title, _attend, types, constants, sizes["num_warps"], sizes["num_stages"], mma)
        types = {"partial": "*fp32", "states": "*fp32", "y": f"*{name}", "rows": "i32"}
        constants = {"SIZE": 128, "PADDED": 128, "SPLITS": MAX_SPLITS}
        types |= dict.fromkeys(constants, "constexpr")
        yield Specialization(f"attention-combine-{name}", _combine, types, constants, 2)


def _types(kernel: Any, name: str, cache: str) -> dict[str, str]:
    """Return the types of a kernel's pointers and constants, for activations and a cache of these types."""
    known = {"q": name, "k": name, "v": name, "keys": cache, "values": cache, "key_scales": "fp32"}
    known |= {"value_scales": "fp32"} | dict.fromkeys(("tables", "offsets", "positions", "slots"), "i64")
    return {argument: f"*{known[argument]}" if argument in known else "constexpr" for argument in kernel.arg_names}
