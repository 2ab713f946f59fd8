"""The order of examples, and their division into batches.

Sequences lie one after the other without padding, and attention does not cross from one to the next, so packing mixes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def batches(count: int, batch: int, seed: int, skip: int = 0) -> Iterator[list[int]]:
    """Yield the numbers of the examples of each step, without an end.

    Each pass over ``count`` examples has an order of its own, which depends on ``seed``. ``skip`` steps are left out.
    """
    step, left, epoch = 0, list[int](), 0
    while True:
        while len(left) < batch:
            generator = torch.Generator().manual_seed(seed + epoch)
            left += torch.randperm(count, generator=generator).tolist()
            epoch += 1
        chosen, left = left[:batch], left[batch:]
        if step >= skip:
            yield chosen
        step += 1


def parts(items: Sequence[T], sizes: Sequence[int], limit: int) -> Iterator[list[T]]:
    """Yield ``items`` in order, in parts whose ``sizes`` sum to at most ``limit``; a larger item is a part alone."""
    part, total = list[T](), 0
    for item, size in zip(items, sizes, strict=True):
        if part and total + size > limit:
            yield part
            part, total = [], 0
        part.append(item)
        total += size
    if part:
        yield part
