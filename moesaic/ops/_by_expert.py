"""The experts of a step one after the other: their tokens, and the weighted sum of their answers.

Legend: T tokens, d hidden size, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.errors import InvalidParameter

Expert = Callable[[int, Tensor], Tensor]
"""Returns the answers [n, d] of an expert, given its number and its inputs [n, d]."""


def weighted_sum(x: Tensor, ids: Tensor, scores: Tensor, experts: int, expert: Expert) -> Tensor:
    """Return the sum of the scores times the answers of the chosen experts for each token: [T, d] in x's dtype.

    Args:
        x: [T, d].
        ids: [T, k] int64, the chosen experts.
        scores: [T, k] float32, their weights.
        experts: E.
        expert: called once for each expert that a token has chosen.

    Raises:
        InvalidParameter: an id is not in 0 .. E - 1.
    """
    order = ids.flatten().argsort(stable=True)  # choices sorted by expert
    token = order // ids.shape[1]
    counts = _counts(ids.flatten(), experts)
    rows = x.index_select(0, token).split(counts)
    parts = [expert(number, part) for number, part in enumerate(rows) if counts[number]]
    total = torch.zeros_like(x, dtype=torch.float32)
    if parts:
        total = total.index_add(0, token, torch.cat(parts).float() * scores.flatten()[order, None])
    return total.to(x.dtype)


def _counts(ids: Tensor, experts: int) -> list[int]:
    """Return how often each expert 0, 1, ..., experts - 1 occurs in ``ids``."""
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= experts):
        raise InvalidParameter("ids", f"an id is out of range: there are {experts} experts")
    counts: list[int] = torch.bincount(ids, minlength=experts).tolist()
    return counts
