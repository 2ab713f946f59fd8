"""From a folder to a model with its weights.

Knows checkpoints, models and formats, and how much memory there is for a cache. Does not know
text or the engine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic import checkpoints, models, ops, packed
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed
from moesaic.models import Decoder
from moesaic.ops import native

SMALL = 100_000_000
"""Parameters; below it torch's threads are not worth waking."""

DTYPES = checkpoints.FLOATS
CACHE_DTYPES = ("auto", *DTYPES, "int8")
Progress = Callable[[int, int], None]

SEQUENCES = 16
"""Requests of the whole context that the cache has room for, where memory allows: fewer would preempt each other."""


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


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    format: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Loaded:
    """Read the checkpoint in folder ``path`` into a model.

    Args:
        path: a folder in any layout.
        dtype: float32, bfloat16, float16, or auto: what the checkpoint is stored in.
        format: what weights are quantized to, see ``models.choose``; None: they stay plain, in ``dtype``.
        device: where the model goes.
        progress: called with the bytes read so far and in all.

    Raises:
        NotFound: there is no such folder.
        CheckpointError: something in it is missing, damaged or not understood.
        InvalidParameter: an unknown dtype, format or device.
    """
    if dtype not in ("auto", *DTYPES):
        raise InvalidParameter("dtype", f"is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidParameter("device", f"is {device!r}, which torch does not know") from error
    if format is not None:
        models.choose(format, "float32")  # refused before anything is read
    if packed.is_packed(path):
        return _packed(path, dtype, format, place)
    with checkpoints.open(path) as checkpoint:
        name = checkpoints.stored_dtype(checkpoint) if dtype == "auto" else dtype
        roles = models.choose(format or name, name)
        model = models.build(checkpoint.config, checkpoint.path, roles, dtype=getattr(torch, name), device=place)
        if place.type == "cpu":
            for parameter in model.parameters():
                native.huge_pages(parameter)  # before it is touched
        checkpoints.fill(model.slots(), checkpoint, progress=progress)
        return Loaded(checkpoint.path, checkpoint.layout, model, checkpoint.config, checkpoint.generation)


def is_classifier(path: Path) -> bool:
    """Return whether the checkpoint in folder ``path`` has a classification head; False where that cannot be read."""
    name = packed.MARK if packed.is_packed(path) else "config.json"
    try:
        config = json.loads((path / name).read_bytes())
        named = config["config"]["architectures"] if packed.is_packed(path) else config["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # whoever loads it says what is wrong
    return any(str(each).endswith("ForSequenceClassification") for each in named)


def torch_threads(model: Decoder) -> int | None:
    """Return how many threads torch should use for this model, None for its own choice.

    One where there is little for it to do: in a small model its threads cost more to wake, some
    hundred times a step, than they save; and beside our kernels they would take the cores away.
    """
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        return 1
    device = next(model.parameters()).device.type
    names = {weight.name for weight in model.blocks.modules() if isinstance(weight, Packed)}
    return 1 if all(ops.chosen("linear", device, name) != "reference" for name in names) else None


def _packed(path: Path, dtype: str, format: str | None, device: torch.device) -> Loaded:
    """Map a packed folder. What is packed stays as it is."""
    if format is not None or dtype != "auto":
        raise InvalidParameter("format" if format is not None else "dtype", f"is decided: {path} holds packed weights")
    said = packed.read(path)
    model = packed.load(path, said)
    if device.type != "cpu":
        model.to(device)
    return Loaded(path, "packed", model, said.config, said.generation)


def cache_dtype(model: Decoder, name: str) -> torch.dtype:
    """Return the dtype of the key/value cache that ``name`` means: one of CACHE_DTYPES.

    Raises:
        InvalidParameter: it is none of them.
    """
    if name not in CACHE_DTYPES:
        raise InvalidParameter("kv_cache_dtype", f"is {name!r}, expected {', '.join(CACHE_DTYPES)}")
    dtype: torch.dtype = model.dtype if name == "auto" else getattr(torch, name)
    return dtype


def sizes(model: Decoder, context: int | None, places: int | None, block: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the context and the places in the cache: as asked for, else as a quarter of the free memory allows.

    Args:
        model: whose keys and values are cached.
        context: the most tokens of a request, or None.
        places: how many the cache has, or None.
        block: places in a block.
        dtype: of the cache.

    Raises:
        InvalidParameter: the context is longer than the model's, or the cache is larger than the machine's memory.
    """
    if context is not None and not 1 < context <= model.max_length:
        raise InvalidParameter("context", f"is {context}, but the model was made for 2 to {model.max_length} tokens")
    per_token = cache_bytes(model, dtype)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    affordable = max(block, free // 4 // per_token)
    if places is not None:
        _check_room(model, places, per_token)
    if context is None:
        context = min(model.max_length, affordable)
    if places is None:
        places = max(context, min(SEQUENCES * context, affordable))
    return context, -(-places // block) * block


def _check_room(model: Decoder, places: int, per_token: int) -> None:
    """Refuse a cache that is larger than all of the machine's memory."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if places * per_token > there and next(model.parameters()).device.type == "cpu":
        takes = f"takes {places * per_token / 1e9:.1f} GB, and this machine has {there / 1e9:.1f}"
        raise InvalidParameter("cache_tokens", f"is {places}, which {takes}")


def cache_bytes(model: Decoder, dtype: torch.dtype) -> int:
    """Return the bytes that keys and values of one token take in a cache of ``dtype``."""
    return ops.Cache.bytes_per_token(model.cache_shapes, dtype)
