"""Loads the weights of a model, and computes the memory that the weights and the key/value cache take.

This module depends on checkpoints, models, weight formats and memory. It does not depend on text or the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic import checkpoints, config_keys, memory, models, ops, packed
from moesaic.checkpoints import Checkpoint
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed, _threads
from moesaic.models import Decoder
from moesaic.ops import native
from moesaic.weight_report import WeightGroup, weight_groups

SMALL_MODEL = 100_000_000
"""Number of parameters below which starting torch's threads costs more time than they save."""

DTYPES = checkpoints.FLOAT_DTYPES
CACHE_DTYPES = ("auto", *DTYPES, "int8")
Progress = Callable[[int, int], None]

CACHED_CONTEXTS = 16
"""Requests of maximum length that the cache holds if memory allows; in a smaller cache, some are preempted."""


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and the configuration files of its checkpoint.

    Attributes:
        path: folder of the checkpoint.
        layout: name of the checkpoint layout, or "packed".
        model: the model.
        config: the model's configuration with the keys of config.json, whatever the layout.
        generation: content of generation_config.json; empty if there is none.
        weights: what loading did with the weights; empty for weights that were packed before.
    """

    path: Path
    layout: str
    model: Decoder
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    weights: tuple[WeightGroup, ...] = ()

    @property
    def generation_file(self) -> Path:
        """The file that ``generation`` was read from."""
        if self.layout == "gguf":
            return self.path
        return self.path / (packed.MANIFEST if self.layout == "packed" else "generation_config.json")

    @property
    def eos_ids(self) -> frozenset[int]:
        """All end-of-sequence token ids in the configurations; Llama 3 has more than one."""
        values = [self.generation.get("eos_token_id"), self.config.get("eos_token_id")]
        token_ids = [_token_id(item) for value in values for item in (value if isinstance(value, list) else [value])]
        return frozenset(item for item in token_ids if item is not None and 0 <= item < self.model.vocab_size)


def _token_id(value: Any) -> int | None:
    """Return ``value`` as a token id, also if it is written as text or as 2.0; return None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    value = config_keys.whole(value)
    return value if isinstance(value, int) else None


def check_layout(path: Path) -> None:
    """Raise the error that ``load_model`` raises if ``path`` holds no model, but an adapter or another file.

    It reads no weights. Call it first, so that this error comes before errors about other files of the folder.
    """
    if not packed.is_packed(path):
        checkpoints.detect_layout(path)


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    weight_format: str | None = None,
    requantize: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Loaded:
    """Load the model at ``path``.

    Args:
        path: folder or GGUF file of a checkpoint in any layout, or a packed folder.
        dtype: float32, bfloat16 or float16, for activations and plain weights; auto: the dtype that the checkpoint
            is stored in.
        weight_format: formats that weights are quantized to, as ``models.choose`` reads them; None: weights stay
            plain, and quantized weights keep their codes if a format can.
        requantize: whether ``weight_format`` may round weights that are quantized already.
        device: the device that the model is loaded to.
        progress: called with the bytes read so far and in total.

    Raises:
        NotFound: the folder does not exist.
        CheckpointError: the checkpoint is incomplete, damaged or not understood.
        InvalidParameter: the dtype, format or device is unknown, or the format would round quantized weights.
    """
    target = _check(dtype, weight_format, device)
    if packed.is_packed(path):
        manifest = _read_manifest(path, dtype, weight_format)
        model = packed.load(path, manifest)
        if target.type != "cpu":
            model.to(target)
        return Loaded(path, "packed", model, manifest.config, manifest.generation)
    with checkpoints.open_checkpoint(path) as checkpoint:
        model = _build(checkpoint, dtype, weight_format, requantize, target)
        if target.type == "cpu":
            for parameter in model.parameters():
                native.huge_pages(parameter)  # before it is filled: pages that are written already stay small
        checkpoints.load_weights(model.slots(), checkpoint, progress=progress)
        groups = weight_groups(model.slots(), checkpoint, target.type)
        return Loaded(checkpoint.path, checkpoint.layout, model, checkpoint.config, checkpoint.generation, groups)


def memory_needed(
    path: Path,
    *,
    dtype: str = "auto",
    weight_format: str | None = None,
    requantize: bool = False,
    device: str = "cpu",
    context: int | None = None,
    cache_tokens: int | None = None,
    kv_cache_dtype: str = "auto",
    block_size: int = 16,
) -> int:
    """Return the bytes that the model at ``path`` takes once loaded: its weights and key/value cache.

    Weights count in the format that they will have in memory. No weights are read or allocated. Where the size
    of the cache depends on the available memory, the result holds for the memory that is available now.

    Args:
        path: folder or GGUF file of a checkpoint in any layout, or a packed folder.
        dtype: dtype of activations and plain weights, as for ``load_model``.
        weight_format, requantize: formats that weights are quantized to, as for ``load_model``; ignored for a
            classifier.
        device: the device that the model is loaded to.
        context: maximum tokens of a request; None: as many as the model and the cache allow.
        cache_tokens: tokens that the cache holds; None: enough for CACHED_CONTEXTS requests, if memory allows.
        kv_cache_dtype: dtype of the cache, one of CACHE_DTYPES. A classifier has no cache.
        block_size: tokens in a block of the cache.

    Raises:
        NotFound: the folder does not exist.
        CheckpointError: the checkpoint is incomplete, damaged or not understood.
        InvalidParameter: a value is unknown or out of range.
    """
    if is_classifier(path):
        weight_format = None  # Classifier.load does not quantize
    target = _check(dtype, weight_format, device)
    mapped = packed.is_packed(path)
    if mapped:
        model = packed.build(path, _read_manifest(path, dtype, weight_format))
    else:
        with checkpoints.open_checkpoint(path) as checkpoint:
            model = _build(checkpoint, dtype, weight_format, requantize, torch.device("meta"))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if model.shape.labels:
        return weights
    available, total = memory.device_memory(target)
    if not mapped or target.type != "cpu":  # mapped weights are page cache, which counts as available
        available = max(0, available - weights)
    stored = cache_dtype(model, kv_cache_dtype)
    _, places = plan_cache(model, context, cache_tokens, block_size, stored, (available, total))
    return weights + places * cache_bytes_per_token(model, stored)


def _check(dtype: str, weight_format: str | None, device: str) -> torch.device:
    """Return the device called ``device``; raise InvalidParameter if device, dtype or format is unknown."""
    if dtype not in ("auto", *DTYPES):
        raise InvalidParameter("dtype", f"is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    if weight_format is not None:
        models.choose(weight_format, "float32")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InvalidParameter("device", f"is {device!r}, but torch has no such device") from error


def _build(
    checkpoint: Checkpoint, dtype: str, weight_format: str | None, requantize: bool, device: torch.device
) -> Decoder:
    """Return the model that ``checkpoint`` describes, its weights allocated on ``device`` but not read."""
    name = checkpoints.stored_dtype(checkpoint) if dtype == "auto" else dtype
    chosen = packed.choose_formats(checkpoint, weight_format, name, requantize=requantize)
    return models.build(checkpoint.config, checkpoint.path, chosen, dtype=getattr(torch, name), device=device)


def _read_manifest(path: Path, dtype: str, weight_format: str | None) -> packed.PackedManifest:
    """Return the manifest of the packed folder ``path``; raise InvalidParameter if a format or a dtype is given.

    Packed weights cannot be converted.
    """
    if weight_format is not None or dtype != "auto":
        parameter = "format" if weight_format is not None else "dtype"
        raise InvalidParameter(
            parameter, f"cannot be changed: the weights in {path} are packed already; leave it out, or pack again"
        )
    return packed.read_manifest(path)


def is_classifier(path: Path) -> bool:
    """Return whether the checkpoint in folder ``path`` has a classification head; False if it cannot be read."""
    try:
        if packed.is_packed(path):
            config = json.loads((path / packed.MANIFEST).read_bytes())["config"]
        else:
            config = json.loads((path / "config.json").read_bytes())
        named = config["architectures"]
        architectures = [named] if isinstance(named, str) else list(named)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # loading the checkpoint reports the problem
    return any(str(name).endswith("ForSequenceClassification") for name in architectures)


def torch_threads(model: Decoder) -> int | None:
    """Return the number of threads that torch should use for this model; None: torch's default.

    In a small model, waking threads a hundred times in each step costs more than they save. Beside Moesaic's own
    kernels, torch's threads would compete for the cores. One thread is best in both cases.
    """
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        return 1
    device = next(model.parameters()).device.type
    names = {weight.name for weight in model.blocks.modules() if isinstance(weight, Packed)}
    return 1 if all(ops.chosen("linear", device, name) != "reference" for name in names) else None


def limited_torch_threads(model: Decoder) -> AbstractContextManager[None]:
    """Return a context in which torch uses ``torch_threads`` of a model in the calling thread."""
    return _threads.torch_threads(torch_threads(model))


def cache_dtype(model: Decoder, name: str) -> torch.dtype:
    """Return the dtype of the key/value cache for ``name``, one of CACHE_DTYPES; auto: the dtype of activations.

    Raises:
        InvalidParameter: the name is unknown.
    """
    if name not in CACHE_DTYPES:
        raise InvalidParameter("kv_cache_dtype", f"is {name!r}, expected {', '.join(CACHE_DTYPES)}")
    dtype: torch.dtype = model.dtype if name == "auto" else getattr(torch, name)
    return dtype


def plan_cache(
    model: Decoder,
    context: int | None,
    cache_tokens: int | None,
    block_size: int,
    dtype: torch.dtype,
    device_memory: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Return the longest request and the size of the key/value cache, both in tokens.

    Given numbers are kept. A size that is left open takes at most a quarter of the available memory.

    Args:
        model: the model that the cache is for; on the meta device, ``device_memory`` must be given.
        context: maximum tokens of a request; None: as many as the model and the cache allow.
        cache_tokens: tokens that the cache holds; None: enough for CACHED_CONTEXTS requests, if memory allows.
        block_size: tokens in a block; the cache is rounded up to whole blocks.
        dtype: dtype of the cache.
        device_memory: available and total bytes of memory; None: those of the model's device.

    Raises:
        InvalidParameter: the context is longer than the model's, or the cache is larger than the device's memory.
    """
    if context is not None and not 1 < context <= model.max_length:
        raise InvalidParameter("context", f"is {context}, but the model supports 2 to {model.max_length} tokens")
    available, total = device_memory or memory.device_memory(next(model.parameters()).device)
    bytes_per_token = cache_bytes_per_token(model, dtype)
    affordable = max(block_size, available // 4 // bytes_per_token)
    if cache_tokens is not None and cache_tokens * bytes_per_token > total:
        size, limit = cache_tokens * bytes_per_token / 1e9, total / 1e9
        problem = f"is {cache_tokens}, which needs {size:.1f} GB, but the device has {limit:.1f} GB of memory"
        raise InvalidParameter("cache_tokens", problem)
    if context is None:
        context = min(model.max_length, affordable)
    if cache_tokens is None:
        cache_tokens = max(context, min(CACHED_CONTEXTS * context, affordable))
    return context, -(-cache_tokens // block_size) * block_size


def cache_bytes_per_token(model: Decoder, dtype: torch.dtype) -> int:
    """Return the bytes that the keys and values of one token take, in all layers, in a cache of ``dtype``."""
    return ops.Cache.bytes_per_token(model.cache_shapes, dtype)
