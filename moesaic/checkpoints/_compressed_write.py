"""Writes Hugging Face's layout with weights in the format pack-quantized of compressed-tensors.

``_compressed`` describes the tensors. Embedding, head, norms and routers are written as floats. Act-order
(``weight_g_idx``) is not written: compressed-tensors 0.20 no longer reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._compressed import FLOATS
from moesaic.checkpoints._compressed_settings import PACKED
from moesaic.checkpoints._integer_weights import (
    IntegerModules,
    IntegerWeight,
    Layout,
    Made,
    integer_modules,
    write_modules,
)
from moesaic.checkpoints._packed_integers import WORD, pack_integers
from moesaic.checkpoints._views import TensorInfo, View
from moesaic.checkpoints._write import WriteOptions

BITS = (4, 8)


def write(source: Checkpoint, path: Path, options: WriteOptions) -> None:
    """Write ``source`` with integers of 4 or 8 bits and a scale for each group or row.

    Raises:
        InvalidParameter: ``path`` is not empty, or there are more shards than tensors.
        CheckpointError: a quantized weight is not such integers, or there is none; or the source cannot be read, or the
            target cannot be written.
    """
    found = integer_modules(source, "compressed-tensors", BITS, FLOATS, decode=options.decode, fits=_problem)
    tensors = functools.partial(_views, found=found)
    write_modules(source, path, options, found, tensors, _settings(source, found))


def _problem(_weight: IntegerWeight, layout: Layout) -> str | None:
    return None if layout.ordered else "their groups are no consecutive columns (act-order), which only gptq can hold"


def _settings(source: Checkpoint, found: IntegerModules) -> dict[str, Any]:
    targets: dict[Layout, list[str]] = {}
    for name, (_, layout) in found.modules.items():
        targets.setdefault(layout, []).append(name)
    targets[found.common] = ["Linear"]  # modules that a group names have its scheme
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": _group(layout, names) for number, (layout, names) in enumerate(targets.items())
        },
        "ignore": found.plain(source),
        "kv_cache_scheme": None,
    }


def _group(layout: Layout, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": layout.bits,
        "type": "int",
        "symmetric": layout.symmetric,
        "strategy": "group" if layout.group else "channel",
        "group_size": layout.group,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _views(name: str, found: IntegerModules) -> Mapping[str, View]:
    """Return the tensors of the module ``name``."""
    weight, layout = found.modules[name]
    rows, columns = weight.shape
    groups = columns // layout.group if layout.group else 1
    bits, scale = layout.bits, found.scales[name]
    made = functools.partial(found.view, name)
    views = {
        f"{name}.weight_packed": made(
            (rows, -(-columns * bits // WORD)), torch.int32, lambda integers: pack_integers(integers.codes, 1, bits)
        ),
        f"{name}.weight_scale": made((rows, groups), scale, lambda integers: integers.scale.to(scale)),
        f"{name}.weight_shape": Made(TensorInfo((2,), torch.int64, weight.file), lambda: torch.tensor([rows, columns])),
    }
    if not layout.symmetric:
        views[f"{name}.weight_zero_point"] = made(
            (-(-rows * bits // WORD), groups), torch.int32, lambda integers: pack_integers(integers.zeros, 0, bits)
        )
    return views
