"""Decoders of the block types of GGUF files: from the bytes of blocks to codes, scales and floats.

A block holds the codes of 32 or 256 consecutive weights of a row. Some of the weights, a group, share a scale and
perhaps a minimum. Each decoder only says where codes, scales and minimums lie; the weights are

    weight = scale * code - minimum

in float32, with one rounding for the product and one for the difference, as in the reference implementation. This
module does not depend on files.

Legend: n blocks, e weights in a block, g groups in a block. Layouts: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.formats._threads import for_each
from moesaic.gguf import TYPES, BlockType

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of the four-bit floats, so that they are integers; the scale is halved instead."""
CHUNK = 1 << 18
"""Number of weights that a thread decodes at a time: its temporary tensors then stay in the processor's cache."""


class Codes(NamedTuple):
    """Content of blocks: codes [n, e] int8, scales [n, g] float32, minimums [n, g] float32 or None for zero."""

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None = None


@dataclass(frozen=True)
class BlockDecoder:
    """A block type of GGUF and its decoder; ``unpack`` turns n blocks, [n, bytes] uint8, into ``Codes``."""

    type: BlockType
    unpack: Callable[[Tensor], Codes]

    def decode(self, blocks: Tensor) -> Tensor:
        """Return the weights [n, e] float32 of blocks [n, bytes] uint8."""
        codes, scales, minimums = self.unpack(blocks)
        count, groups = scales.shape
        weights = codes.reshape(count, groups, -1).float().mul_(scales[:, :, None])
        if minimums is not None:
            weights.sub_(minimums[:, :, None])
        return weights.reshape(count, -1)

    def decode_rows(self, rows: Tensor) -> Tensor:
        """Return the weights [..., columns] float32 of rows [..., blocks in a row, bytes] uint8."""
        blocks = rows.reshape(-1, self.type.nbytes)
        out = torch.empty(len(blocks), self.type.elements)
        step = CHUNK // self.type.elements

        def decode(begin: int) -> None:
            out[begin : begin + step] = self.decode(blocks[begin : begin + step])

        if len(blocks):
            for_each(decode, range(0, len(blocks), step), out.device)
        return out.reshape(*rows.shape[:-2], rows.shape[-2] * self.type.elements)


def _half(blocks: Tensor, begin: int) -> Tensor:
    """Return the float16 at byte ``begin`` of each block as [n, 1] float32."""
    return blocks[:, begin : begin + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """Return the four-bit halves of bytes [n, b] as [n, 2 b].

    For each ``run`` bytes, the lower halves come first, then the upper ones.
    """
    runs = packed.reshape(len(packed), -1, run)
    out = runs.new_empty(len(packed), runs.shape[1], 2, run)
    torch.bitwise_and(runs, 15, out=out[:, :, 0])
    torch.bitwise_right_shift(runs, 4, out=out[:, :, 1])
    return out.reshape(len(packed), -1)


def _bits(packed: Tensor, width: int, count: int) -> Tensor:
    """Return the bytes [n, ..., b] cut into codes of ``width`` bits: [n, ..., count, b], lowest bits first.

    ``count`` is the number of codes that are taken from each byte.
    """
    shifts = torch.arange(count, dtype=torch.uint8)[:, None] * width
    return (packed[..., None, :] >> shifts) & ((1 << width) - 1)


def _signed(codes: Tensor, offset: int = 0) -> Tensor:
    """Return unsigned codes below 128 as int8 minus ``offset``; the tensor ``codes`` is overwritten."""
    signed = codes.view(torch.int8)
    return signed.sub_(offset) if offset else signed


def _lookup(codes: Tensor, values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int8).index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Return the fifth bits of 32 codes, stored in four bytes [n, 4], as 0 or 16: [n, 32]."""
    return _bits(packed[:, :, None], 1, 8).reshape(len(packed), 32) << 4


def _q4_0(blocks: Tensor) -> Codes:
    return Codes(_signed(_nibbles(blocks[:, 2:], 16), 8), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Codes:
    return Codes(_signed(_nibbles(blocks[:, 4:], 16)), _half(blocks, 0), -_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return Codes(_signed(codes, 16), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return Codes(_signed(codes), _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Codes:
    return Codes(blocks[:, 2:].view(torch.int8), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Codes:
    """Unpack Q2_K: 16 groups of 16 weights; each group has one byte with its scale and minimum.

    The codes of each half of the block are in 32 bytes.
    """
    scales, packed = blocks[:, :16], blocks[:, 16:80].reshape(-1, 2, 32)
    codes = _bits(packed, 2, 4).reshape(-1, 256)
    return Codes(_signed(codes), _half(blocks, 80) * (scales & 15).float(), _half(blocks, 82) * (scales >> 4).float())


def _q3_k(blocks: Tensor) -> Codes:
    """Unpack Q3_K: 16 groups of 16 weights.

    The lower two bits of the codes are stored as in Q2_K, and the third bits apart. The scales have six bits and are in
    twelve bytes.
    """
    low = _bits(blocks[:, 32:96].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    third = _bits(blocks[:, :32], 1, 8).reshape(-1, 256)
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8], 8) | (_bits(packed[:, 8:], 2, 4).reshape(-1, 16) << 4)
    return Codes(_signed(low | (third << 2), 4), _half(blocks, 108) * (scales.float() - 32))


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return eight scales and eight minimums, each [n, 8] float32, from the twelve bytes that Q4_K and Q5_K use."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (last & 15) | ((first >> 6) << 4)), 1)
    minimums = torch.cat((second & 63, (last >> 4) | ((second >> 6) << 4)), 1)
    return scales.float(), minimums.float()


def _q4_k(blocks: Tensor) -> Codes:
    scales, minimums = _six_bit_scales(blocks[:, 4:16])
    codes = _signed(_nibbles(blocks[:, 16:], 32))
    return Codes(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minimums)


def _q5_k(blocks: Tensor) -> Codes:
    scales, minimums = _six_bit_scales(blocks[:, 4:16])
    fifth = _bits(blocks[:, 16:48], 1, 8).reshape(-1, 256)
    codes = _signed(_nibbles(blocks[:, 48:], 32) | (fifth << 4))
    return Codes(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minimums)


def _q6_k(blocks: Tensor) -> Codes:
    """Unpack Q6_K: 16 groups of 16 weights.

    Each half of the block has the lower four bits of its codes in 64 bytes, and the upper two bits in 32 bytes.
    """
    low = _nibbles(blocks[:, :128], 64)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    scales = blocks[:, 192:208].view(torch.int8).float()
    return Codes(_signed(low | (high << 4), 32), _half(blocks, 208) * scales)


def _iq4_nl(blocks: Tensor) -> Codes:
    return Codes(_lookup(_nibbles(blocks[:, 2:], 16), IQ4_VALUES), _half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Codes:
    """Unpack IQ4_XS: 8 groups of 32 weights with scales of six bits.

    The lower four bits of the scales are in four bytes, and the upper two bits in the two bytes before them.
    """
    low = _nibbles(blocks[:, 4:8], 1)
    high = _bits(blocks[:, 2:4, None], 2, 4).reshape(-1, 8)
    scales = (low | (high << 4)).float() - 32
    return Codes(_lookup(_nibbles(blocks[:, 8:], 16), IQ4_VALUES), _half(blocks, 0) * scales)


def _mxfp4(blocks: Tensor) -> Codes:
    """Unpack MXFP4: the scale is a power of two, whose exponent is the first byte.

    The scale is halved, because ``MXFP4_VALUES`` are doubled. For the two smallest exponents it is a subnormal float32.
    """
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return Codes(_lookup(_nibbles(blocks[:, 1:], 16), MXFP4_VALUES), bits.view(torch.float32))


_UNPACK: Mapping[str, Callable[[Tensor], Codes]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
DECODERS: Mapping[str, BlockDecoder] = {
    kind.name: BlockDecoder(kind, _UNPACK[kind.name]) for kind in TYPES.values() if kind.name in _UNPACK
}
"""The decoder of each block type by its name."""
