"""From a folder to a model with its weights.

Knows checkpoints, models and formats, and how much memory there is for a cache. Does not know
text or the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic import checkpoints, formats, models
from moesaic.checkpoints import Checkpoint
from moesaic.errors import InvalidParameter
from moesaic.models import Decoder

DTYPES = ("float32", "bfloat16", "float16")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint became: the model with its weights, and what the checkpoint says beside them."""

    path: Path
    layout: str
    model: Decoder
    config: Mapping[str, Any]
    generation: Mapping[str, Any]

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that the configurations name as an end; Llama 3 has more than one."""
        named = [self.generation.get("eos_token_id"), self.config.get("eos_token_id")]
        ids = [id for each in named for id in (each if isinstance(each, list) else [each])]
        return frozenset(id for id in ids if isinstance(id, int) and 0 <= id < self.model.vocab_size)


def load_model(path: Path, *, dtype: str = "auto", device: str = "cpu", progress: Progress | None = None) -> Loaded:
    """Read the checkpoint in folder ``path`` into a model.

    Args:
        path: a folder in any layout.
        dtype: float32, bfloat16, float16, or auto: what the checkpoint is stored in.
        device: where the model goes.
        progress: called with the bytes read so far and in all.

    Raises:
        NotFound: there is no such folder.
        CheckpointError: something in it is missing, damaged or not understood.
        InvalidParameter: an unknown dtype or device.
    """
    if dtype not in ("auto", *DTYPES):
        raise InvalidParameter("dtype", f"is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidParameter("device", f"is {device!r}, which torch does not know") from error
    with checkpoints.open(path) as checkpoint:
        name = _stored_dtype(checkpoint) if dtype == "auto" else dtype
        model = models.build(
            checkpoint.config, checkpoint.path, formats.load(name), dtype=getattr(torch, name), device=place
        )
        checkpoints.fill(model.slots(), checkpoint, progress=progress)
        return Loaded(checkpoint.path, checkpoint.layout, model, checkpoint.config, checkpoint.generation)


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that most of the checkpoint's bytes are in; float64 counts as float32."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + info.nbytes
    most = max(sizes, key=lambda name: sizes[name], default="float32")
    return most if most in DTYPES else "float32"


def sizes(model: Decoder, context: int | None, places: int | None, block: int) -> tuple[int, int]:
    """Return the context and the places in the cache: as asked for, else as a quarter of the free memory allows."""
    if context is not None and not 1 < context <= model.max_length:
        raise InvalidParameter("context", f"is {context}, but the model was made for 2 to {model.max_length} tokens")
    per_token = 2 * model.dtype.itemsize * sum(heads * size for heads, size in model.cache_shapes)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    affordable = max(block, free // 4 // per_token)
    if context is None:
        context = min(model.max_length, affordable)
    if places is None:
        places = max(context, min(4 * context, affordable))
    return context, -(-places // block) * block
