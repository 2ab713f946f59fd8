"""Decoders of the block types of GGUF files: from the bytes of blocks to codes, scales and floats.

A block holds the codes of 32 or 256 consecutive weights of a row. Some of the weights, a group, share a scale and
perhaps an offset. Each decoder only says where codes, scales and offsets lie, and which parameters of the format
``grouped`` describe them: weights in that format keep the numbers of the file. This module does not depend on files.

Legend: n blocks, e weights in a block, g groups in a block. Layouts: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.formats import Codes
from moesaic.formats._threads import for_each_chunk
from moesaic.formats.grouped import Format
from moesaic.gguf import TYPES, BlockType


@dataclass(frozen=True)
class BlockDecoder:
    """A block type of GGUF and its decoder."""

    type: BlockType
    format: Format
    """The format that keeps the codes and scales of this type."""
    unpack: Callable[[Tensor], Codes]
    """Returns the codes [n, e], and the scales and offsets [n, g], of n blocks [n, bytes] uint8."""

    def decode_rows(self, rows: Tensor) -> Tensor:
        """Return the weights [..., columns] float32 of rows [..., blocks in a row, bytes] uint8."""
        [weights] = self._decode(rows, lambda blocks: {"weights": self.format.dequantize(self.unpack(blocks))}).values()
        return weights

    def unpack_rows(self, rows: Tensor) -> Codes:
        """Return the codes, scales and offsets of rows [..., blocks in a row, bytes] uint8."""
        return Codes(**self._decode(rows, lambda blocks: self.unpack(blocks).tensors()))

    def _decode(self, rows: Tensor, decode: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors [..., columns] of rows [..., blocks in a row, bytes], by name.

        ``decode`` returns the tensors [n, columns of a block] of blocks [n, bytes], by name. Large inputs are
        decoded in pieces, by several threads.
        """
        blocks = rows.reshape(-1, self.type.nbytes)
        sample = decode(blocks.new_zeros(1, self.type.nbytes))
        empty = {name: tensor.new_empty(len(blocks), tensor.shape[1]) for name, tensor in sample.items()}

        def decode_piece(span: slice) -> None:
            for name, tensor in decode(blocks[span]).items():
                empty[name][span] = tensor

        for_each_chunk(decode_piece, (len(blocks), self.type.elements), blocks.device)
        return {name: part.reshape(*rows.shape[:-2], rows.shape[-2] * part.shape[1]) for name, part in empty.items()}


def _half(blocks: Tensor, begin: int) -> Tensor:
    """Return the float16 at byte ``begin`` of each block as [n, 1]."""
    return blocks[:, begin : begin + 2].contiguous().view(torch.float16)


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


def _fifth_bits(packed: Tensor) -> Tensor:
    """Return the fifth bits of 32 codes, stored in four bytes [n, 4], as 0 or 16: [n, 32]."""
    return _bits(packed[:, :, None], 1, 8).reshape(len(packed), 32) << 4


def _q4_0(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 2:], 16), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), -_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6]), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return Codes(codes, _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Codes:
    return Codes(blocks[:, 2:] ^ 128, _half(blocks, 0))  # int8 plus 128


def _q2_k(blocks: Tensor) -> Codes:
    """16 groups of 16, each with one byte for scale and offset. 32 bytes hold the codes of each half of the block."""
    scales, packed = blocks[:, :16], blocks[:, 16:80].reshape(-1, 2, 32)
    codes = _bits(packed, 2, 4).reshape(-1, 256)
    return Codes(codes, scales & 15, scales >> 4, _half(blocks, 80), _half(blocks, 82))


def _q3_k(blocks: Tensor) -> Codes:
    """16 groups of 16: the third bits of codes, the lower two as in Q2_K, and scales of six bits in twelve bytes."""
    low = _bits(blocks[:, 32:96].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    third = _bits(blocks[:, :32], 1, 8).reshape(-1, 256)
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8], 8) | (_bits(packed[:, 8:], 2, 4).reshape(-1, 16) << 4)
    return Codes(low | (third << 2), scales.to(torch.int8) - 32, super_scale=_half(blocks, 108))


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eight scales and eight offsets [n, 8] in the twelve bytes that Q4_K and Q5_K have for them."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (last & 15) | ((first >> 6) << 4)), 1)
    return scales, torch.cat((second & 63, (last >> 4) | ((second >> 6) << 4)), 1)


def _q4_k(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 16:], 32)
    return Codes(codes, *_six_bit_scales(blocks[:, 4:16]), _half(blocks, 0), _half(blocks, 2))


def _q5_k(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 48:], 32) | (_bits(blocks[:, 16:48], 1, 8).reshape(-1, 256) << 4)
    return Codes(codes, *_six_bit_scales(blocks[:, 4:16]), _half(blocks, 0), _half(blocks, 2))


def _q6_k(blocks: Tensor) -> Codes:
    """16 groups of 16: each half of the block has 64 bytes of lower nibbles and 32 bytes of upper bit pairs."""
    low = _nibbles(blocks[:, :128], 64)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    return Codes(low | (high << 4), blocks[:, 192:208].view(torch.int8), super_scale=_half(blocks, 208))


def _iq4_nl(blocks: Tensor) -> Codes:
    return Codes(_nibbles(blocks[:, 2:], 16), _half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Codes:
    """8 groups of 32: the scales have four bits in four bytes and two bits in the two bytes before them."""
    low = _nibbles(blocks[:, 4:8], 1)
    high = _bits(blocks[:, 2:4, None], 2, 4).reshape(-1, 8)
    scales = (low | (high << 4)).to(torch.int8) - 32
    return Codes(_nibbles(blocks[:, 8:], 16), scales, super_scale=_half(blocks, 0))


def _mxfp4(blocks: Tensor) -> Codes:
    """The scale is 2^(e - 128) for the first byte e: half of MXFP4's, for doubled levels. It is subnormal if e < 2."""
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return Codes(_nibbles(blocks[:, 1:], 16), bits.view(torch.float32).bfloat16())


_TYPES: Mapping[str, tuple[Format, Callable[[Tensor], Codes]]] = {
    "Q4_0": (Format(), _q4_0),
    "Q4_1": (Format(offset="value"), _q4_1),
    "Q5_0": (Format(5), _q5_0),
    "Q5_1": (Format(5, offset="value"), _q5_1),
    "Q8_0": (Format(8), _q8_0),
    "Q2_K": (Format(2, 16, "super4", "value"), _q2_k),
    "Q3_K": (Format(3, 16, "super"), _q3_k),
    "Q4_K": (Format(4, 32, "super", "value"), _q4_k),
    "Q5_K": (Format(5, 32, "super", "value"), _q5_k),
    "Q6_K": (Format(6, 16, "super"), _q6_k),
    "IQ4_NL": (Format(levels="iq4_nl"), _iq4_nl),
    "IQ4_XS": (Format(scale="super", levels="iq4_nl"), _iq4_xs),
    "MXFP4": (Format(scale="bfloat16", levels="mxfp4"), _mxfp4),
}
DECODERS: Mapping[str, BlockDecoder] = {
    kind.name: BlockDecoder(kind, *_TYPES[kind.name]) for kind in TYPES.values() if kind.name in _TYPES
}
"""The decoder of each block type, by its name."""
