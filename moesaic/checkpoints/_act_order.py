"""Act-order: weights whose groups are not consecutive columns, because columns were grouped by their importance.

A file then has a tensor ``g_idx`` with the number of the group of each column (``desc_act`` of GPTQ, arXiv:2210.17323;
``actorder`` of compressed-tensors). Sorted by these numbers, the columns of a group are neighbours. The format
``grouped`` stores them in this order.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoints._views import Shape, bounds
from moesaic.errors import CheckpointError


def check_groups(name: str, g_idx: Tensor, count: int, file: Path) -> None:
    """Raise CheckpointError unless ``g_idx`` [columns] names each of ``count`` groups, and no other."""
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= count:
        problem = f"has group {high if high >= count else low} in g_idx, expected 0 to {count - 1}"
        raise CheckpointError(file, f"{name} {problem}")
    sizes = torch.bincount(g_idx, minlength=count)
    if not sizes.all():
        raise CheckpointError(file, f"{name} has no column of group {int(sizes.argmin())} in g_idx; it is damaged")


def are_consecutive(g_idx: Tensor, size: int) -> bool:
    """Return whether each group is ``size`` consecutive columns; the last one may have fewer."""
    return torch.equal(g_idx, torch.arange(len(g_idx)) // size)


def have_equal_sizes(g_idx: Tensor, size: int) -> bool:
    """Return whether each group has ``size`` columns; the last one may have fewer."""
    return are_consecutive(g_idx.sort().values, size)


def sorted_columns(g_idx: Tensor) -> Tensor:
    """Return the columns [columns] int64, sorted by their groups; columns of a group keep their order."""
    return g_idx.argsort(stable=True)


def refuse_cut(columns: slice, shape: Shape, file: Path) -> None:
    """Raise CheckpointError if ``columns`` are not all columns: a part of the columns has groups of unequal size."""
    if columns != bounds((slice(None), slice(None)), shape)[1]:
        cut = f"columns {columns.start} to {columns.stop}"
        raise CheckpointError(file, f"has weights in act-order, whose codes cannot be cut at {cut}")
