"""Gradients through weights that are not trained themselves, in any format.

The forward computation is that of the fast backends. The backward one dequantizes a weight again, some rows at a time,
so that a quantized weight never exists as a whole in floats (QLoRA, arXiv:2305.14314 §3).

Legend: T tokens, d hidden size, f intermediate size, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.formats import Packed
from moesaic.formats._plain import Plain
from moesaic.ops._by_expert import weighted_sum
from moesaic.ops._dispatch import pick

ROWS = 4096
"""Rows of a weight that are dequantized at a time."""

Delta = Callable[[str, int, Tensor], Tensor | None]
"""Returns what is added to the product of a matrix of an expert, given "gate", "up" or "down", the expert's number, and
its inputs [n, in]: [n, out], or None for nothing."""


class _Linear(torch.autograd.Function):
    """``ops.linear`` with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, dtype: torch.dtype | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return pick("linear", x.device, weight.name, False)(x, weight, dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        weight, dtype = ctx.weight, ctx.dtype
        gradient = gradient.to(dtype)
        if isinstance(weight.format, Plain):
            return gradient @ weight.dequantize(dtype), None, None
        read = pick("embedding", gradient.device, weight.name, False)
        total = gradient.new_zeros(len(gradient), weight.shape[1])
        for begin in range(0, weight.shape[0], ROWS):
            ids = torch.arange(begin, min(begin + ROWS, weight.shape[0]), device=gradient.device)
            total.addmm_(gradient[:, begin : begin + ROWS], read(ids, weight, dtype))
        return total, None, None


def linear(x: Tensor, weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """Return what ``ops.linear`` does, with a gradient for x."""
    return _Linear.apply(x, weight, dtype)  # type: ignore[no-any-return, no-untyped-call]


def experts(
    x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor, delta: Delta | None = None
) -> Tensor:
    """Return what ``ops.experts`` does, one expert after the other, with gradients for x and scores.

    ``delta`` adds something to the product of each matrix, such as a low-rank adapter.
    """

    def expert(number: int, inputs: Tensor) -> Tensor:
        def product(name: str, stack: Packed, inputs: Tensor) -> Tensor:
            y = linear(inputs, stack.entry(number))
            change = delta(name, number, inputs) if delta else None
            return y if change is None else y + change.to(y.dtype)

        inner = F.silu(product("gate", gate, inputs).float()) * product("up", up, inputs).float()
        return product("down", down, inner.to(x.dtype))

    return weighted_sum(x, ids, scores, gate.shape[0], expert)
