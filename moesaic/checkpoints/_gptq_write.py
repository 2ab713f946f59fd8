"""Writes Hugging Face's layout with weights in the layout of GPTQ, which ``_gptq`` describes.

Embedding, head, norms and routers are written as floats.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._gptq import BITS
from moesaic.checkpoints._integer_weights import (
    IntegerModules,
    Integers,
    IntegerWeight,
    Layout,
    integer_modules,
    write_modules,
)
from moesaic.checkpoints._packed_integers import WORD, pack_integers
from moesaic.checkpoints._views import View
from moesaic.checkpoints._write import WriteOptions

SCALES = (torch.float16, torch.bfloat16)
"""The dtypes of scales that other programs read."""


def write(source: Checkpoint, path: Path, options: WriteOptions) -> None:
    """Write ``source`` with GPTQ's integers of 2, 3, 4 or 8 bits; act-order is kept.

    Raises:
        InvalidParameter: ``path`` is not empty, or there are more shards than tensors.
        CheckpointError: a quantized weight is not such integers, or there is none; or the source cannot be read, or the
            target cannot be written.
    """
    found = integer_modules(source, "gptq", BITS, SCALES, decode=options.decode, fits=_problem)
    version = "gptq_v2" if found.least_zero == 0 else "gptq"
    tensors = functools.partial(_views, version=version, found=found)
    write_modules(source, path, options, found, tensors, _settings(source, found, version))


def _problem(weight: IntegerWeight, layout: Layout) -> str | None:
    rows, columns = weight.shape
    step = WORD if layout.bits == 3 else WORD // layout.bits
    if rows % step or columns % step:
        return f"{layout.bits} bits need rows and columns that are multiples of {step}, found {rows} and {columns}"
    return None


def _settings(source: Checkpoint, found: IntegerModules, version: str) -> dict[str, Any]:
    common = found.common
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": common.bits,
        "group_size": common.group or -1,
        "desc_act": not all(layout.ordered for _, layout in found.modules.values()),
        "sym": all(layout.symmetric for _, layout in found.modules.values()),
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
    }
    others = {
        f"+:^{re.escape(name)}$": {"bits": layout.bits}
        for name, (_, layout) in found.modules.items()
        if layout.bits != common.bits
    }
    others |= {f"-:^{re.escape(name)}$": {} for name in found.plain(source)}
    return settings | ({"dynamic": others} if others else {})


def _views(name: str, version: str, found: IntegerModules) -> Mapping[str, View]:
    """Return the tensors of the module ``name``."""
    weight, layout = found.modules[name]
    rows, columns = weight.shape
    groups = columns // layout.group if layout.group else 1
    bits, scale = layout.bits, found.scales[name]
    made = functools.partial(found.view, name)

    def zeros(integers: Integers) -> Tensor:
        return pack_integers((integers.zeros - int(version == "gptq")).T, 1, bits)

    def g_idx(integers: Integers) -> Tensor:
        return (torch.arange(columns) // (columns // groups) if integers.groups is None else integers.groups).int()

    return {
        f"{name}.qweight": made(
            (columns * bits // WORD, rows), torch.int32, lambda integers: pack_integers(integers.codes.T, 0, bits)
        ),
        f"{name}.qzeros": made((groups, rows * bits // WORD), torch.int32, zeros),
        f"{name}.scales": made((groups, rows), scale, lambda integers: integers.scale.T.to(scale)),
        f"{name}.g_idx": made((columns,), torch.int32, g_idx),
    }
