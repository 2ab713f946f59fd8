"""Which block type of GGUF files holds quantized weights exactly, and their codes in that type.

Files of other programs have groups of other lengths, scales in other dtypes, and zero points. A type holds such weights
if each number stays the same: the groups are cut into shorter ones with equal scales, the codes are shifted, and the
scales are float16 numbers. All of this is checked on the numbers themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.checkpoints._exact import Inexact, exact_cast
from moesaic.checkpoints._gguf_blocks import DECODERS
from moesaic.checkpoints._views import CodedView
from moesaic.formats import Codes
from moesaic.formats.grouped import Format

_BY_FORMAT = {decoder.format: name for name, decoder in DECODERS.items()}
_GENERAL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types for integer codes of groups of 32 columns with a float16 scale, the smallest first."""


def exact_types(view: CodedView) -> tuple[str, ...]:
    """Return the block types that hold the weights of ``view`` exactly, the smallest first.

    Raises:
        Inexact: there is none.
        CheckpointError: the weights cannot be read.
    """
    if view.format is None or view.format.order != "none":
        raise Inexact("they have no integer codes with a scale for each group of columns in order")
    if view.format in _BY_FORMAT:
        return (_BY_FORMAT[view.format],)
    if view.format.levels != "linear":
        raise Inexact(f"no type has the levels of {view.format.levels}")
    if view.format.is_super:
        raise Inexact("no type has their groups and scales")
    if view.info.shape[-1] % 32:
        raise Inexact(f"types have groups of 32 columns, which do not divide {view.info.shape[-1]}")
    codes = view.codes()
    found = tuple(name for name in _GENERAL if recoded(name, view.format, codes) is not None)
    if not found:
        exact = exact_cast(codes.scale, torch.float16) is not None
        raise Inexact("no type has their levels and zero points" if exact else "their scales are not float16 numbers")
    return found


def recoded(kind: str, source: Format, codes: Codes) -> Codes | None:
    """Return ``codes`` of the format ``source`` as codes of the block type ``kind``; None if a number would change."""
    target = DECODERS[kind].format
    if source == target:
        return codes
    columns = codes.codes.shape[-1]
    scale = _regrouped(codes.scale, source.group, columns)
    offset = None if codes.offset is None else _regrouped(codes.offset, source.group, columns)
    if scale is None or (codes.offset is not None and offset is None):
        return None
    scale = exact_cast(scale, torch.float16)
    if scale is None:
        return None
    if source.offset == "value":
        offset = None if offset is None else exact_cast(offset, torch.float16)
        if target.offset != "value" or source.bits > target.bits or offset is None:
            return None
        return Codes(codes.codes, scale, offset)
    zero = torch.full_like(scale, 1 << (source.bits - 1)) if offset is None else offset
    if target.offset == "value":
        offset = exact_cast(scale.float() * zero.float(), torch.float16)
        return None if source.bits > target.bits or offset is None else Codes(codes.codes, scale, offset)
    levels = codes.codes.short().unflatten(-1, (-1, target.group)) - zero.short()[..., None]
    shifted = levels + (1 << (target.bits - 1))
    if int(shifted.min()) < 0 or int(shifted.max()) >= 1 << target.bits:
        return None
    return Codes(shifted.to(torch.uint8).flatten(-2), scale)


def _regrouped(numbers: Tensor, group: int, columns: int) -> Tensor | None:
    """Return a number for each 32 columns instead of each ``group``; None if a group has different numbers."""
    if group == 16:
        if numbers.shape[-1] % 2 or not torch.equal(numbers[..., ::2], numbers[..., 1::2]):
            return None
        return numbers[..., ::2]
    return numbers.repeat_interleave(group // 32, -1)[..., : columns // 32]
