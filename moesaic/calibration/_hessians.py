"""Hessians of the quantization error: sums of x x^T over the inputs x of a layer.

An expert sees only some of the tokens, and a token's output depends on the expert by its routing probability p. The
inputs of an expert are therefore weighted by p^2. An expert that saw fewer tokens than its matrix has columns would
have a Hessian without full rank, which says nothing about most directions. It gets as many tokens as it lacks from the
mean over all experts of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor


def hessian(inputs: Iterable[Tensor]) -> Tensor:
    """Return the sum of x x^T over the rows of ``inputs``, tensors [tokens, columns]: [columns, columns] float32."""
    total: Tensor | None = None
    for x in inputs:
        x = x.float()
        total = x.T @ x if total is None else total.addmm_(x.T, x)
    assert total is not None, "there are no inputs"
    return total


def with_floor(
    own: Tensor, weight: float, shared: Callable[[], Tensor], shared_weight: float, mean_weight: float
) -> Tensor:
    """Return the Hessian of an expert, filled up to as many tokens as it has columns.

    Args:
        own: the expert's Hessian [columns, columns]: the sum of p^2 x x^T over its tokens.
        weight: sum of p^2 over these tokens.
        shared: returns the sum of the Hessians of all experts of the layer; called only if tokens are missing.
        shared_weight: sum of p^2 over the tokens of all experts.
        mean_weight: mean of p^2 over the tokens of all experts.
    """
    missing = max(0.0, len(own) * mean_weight - weight)
    return own + shared() * (missing / shared_weight) if missing else own
