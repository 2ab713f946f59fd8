"""Norms, rotations, the router, rows of a plain embedding and other ops without a packed weight, in float32.

A kernel converts its inputs to float32 before it computes: Triton's interpreter, which runs the tests on machines
without a GPU, computes with bfloat16 incorrectly.

Legend: T tokens, d hidden size, D head size, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.formats import Packed
from moesaic.ops.triton._specialization import Specialization

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The dtypes that kernels read, with Triton's names of them."""
MAX_BLOCK = 4096
FLAT_BLOCK = 1024


@triton.jit
def _rms_norm(x, weight, y, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        at = begin + columns
        part = tl.load(x + row + at, mask=at < size, other=0.0).to(tl.float32)
        squares += part * part
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / size + eps)
    for begin in range(0, size, BLOCK):
        at = begin + columns
        part = tl.load(x + row + at, mask=at < size, other=0.0).to(tl.float32)
        factor = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(y + row + at, part * scale * factor, mask=at < size)


@triton.jit
def _rotary(frequencies, positions, cos, sin, size, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    position = tl.load(positions + token).to(tl.float32)
    angle = (position * tl.load(frequencies + columns, mask=columns < size, other=0.0)).to(tl.float64)
    # tl.cos reduces large angles through local memory. Here, angle = quarter * pi / 2 + rest with |rest| <= pi / 4.
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - quarter * 1.5707963267948966
    square = rest * rest
    # Taylor series; the first term that is left out is below 2^-40.
    c = 1.0 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320 - square / 3628800))))
    s = 1.0 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880 - square / 39916800))))
    s = s * rest
    odd = (quarter.to(tl.int64) & 1) == 1
    flipped = (quarter.to(tl.int64) & 2) == 2
    real, imaginary = tl.where(odd, -s, c), tl.where(odd, c, s)
    tl.store(cos + token * size + columns, tl.where(flipped, -real, real).to(tl.float32), mask=columns < size)
    tl.store(sin + token * size + columns, tl.where(flipped, -imaginary, imaginary).to(tl.float32), mask=columns < size)


@triton.jit
def _rope(x, cos, sin, y, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    c = tl.load(cos + token * half + pair, mask=pair < half, other=0.0)
    s = tl.load(sin + token * half + pair, mask=pair < half, other=0.0)
    at = (token * heads + head) * (2 * half) + pair
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, first * c - second * s, mask=inside)
    tl.store(y + at + half, second * c + first * s, mask=inside)


@triton.jit
def _swiglu(gate, up, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, g / (1.0 + tl.exp(-g)) * u, mask=at < count)


@triton.jit
def _add(x, y, total, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    b = tl.load(y + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(total + at, a + b, mask=at < count)


@triton.jit
def _embedding(ids, weight, y, rows, columns, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token)
    known = (row >= 0) & (row < rows)
    value = tl.load(weight + row * columns + at, mask=known & (at < columns), other=float("nan"))
    tl.store(y + token * columns + at, value.to(tl.float32), mask=at < columns)


@triton.jit
def _route(x, weight, ids, scores, size, experts, k, EXPERTS: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    columns = tl.arange(0, BLOCK)
    products = tl.zeros([EXPERTS, BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        at = begin + columns
        part = tl.load(x + token * size + at, mask=at < size, other=0.0).to(tl.float32)
        inside = (expert < experts)[:, None] & (at < size)[None, :]
        rows = tl.load(weight + expert[:, None].to(tl.int64) * size + at[None, :], mask=inside, other=0.0)
        products += rows * part[None, :]
    logits = tl.sum(products, 1)
    order = tl.where(logits != logits, float("inf"), logits)  # NaN is chosen first, so that it shows in the scores
    free = expert < experts
    slot = tl.arange(0, CHOICES)
    chosen = tl.full([CHOICES], float("-inf"), tl.float32)
    for j in range(k):
        best = tl.max(tl.where(free, order, float("-inf")), 0)
        found = tl.min(tl.where(free & (order == best), expert, EXPERTS), 0)
        logit = tl.sum(tl.where(expert == found, logits, 0.0), 0)
        chosen = tl.where(slot == j, logit, chosen)
        free = free & (expert != found)
        tl.store(ids + token * k + j, found.to(tl.int64))
    weights = tl.exp(chosen - tl.max(chosen, 0))
    tl.store(scores + token * k + slot, weights / tl.sum(weights, 0), mask=slot < k)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype, x, weight = x.dtype, readable(x), readable(weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.shape[-1]
    if y.numel():
        _rms_norm[(x.numel() // size,)](x, weight, y, size, eps, BLOCK=block(size), num_warps=warps(size))
    return y.to(dtype)


def rotary(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    frequencies, positions = frequencies.float().contiguous(), positions.contiguous()
    tokens, size = len(positions), len(frequencies)
    cos, sin = (torch.empty((tokens, size), dtype=torch.float32, device=positions.device) for _ in range(2))
    if cos.numel():
        _rotary[(tokens,)](frequencies, positions, cos, sin, size, BLOCK=triton.next_power_of_2(size), num_warps=1)
    return cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype, x, cos, sin = x.dtype, readable(x), cos.float().contiguous(), sin.float().contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, heads, size = x.shape
    if y.numel():
        rows = min(triton.next_power_of_2(heads), 16)
        grid = (tokens, triton.cdiv(heads, rows))
        half = triton.next_power_of_2(size // 2)
        _rope[grid](x, cos, sin, y, heads, size // 2, HEADS=rows, HALF=half, num_warps=4)
    return y.to(dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _flat(_swiglu, gate, up)


def add(x: Tensor, y: Tensor) -> Tensor:
    return _flat(_add, x, y)


def embedding(ids: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    """Return rows of a plain weight; NaN for an id that is out of range, since a check would wait for the device."""
    rows, columns = weight.shape
    out = dtype if dtype in TYPES else torch.float32
    y = torch.empty((len(ids), columns), dtype=out, device=ids.device)
    if y.numel():
        grid = (len(ids), triton.cdiv(columns, FLAT_BLOCK))
        plain = weight.parts()["weight"].detach()
        _embedding[grid](ids.contiguous(), plain, y, rows, columns, BLOCK=FLAT_BLOCK, num_warps=4)
    return y.to(dtype)


def route(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    x, weight = readable(x), weight.contiguous()
    tokens, size = x.shape
    ids = torch.empty((tokens, k), dtype=torch.int64, device=x.device)
    scores = torch.empty((tokens, k), dtype=torch.float32, device=x.device)
    if tokens:
        rows, choices = triton.next_power_of_2(len(weight)), triton.next_power_of_2(k)
        sizes = {"EXPERTS": rows, "CHOICES": choices, "BLOCK": min(triton.next_power_of_2(size), max(64, 4096 // rows))}
        _route[(tokens,)](x, weight, ids, scores, size, len(weight), k, **sizes, num_warps=4)
    return ids, scores


def readable(x: Tensor) -> Tensor:
    """Return ``x`` contiguous and in a dtype that kernels read."""
    return (x if x.dtype in TYPES else x.float()).contiguous()


def block(size: int) -> int:
    """Return how many values of a row of ``size`` values a program handles at once."""
    return int(min(triton.next_power_of_2(size), MAX_BLOCK))


def warps(size: int) -> int:
    """Return the number of warps for a block of a row of ``size`` values."""
    return min(8, max(1, block(size) // 256))


def _flat(kernel: Any, x: Tensor, y: Tensor) -> Tensor:
    dtype, x, y = x.dtype, readable(x), readable(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(out.numel(), FLAT_BLOCK),)
        kernel[grid](x, y, out, out.numel(), BLOCK=FLAT_BLOCK, num_warps=4)
    return out.to(dtype)


def specializations() -> Iterator[Specialization]:
    """Yield the kernels as Mixtral 8x7B and Llama 3 need them."""
    number = {"size": "i32", "count": "i32", "rows": "i32", "columns": "i32", "heads": "i32", "half": "i32", "k": "i32"}
    number |= {"experts": "i32", "eps": "fp32"}
    fixed = {"weight": "*fp32", "cos": "*fp32", "sin": "*fp32", "ids": "*i64", "scores": "*fp32", "positions": "*i64"}
    fixed |= {"frequencies": "*fp32"}
    cases: list[tuple[Any, dict[str, Any], int]] = [
        (_rms_norm, {"BLOCK": 4096}, 8),
        (_rope, {"HEADS": 16, "HALF": 64}, 4),
        (_swiglu, {"BLOCK": FLAT_BLOCK}, 4),
        (_add, {"BLOCK": FLAT_BLOCK}, 4),
        (_embedding, {"BLOCK": FLAT_BLOCK}, 4),
        (_route, {"EXPERTS": 8, "CHOICES": 2, "BLOCK": 512}, 4),
    ]
    for kernel, constants, count in cases:
        for name in TYPES.values():
            types = {argument: "constexpr" if argument in constants else f"*{name}" for argument in kernel.arg_names}
            types |= {argument: kind for argument, kind in (number | fixed).items() if argument in types}
            if kernel in (_rms_norm, _embedding):
                types["weight"] = f"*{name}"
            yield Specialization(f"{kernel.__name__[1:]}-{name}", kernel, types, constants, count)
    types = {argument: (number | fixed).get(argument, "constexpr") for argument in _rotary.arg_names}
    yield Specialization("rotary", _rotary, types, {"BLOCK": 64}, 1)
