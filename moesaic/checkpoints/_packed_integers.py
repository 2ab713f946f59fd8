"""Unsigned integers of a few bits that are packed into words of 32 bits: views of them, and their packing.

The words along one axis are one string of bits, lowest bits first. An integer whose bits cross the border of two words
continues in the lowest bits of the next word. This module does not depend on the meaning of the integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.checkpoints._views import Index, InMemory, Part, TensorInfo, View, bounds

WORD = 32
"""Bits of a word."""


class PackedIntegers:
    """View of the integers, as uint8, that a view of int32 words packs along ``axis``; only whole blocks are read.

    A block is the smallest number of words that holds whole integers: one word, or three words for three bits.

    Args:
        words: the words, with any number of axes; an incomplete block at the end of ``axis`` is ignored.
        axis: the axis along which integers are packed.
        bits: bits of an integer: 1 to 8.
        order: for each integer of a block, its place in the block, counted from the lowest bits; None: 0, 1, 2, ...
    """

    def __init__(self, words: View, axis: int, bits: int, order: Sequence[int] | None = None) -> None:
        self._words, self._axis, self._bits = words, axis, bits
        self._block = math.lcm(WORD, bits) // WORD
        self._order = order or range(self._block * WORD // bits)
        shape = list(words.info.shape)
        shape[axis] = shape[axis] // self._block * len(self._order)
        self.info = TensorInfo(tuple(shape), torch.uint8, words.info.file)

    def read(self, index: Index | None = None) -> Tensor:
        blocks, rest = self._blocks(index)
        return self._unpack(self._words.read(blocks))[rest]

    def load(self, index: Index) -> View:
        """Read the words of the part that ``index`` selects, and return a view that unpacks them from memory.

        Parts of that view may be read in several threads.
        """
        blocks, rest = self._blocks(index)
        words = InMemory(self._words.read(blocks), self.info.file)
        return Part(PackedIntegers(words, self._axis, self._bits, self._order), rest)

    def _blocks(self, index: Index | None) -> tuple[Index, Index]:
        """Return the index of the whole blocks of words that hold a part, and the index of the part in them."""
        part = list(bounds(index, self.info.shape))
        wanted, count = part[self._axis], len(self._order)
        first, last = wanted.start // count, -(-wanted.stop // count)
        part[self._axis] = slice(first * self._block, last * self._block)
        rest = [slice(None)] * len(part)
        rest[self._axis] = slice(wanted.start - first * count, wanted.stop - first * count)
        return tuple(part), tuple(rest)

    def _unpack(self, words: Tensor) -> Tensor:
        """Return the integers in whole blocks of words."""
        axis, bits = self._axis, self._bits
        blocks = words.unflatten(axis, (words.shape[axis] // self._block, self._block))
        shape = (*blocks.shape[: axis + 1], len(self._order), *blocks.shape[axis + 2 :])
        integers = torch.empty(shape, dtype=torch.uint8)
        for number, place in enumerate(self._order):
            word, shift = divmod(place * bits, WORD)
            value = blocks.select(axis + 1, word) >> shift
            if shift + bits > WORD:
                lower = (1 << (WORD - shift)) - 1  # the shift has filled the upper bits with the sign
                value = value & lower | blocks.select(axis + 1, word + 1) << (WORD - shift)
            integers.select(axis + 1, number).copy_(value & ((1 << bits) - 1))
        return integers.flatten(axis, axis + 1)


def pack_integers(integers: Tensor, axis: int, bits: int) -> Tensor:
    """Return a matrix of uint8 integers of ``bits`` bits as int32 words, packed along ``axis``; zeros fill them up."""
    if axis == 0:
        return pack_integers(integers.T, 1, bits).T.contiguous()
    words = math.lcm(WORD, bits) // WORD
    count = words * WORD // bits
    rows, columns = integers.shape
    blocks = torch.nn.functional.pad(integers, (0, -columns % count)).reshape(rows, -1, count)
    packed = torch.zeros(rows, blocks.shape[1], words, dtype=torch.int64)
    for place in range(count):
        word, shift = divmod(place * bits, WORD)
        value = blocks[:, :, place].long() << shift
        packed[:, :, word] |= value & 0xFFFFFFFF
        if shift + bits > WORD:
            packed[:, :, word + 1] |= value >> WORD
    signed = torch.where(packed >= 1 << (WORD - 1), packed - (1 << WORD), packed)
    return signed.to(torch.int32).flatten(1)[:, : -(-columns * bits // WORD)].contiguous()
