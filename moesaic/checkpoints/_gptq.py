"""GPTQ: weights of 2, 3, 4 or 8 bits, as AutoGPTQ, GPTQModel and optimum write them (arXiv:2210.17323).

A linear layer NAME with a weight [out, in] has the tensors

    NAME.qweight    [in * bits / 32, out] int32, codes packed along the first axis
    NAME.qzeros     [groups, out * bits / 32] int32, zero points packed along the second axis
    NAME.scales     [groups, out]
    NAME.g_idx      [in], the group of each column of the weight; may be absent

Version 1 of the layout stores each zero point minus one, version 2 (``gptq_v2``) stores it as it is. AutoGPTQ subtracts
the one from each zero point. GPTQModel subtracts a constant from each word instead, so that a zero point of 0 borrows
from the next one. For three bits, its releases before 7.0 interchange the constants of the first and the third word, so
the same constants must be added again. For three bits, release 7.0 and later subtract from each zero point.

Whether columns are in act-order follows from ``g_idx``. The setting ``desc_act`` only says whether ``g_idx`` must
exist; without it, a ``g_idx`` of zeros is ignored. Other layouts, such as Marlin's, are refused.

Sources: ``pack`` in auto_gptq/nn_modules/qlinear/qlinear_cuda.py of AutoGPTQ 0.7.1, and
``convert_gptq_v2_to_v1_format_module`` in gptqmodel/utils/model.py of GPTQModel 6.0.3 and 7.6.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._grouped_weight import SCALES, GroupedWeight, Parts
from moesaic.checkpoints._packed_integers import WORD, PackedIntegers
from moesaic.checkpoints._packed_modules import Module, choose, group_size, weights
from moesaic.checkpoints._views import Index, TensorInfo, View, bounds

PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")
_GROUP_SIZES = tuple(1 << exponent for exponent in range(4, 16))
"""The group sizes that a module may have if the settings do not give its own."""
_WORD_CONSTANTS = {
    2: (0x55555555,),
    3: (0x24924924, 0x92492492, 0x49249249),
    4: (0x11111111,),
    8: (0x01010101,),
}
"""By bits: the numbers that GPTQModel subtracts from the words of zero points; those of a row take them in turn."""


def weight_views(stored: Mapping[str, View], settings: Mapping[str, Any], path: Path) -> dict[str, View]:
    """Return ``stored`` with the weights of quantized modules, as ``GroupedWeight``, in place of their tensors.

    ``_quantized`` describes the arguments.

    Raises:
        ConfigError: a setting is not supported.
        CheckpointError: a tensor is missing, or has the wrong dtype or shape.
    """
    return weights(stored, PARTS, _settings(Fields(settings, path)).weight)


@dataclass(frozen=True)
class _Settings:
    """The settings that the layout of the tensors depends on."""

    bits: int
    group_size: int
    """Columns in a group; -1: all columns."""
    act_order: bool
    differ: bool
    """Whether modules may have other bits and group sizes than these; their tensors then show which."""
    version: str
    gptqmodel: int | None
    """Major version of the GPTQModel release that wrote the file; None: another program wrote it."""

    def weight(self, module: Module) -> View:
        """Return the weight of a module."""
        qweight = module.take("qweight", (torch.int32,))
        words, rows = qweight.info.shape
        bits = self._bits(module, words)
        if words * WORD % bits or (bits == 3 and words % 3):
            raise module.error("qweight", f"has {words} rows, which do not hold whole codes of {bits} bits")
        columns = words * WORD // bits
        scales = module.take("scales", SCALES)
        size = self._group_size(module, columns, scales.info.shape[0])
        groups = -(-columns // size)
        scales = module.take("scales", SCALES, (groups, rows))
        if rows * bits % WORD:
            raise module.error("qweight", f"has {rows} columns, expected a multiple of {WORD // math.gcd(WORD, bits)}")
        zeros = self._zeros(module.take("qzeros", (torch.int32,), (groups, rows * bits // WORD)), bits)
        g_idx = None
        if "g_idx" in module.tensors or (self.act_order and groups > 1):
            g_idx = module.take("g_idx", (torch.int32, torch.int64), (columns,))
        parts = Parts(PackedIntegers(qweight, 0, bits), zeros, scales, g_idx)
        return GroupedWeight(f"{module.name}.qweight", parts, bits, size, zero_g_idx=not self.act_order)

    def _bits(self, module: Module, words: int) -> int:
        """Return the bits of a module's codes; ``words`` is the number of words for each row of the weight."""
        if not self.differ:
            return self.bits
        if "g_idx" not in module.tensors:
            raise module.error("g_idx", "is missing: with 'dynamic' settings it shows the bits of the module")
        columns = module.tensors["g_idx"].info.nbytes // module.tensors["g_idx"].info.dtype.itemsize
        found = [bits for bits in BITS if columns * bits == words * WORD]
        if not found:
            raise module.error(
                "qweight", f"has {words} rows for {columns} columns, expected codes of 2, 3, 4 or 8 bits"
            )
        return found[0]

    def _group_size(self, module: Module, columns: int, groups: int) -> int:
        """Return the columns in a group of a module, at most all of them."""
        size = columns if self.group_size == -1 else min(self.group_size, columns)
        if self.differ and groups != -(-columns // size):
            sizes = [size for size in (columns, *_GROUP_SIZES) if -(-columns // size) == groups]
            if not sizes:
                raise module.error(
                    "scales", f"has {groups} groups for {columns} columns, expected groups of 2^n columns"
                )
            return sizes[0]
        return size

    def _zeros(self, qzeros: View, bits: int) -> View:
        if self.version == "gptq_v2":
            return PackedIntegers(qzeros, 1, bits)
        if self.gptqmodel is not None and (bits != 3 or self.gptqmodel < 7):
            return PackedIntegers(_Increased(qzeros, _WORD_CONSTANTS[bits]), 1, bits)
        return _Increased(PackedIntegers(qzeros, 1, bits), (1,), (1 << bits) - 1)


def _settings(fields: Fields) -> _Settings:
    """Return the settings, or raise ConfigError if the tensors have a layout that is not supported."""
    choose(fields, "pack_dtype", ("int32",), "int32")
    choose(fields, "is_marlin_format", (False,), False)
    for name in ("rotation", "adapter"):  # they change what the model computes
        choose(fields, name, (None,), None)
    older = choose(fields, "checkpoint_format", VERSIONS, "gptq")
    return _Settings(
        bits=choose(fields, "bits", BITS),
        group_size=group_size(fields),
        act_order=choose(fields, "desc_act", (True, False), False),
        differ=bool(fields.take("dynamic", None)),
        version=choose(fields, "format", VERSIONS, older),
        gptqmodel=_gptqmodel(fields.take("meta", None)),
    )


def _gptqmodel(meta: Any) -> int | None:
    """Return the major version of GPTQModel that ``meta``, a record of the programs that wrote a file, has; or None."""
    programs = meta.get("quantizer") if isinstance(meta, Mapping) else None
    for program in programs if isinstance(programs, list) else [programs]:
        if isinstance(program, str) and (match := re.match(r"gptqmodel:(\d{1,4})\.", program)):
            return int(match[1])
    return None


class _Increased:
    """View of a matrix of integers with ``amounts`` added to its columns; overflowing bits are dropped.

    Column i gets the amount i modulo the number of amounts. ``mask`` has the bits that are kept; None: all bits of the
    dtype.
    """

    def __init__(self, other: View, amounts: tuple[int, ...], mask: int | None = None) -> None:
        self._other, self._mask = other, mask
        self.info: TensorInfo = other.info
        self._amounts = torch.tensor(amounts).to(self.info.dtype)

    def read(self, index: Index | None = None) -> Tensor:
        rows, columns = bounds(index, self.info.shape)
        turns = torch.arange(columns.start, columns.stop) % len(self._amounts)
        sums = self._other.read((rows, columns)) + self._amounts[turns]
        return sums if self._mask is None else sums & self._mask
