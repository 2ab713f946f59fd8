"""Sampling on the GPU: one program for each row of logits.

``truncate`` keeps the tokens with the smallest keys up to some total weight. Instead of sorting, it finds the largest
key that is kept by bisection: floats that are not negative have the order of their bits, so 31 passes over the row
find it exactly. Weights are added in float32 within a block of the row, and the blocks in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.ops.triton._pointwise import TYPES, readable
from moesaic.ops.triton._specialization import Specialization

BLOCK = 4096
COUNT, MASS, NEAREST = (tl.constexpr(kind) for kind in range(3))
"""What a truncation adds up, and its key: tokens by logit, probability by logit, probability by distance."""
INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def _finite(x, y, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    bad = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        part = tl.load(x + row * size + at, mask=at < size, other=0.0).to(tl.float32)
        bad = bad | tl.where((part.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= INFINITE, 1, 0)
    tl.store(y + row, (1 - tl.max(bad, 0)).to(tl.int8))


@triton.jit
def _argmax(x, ids, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        part = tl.load(x + row * size + at, mask=at < size, other=float("-inf")).to(tl.float32)
        index = tl.where(part > best, at, index)
        best = tl.maximum(best, part)
    found = tl.min(tl.where(best == tl.max(best, 0), index, 0x7FFFFFFF), 0)
    tl.store(ids + row, tl.minimum(found, size - 1).to(tl.int64))


@triton.jit
def _most(x, size, BLOCK: tl.constexpr):
    """Return the largest value of a row."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(x + at, mask=at < size, other=float("-inf")))
    return tl.max(best, 0)


@triton.jit
def _distance(x, mean):
    return tl.abs(mean - x).to(tl.int32, bitcast=True)


@triton.jit
def _candidates(x, limit, floor):
    """Return the probabilities of a block relative to the likeliest token, and which tokens are not removed yet."""
    relative = tl.exp(x)
    return relative, ((0.0 - x).to(tl.int32, bitcast=True) <= limit) & (relative >= floor) & (x > float("-inf"))


@triton.jit
def _sum_up_to(x, size, bound, limit, floor, mean, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Return the total weight of the candidates whose key is at most ``bound``, as float64."""
    total = tl.full([], 0.0, tl.float64)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        part = tl.load(x + at, mask=at < size, other=float("-inf"))
        relative, kept = _candidates(part, limit, floor)
        if KIND == NEAREST:
            kept = kept & (_distance(part, mean) <= bound)
        else:
            kept = kept & ((0.0 - part).to(tl.int32, bitcast=True) <= bound)
        if KIND == COUNT:
            total += tl.sum(tl.where(kept, 1, 0), 0).to(tl.float64)
        else:
            total += tl.sum(tl.where(kept, relative, 0.0), 0).to(tl.float64)
    return total


@triton.jit
def _smallest_bound(x, size, goal, limit, floor, mean, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Return the smallest key up to which the weights add up to ``goal``; that of infinity if they never do."""
    low = tl.full([], 0, tl.int32)
    high = tl.full([], INFINITE, tl.int32)
    while low < high:
        middle = low + (high - low) // 2
        if _sum_up_to(x, size, middle, limit, floor, mean, KIND, BLOCK) >= goal:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _mean(x, size, limit, floor, BLOCK: tl.constexpr):
    """Return the sum of relative probability times logit over the candidates, as float64."""
    total = tl.full([], 0.0, tl.float64)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        part = tl.load(x + at, mask=at < size, other=float("-inf"))
        relative, kept = _candidates(part, limit, floor)
        kept = kept & (relative > 0)
        total += tl.sum(tl.where(kept, relative * tl.where(kept, part, 0.0), 0.0), 0).to(tl.float64)
    return total


@triton.jit
def _truncate(logits, settings, y, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = y + row * size
    temperature, k = tl.load(settings + row * 5), tl.load(settings + row * 5 + 1)
    p, min_p, typical = (
        tl.load(settings + row * 5 + 2), tl.load(settings + row * 5 + 3), tl.load(settings + row * 5 + 4)
    )  # fmt: skip
    most = _most(logits + row * size, size, BLOCK)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        part = tl.load(logits + row * size + at, mask=at < size, other=0.0)
        tl.store(x + at, tl.math.div_rn(part - most, temperature), mask=at < size)
    tl.debug_barrier()  # other threads of this program read what was written

    limit = tl.full([], INFINITE, tl.int32)
    floor = tl.full([], 0.0, tl.float32)
    mean = tl.full([], 0.0, tl.float32)
    if k > 0:
        limit = _smallest_bound(x, size, k.to(tl.float64), limit, floor, mean, COUNT, BLOCK)
    if p < 1:
        goal = p.to(tl.float64) * _sum_up_to(x, size, INFINITE, limit, floor, mean, MASS, BLOCK)
        limit = tl.minimum(limit, _smallest_bound(x, size, goal, limit, floor, mean, MASS, BLOCK))
    if min_p > 0:
        floor = min_p  # the likeliest token has the relative probability 1
    bound = tl.full([], 0x7FFFFFFF, tl.int32)
    goal = tl.full([], 0.0, tl.float64)
    before = tl.full([], 0.0, tl.float64)
    if typical < 1:
        total = _sum_up_to(x, size, INFINITE, limit, floor, mean, MASS, BLOCK)
        # The distance of -log probability from the entropy: the normalizer cancels.
        mean = (_mean(x, size, limit, floor, BLOCK) / total).to(tl.float32)
        goal = typical.to(tl.float64) * total
        bound = _smallest_bound(x, size, goal, limit, floor, mean, NEAREST, BLOCK)
        before = _sum_up_to(x, size, bound - 1, limit, floor, mean, NEAREST, BLOCK)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        part = tl.load(x + at, mask=at < size, other=float("-inf"))
        relative, kept = _candidates(part, limit, floor)
        distance = _distance(part, mean)
        equal = kept & (distance == bound)  # of these, the first ones are kept until the goal is reached
        mass = tl.where(equal, relative, 0.0).to(tl.float64)
        kept = kept & ((distance < bound) | (equal & (before + tl.cumsum(mass, 0) - mass < goal)))
        before += tl.sum(mass, 0)
        tl.store(x + at, tl.where(kept, part, float("-inf")), mask=at < size)


@triton.jit
def _draw(logits, numbers, ids, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * size
    most = _most(x, size, BLOCK)
    total = tl.full([], 0.0, tl.float64)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        part = tl.exp(tl.load(x + at, mask=at < size, other=float("-inf")) - most)
        total += tl.sum(part.to(tl.float64), 0)
    goal = tl.load(numbers + row) * total
    found = tl.full([], 0x7FFFFFFF, tl.int32)
    last = tl.full([], 0, tl.int32)  # the last token with a probability: rounding may keep the sum below the goal
    before = tl.full([], 0.0, tl.float64)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        part = tl.exp(tl.load(x + at, mask=at < size, other=float("-inf")) - most)
        mass = part.to(tl.float64)
        reached = (before + tl.cumsum(mass, 0) > goal) & (part > 0)
        found = tl.minimum(found, tl.min(tl.where(reached, at, 0x7FFFFFFF), 0))
        last = tl.maximum(last, tl.max(tl.where(part > 0, at, 0), 0))
        before += tl.sum(mass, 0)
    tl.store(ids + row, tl.minimum(found, last).to(tl.int64))


def finite(x: Tensor) -> Tensor:
    x = readable(x)
    y = torch.empty(len(x), dtype=torch.bool, device=x.device)
    if len(x):
        _finite[(len(x),)](x, y.view(torch.int8), x.shape[1], BLOCK=BLOCK, num_warps=8)
    return y


def argmax(x: Tensor) -> Tensor:
    x = readable(x)
    ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if len(x):
        _argmax[(len(x),)](x, ids, x.shape[1], BLOCK=BLOCK, num_warps=8)
    return ids


def truncate(logits: Tensor, settings: Tensor) -> Tensor:
    logits, settings = logits.float().contiguous(), settings.float().contiguous()
    y = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if y.numel():
        _truncate[(len(logits),)](logits, settings, y, logits.shape[1], BLOCK=BLOCK, num_warps=16)
    return y


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    logits, numbers = logits.float().contiguous(), numbers.double().contiguous()
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits):
        _draw[(len(logits),)](logits, numbers, ids, logits.shape[1], BLOCK=BLOCK, num_warps=16)
    return ids


def specializations() -> Iterator[Specialization]:
    """Yield the kernels; the sampler has logits in float32."""
    types = {"x": "*fp32", "logits": "*fp32", "settings": "*fp32", "numbers": "*fp64", "ids": "*i64", "size": "i32"}
    cases: list[tuple[Any, str, int]] = [(_truncate, "*fp32", 16), (_draw, "", 16), (_argmax, "", 8)]
    for kernel, y, count in cases:
        signature = {argument: (types | {"y": y, "BLOCK": "constexpr"})[argument] for argument in kernel.arg_names}
        yield Specialization(f"{kernel.__name__[1:]}", kernel, signature, {"BLOCK": BLOCK}, count)
    for name in TYPES.values():
        signature = {"x": f"*{name}", "y": "*i8", "size": "i32", "BLOCK": "constexpr"}
        yield Specialization(f"finite-{name}", _finite, signature, {"BLOCK": BLOCK}, 8)
