"""AWQ: weights of 4 bits in the version GEMM, as AutoAWQ and GPTQModel write them (arXiv:2306.00978).

A linear layer NAME with a weight [out, in] has the tensors

    NAME.qweight    [in, out / 8] int32, codes packed along the second axis
    NAME.qzeros     [groups, out / 8] int32, zero points packed along the second axis
    NAME.scales     [groups, out]

A word holds the codes of eight rows of the weight, from the lowest bits on: rows 0, 2, 4, 6, 1, 3, 5 and 7. A group
consists of consecutive columns. Layout: awq/modules/linear/gemm.py of AutoAWQ 0.2.9. The versions GEMV and GEMV fast
have other layouts and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._grouped_weight import SCALES, GroupedWeight, Parts
from moesaic.checkpoints._packed_integers import WORD, PackedIntegers
from moesaic.checkpoints._packed_modules import Module, choose, group_size, weights
from moesaic.checkpoints._views import View

PARTS = ("qweight", "qzeros", "scales")
BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place of each of the eight rows in a word, counted from the lowest bits."""
_ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}
"""AutoAWQ's own names of settings, and the names that transformers gives them."""


def weight_views(stored: Mapping[str, View], settings: Mapping[str, Any], path: Path) -> dict[str, View]:
    """Return ``stored`` with the weights of quantized modules, as ``GroupedWeight``, in place of their tensors.

    ``_quantized`` describes the arguments.

    Raises:
        ConfigError: a setting is not supported.
        CheckpointError: a tensor is missing, or has the wrong dtype or shape.
    """
    fields = Fields({_ALIASES.get(name, name): value for name, value in settings.items()}, path)
    for name in ("version", "format", "checkpoint_format"):
        choose(fields, name, ("gemm", "GEMM"), "gemm")
    if fields.take("backend", None) == "llm-awq":
        raise fields.error("quantization with backend 'llm-awq' is not supported; supported: AutoAWQ's version gemm")
    choose(fields, "pack_dtype", ("int32",), "int32")
    choose(fields, "bits", (BITS,))
    choose(fields, "zero_point", (True,), True)
    size = group_size(fields)
    return weights(stored, PARTS, lambda module: _weight(module, size))


def _weight(module: Module, size: int) -> View:
    """Return the weight of a module with ``size`` columns in a group; -1: all columns."""
    qweight = module.take("qweight", (torch.int32,))
    columns, words = qweight.info.shape
    size = columns if size == -1 else min(size, columns)
    groups = -(-columns // size)
    qzeros = module.take("qzeros", (torch.int32,), (groups, words))
    scales = module.take("scales", SCALES, (groups, words * WORD // BITS))
    parts = Parts(PackedIntegers(qweight, 1, BITS, PLACES), PackedIntegers(qzeros, 1, BITS, PLACES), scales)
    return GroupedWeight(f"{module.name}.qweight", parts, BITS, size)
