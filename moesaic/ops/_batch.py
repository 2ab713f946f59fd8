"""The tensors of a step: the Batch that ops work on, its key/value cache, and the Group of ranks that shares a model.

Legend: T tokens of this step, S sequences, R rows of logits, H query heads, G key/value heads, D head size, B block
size.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from moesaic.errors import InvalidParameter


@dataclass(frozen=True)
class Cache:
    """The paged key/value cache: block b of layer l is ``keys[l][b]``.

    Memory is allocated in blocks of B tokens; token i of block b has slot b * B + i.

    An int8 cache rounds each token's key and value head by head: x = scale * q with q = round(x * 127 / max |x|), to
    nearest, ties to even, and scale = max |x| / 127 in float32. If max |x| is at most 2^-100, q is 0. If a value is
    not finite, q is 0 and the scale is NaN, so the whole head reads as NaN. A float32 scale takes two bytes per head
    more than a bfloat16 scale (1.5% at D = 128). In return, its rounding cannot push q beyond 127, and its range covers
    that of x.
    """

    keys: Sequence[Tensor]  # per layer [blocks, B, G, D]
    values: Sequence[Tensor]  # per layer [blocks, B, G, D]
    key_scales: Sequence[Tensor] = ()  # only for int8, per layer [blocks, B, G] float32
    value_scales: Sequence[Tensor] = ()  # only for int8, per layer [blocks, B, G] float32

    @classmethod
    def zeros(
        cls,
        shapes: Sequence[tuple[int, int]],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        lazy: bool = False,
    ) -> Cache:
        """Return a cache of zeros. ``shapes`` has (G, D) of each layer; ``dtype`` is a floating-point dtype or int8.

        With ``lazy``, a cache on the CPU takes memory page by page when it is first written.
        """
        lazy = lazy and torch.empty(0, device=device).device.type == "cpu"

        def memory(*sizes: tuple[int, ...], dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            zeros = _lazy_zeros if lazy else functools.partial(torch.zeros, device=device)
            return tuple(zeros((blocks, block_size, *size), dtype=dtype) for size in sizes)

        if dtype != torch.int8:
            return cls(memory(*shapes), memory(*shapes))
        heads = [(count,) for count, _ in shapes]
        scales = [memory(*heads, dtype=torch.float32) for _ in range(2)]
        return cls(memory(*shapes), memory(*shapes), *scales)

    @staticmethod
    def bytes_per_token(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
        """Return the bytes that the keys and values of one token take in all layers.

        ``shapes`` has (G, D) of each layer; ``dtype`` is that of the cache.
        """
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        return sum(2 * heads * (size * dtype.itemsize + scale) for heads, size in shapes)

    def tensors(self) -> Sequence[Tensor]:
        """Return all tensors of the cache; the first axis of each is the block."""
        return (*self.keys, *self.values, *self.key_scales, *self.value_scales)

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]


def _lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros; unlike that of ``torch.zeros``, a page takes memory only when it is first written."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)  # keeps the pages mapped


@dataclass(frozen=True)
class Batch:
    """One step of the engine as flat tensors: "run tokens [cached : cached + n] of these sequences".

    The tokens of a sequence are consecutive, and there is no padding. If ``cache`` is None (training, scoring), every
    sequence is complete and starts at position 0, and slots and tables are empty.
    """

    tokens: Tensor  # [T] int64, token ids
    positions: Tensor  # [T] int64, position of each token in its sequence
    starts: tuple[int, ...]  # [S + 1], sequence s owns tokens starts[s] : starts[s + 1]
    lengths: tuple[int, ...]  # [S], tokens of each sequence after this step, including cached ones
    slots: Tensor  # [T] int64, cache slot for the key and value of each token
    tables: Tensor  # [S, blocks] int64, cache blocks of each sequence in order; -1: freed or unused
    outputs: Tensor  # [R] int64, rows whose logits are needed
    cache: Cache | None

    @functools.cached_property
    def offsets(self) -> Tensor:
        """``starts`` as a tensor [S + 1] int64, which the attention kernel of every layer reads."""
        return torch.tensor(self.starts, dtype=torch.int64, device=self.tokens.device)

    @classmethod
    def whole(cls, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
        """Return a batch of complete sequences without a cache; the logits of every row are needed."""
        lengths = tuple(len(ids) for ids in sequences)
        starts = (0, *(sum(lengths[: i + 1]) for i in range(len(lengths))))
        positions = [position for length in lengths for position in range(length)]
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return cls(
            tokens=torch.tensor([token_id for ids in sequences for token_id in ids], dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            starts=starts,
            lengths=lengths,
            slots=empty,
            tables=empty.reshape(0, 0),
            outputs=torch.arange(starts[-1], device=device),
            cache=None,
        )


@dataclass(frozen=True)
class Group:
    """The ranks that share one model by tensor parallelism (Megatron-LM, arXiv:1909.08053 §3); one rank by default.

    A layer holds shard ``rank`` of ``size`` and calls ``sum`` or ``gather`` to combine partial results. ``handle`` is
    the torch process group; None: all ranks.
    """

    rank: int = 0
    size: int = 1
    handle: Any = None

    def share(self, total: int, noun: str) -> slice:
        """Return this rank's shard of ``total`` items; ``noun`` names them in the error message.

        Raises:
            InvalidParameter: the size of the group does not divide ``total``.
        """
        if total % self.size:
            raise InvalidParameter("group size", f"{self.size} ranks do not divide {total} {noun}")
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over all ranks; ``x`` itself is overwritten with it."""
        if self.size > 1:
            torch.distributed.all_reduce(x, group=self.handle)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return ``x`` of all ranks, concatenated along the last axis."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.handle)
        return torch.cat(parts, dim=-1)
