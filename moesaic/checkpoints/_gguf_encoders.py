"""Encoders of the block types of GGUF files: from codes and scales to the bytes of blocks.

Each is the inverse of the decoder of the same type in ``_gguf_blocks``, which describes the types. This module does not
depend on files.

Legend: n blocks, e weights in a block, g groups in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moesaic.checkpoints._gguf_blocks import DECODERS
from moesaic.formats import Codes
from moesaic.formats._threads import for_each_chunk


def encode_rows(kind: str, codes: Codes) -> Tensor:
    """Return the bytes [rows, bytes of a row] uint8 of a matrix of codes [rows, columns] in the block type ``kind``.

    The codes must have the format of that type, and the columns fill whole blocks.
    """
    block = DECODERS[kind].type
    rows, columns = codes.codes.shape
    blocks = columns // block.elements
    parts = {name: tensor.reshape(rows * blocks, -1) for name, tensor in codes.tensors().items()}
    out = torch.empty(rows * blocks, block.nbytes, dtype=torch.uint8)

    def encode(span: slice) -> None:
        out[span] = _ENCODERS[kind](Codes(**{name: part[span] for name, part in parts.items()}))

    for_each_chunk(encode, (len(out), block.elements), out.device)
    return out.reshape(rows, blocks * block.nbytes)


def _bytes(numbers: Tensor) -> Tensor:
    """Return the bytes [n, b] of numbers [n, ...]."""
    return numbers.contiguous().view(torch.uint8).flatten(1)


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """Return codes [n, 2 b] of four bits as bytes [n, b]; ``run`` codes are lower halves, the next are upper ones."""
    runs = codes.reshape(len(codes), -1, 2, run)
    return (runs[:, :, 0] & 15 | runs[:, :, 1] << 4).flatten(1)


def _bits(codes: Tensor, width: int) -> Tensor:
    """Return codes [n, ..., count, b] of ``width`` bits as bytes [n, ..., b], the first in the lowest bits."""
    shifts = torch.arange(codes.shape[-2], dtype=torch.uint8)[:, None] * width
    return ((codes & ((1 << width) - 1)) << shifts).sum(-2, dtype=torch.uint8)


def _fifth_bits(codes: Tensor) -> Tensor:
    """Return the fifth bits of 32 codes as four bytes [n, 4]."""
    return _bits((codes >> 4).reshape(len(codes), 4, 8, 1), 1).flatten(1)


def _offset(codes: Codes) -> Tensor:
    assert codes.offset is not None
    return codes.offset


def _supers(codes: Codes) -> list[Tensor]:
    """Return the bytes of the float16 factors of scales and offsets."""
    return [_bytes(part) for part in (codes.super_scale, codes.super_offset) if part is not None]


def _q4_0(codes: Codes) -> Tensor:
    return torch.cat((_bytes(codes.scale), _nibbles(codes.codes, 16)), 1)


def _q4_1(codes: Codes) -> Tensor:
    return torch.cat((_bytes(codes.scale), _bytes(-_offset(codes)), _nibbles(codes.codes, 16)), 1)


def _q5_0(codes: Codes) -> Tensor:
    return torch.cat((_bytes(codes.scale), _fifth_bits(codes.codes), _nibbles(codes.codes, 16)), 1)


def _q5_1(codes: Codes) -> Tensor:
    scales = _bytes(codes.scale), _bytes(-_offset(codes))
    return torch.cat((*scales, _fifth_bits(codes.codes), _nibbles(codes.codes, 16)), 1)


def _q8_0(codes: Codes) -> Tensor:
    return torch.cat((_bytes(codes.scale), codes.codes ^ 128), 1)  # uint8 minus 128


def _pairs(codes: Tensor) -> Tensor:
    """Return the lowest two bits of 256 codes as the 64 bytes of Q2_K; 32 bytes belong to each half of the block."""
    return _bits(codes.reshape(-1, 2, 4, 32), 2).flatten(1)


def _q2_k(codes: Codes) -> Tensor:
    scales = codes.scale.view(torch.uint8) | _offset(codes) << 4
    return torch.cat((scales, _pairs(codes.codes), *_supers(codes)), 1)


def _q3_k(codes: Codes) -> Tensor:
    third = _bits((codes.codes >> 2).reshape(-1, 8, 32), 1)
    scales = (codes.scale + 32).to(torch.uint8)
    packed = torch.cat((_nibbles(scales, 8), _bits((scales >> 4).reshape(-1, 4, 4), 2)), 1)
    return torch.cat((third, _pairs(codes.codes), packed, *_supers(codes)), 1)


def _six_bit_scales(codes: Codes) -> Tensor:
    """Return the twelve bytes of eight scales and eight offsets of six bits."""
    scale, offset = codes.scale.view(torch.uint8), _offset(codes)
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = offset[:, :4] | offset[:, 4:] >> 4 << 6
    return torch.cat((first, second, scale[:, 4:] & 15 | offset[:, 4:] << 4), 1)


def _q4_k(codes: Codes) -> Tensor:
    return torch.cat((*_supers(codes), _six_bit_scales(codes), _nibbles(codes.codes, 32)), 1)


def _q5_k(codes: Codes) -> Tensor:
    fifth = _bits((codes.codes >> 4).reshape(-1, 8, 32), 1)
    return torch.cat((*_supers(codes), _six_bit_scales(codes), fifth, _nibbles(codes.codes, 32)), 1)


def _q6_k(codes: Codes) -> Tensor:
    low, high = _nibbles(codes.codes, 64), _pairs(codes.codes >> 4)
    return torch.cat((low, high, codes.scale.view(torch.uint8), *_supers(codes)), 1)


def _iq4_xs(codes: Codes) -> Tensor:
    scales = (codes.scale + 32).to(torch.uint8)
    high = _bits((scales >> 4).reshape(-1, 2, 4, 1), 2).flatten(1)
    return torch.cat((*_supers(codes), high, _nibbles(scales, 1), _nibbles(codes.codes, 16)), 1)


def _mxfp4(codes: Codes) -> Tensor:
    """The bits of a bfloat16 scale 2^(e - 128) are (e - 1) << 7, or for e < 2 those of a subnormal number."""
    bits = codes.scale.view(torch.int16).int()
    exponent = torch.where(bits < 0x80, (bits == 0x40).int(), (bits >> 7) + 1)
    return torch.cat((exponent.to(torch.uint8), _nibbles(codes.codes, 16)), 1)


_ENCODERS: Mapping[str, Callable[[Codes], Tensor]] = {
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
    "IQ4_NL": _q4_0,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
