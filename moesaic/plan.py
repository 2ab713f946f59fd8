"""Plans how a model is loaded, and counts the memory that it takes, before any weights are read.

    plan = make_plan(path, LoadOptions(format="q4"))
    plan.bytes                                  memory that the loaded model takes
    loading.load_model(plan)                    the model, exactly as planned

The counts come from the real module on torch's meta device, where tensors have shapes and no memory. This module does
not load weights and does not depend on text or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesaic import checkpoints, memory, models, ops, packed
from moesaic.errors import InvalidParameter, NotFound
from moesaic.formats import WeightFormat
from moesaic.load_options import LoadOptions
from moesaic.models import Decoder
from moesaic.weight_report import WeightGroup, weight_groups

CACHED_CONTEXTS = 16
"""Requests of maximum length that the cache holds if memory allows; in a smaller cache, some are preempted."""

PACKED = "packed"
"""Layout of folders of packed weights, which are not among the checkpoint layouts."""


@dataclass(frozen=True)
class ModelSpec:
    """Description from which a model is built: its configuration, dtype and weight formats.

    Attributes:
        path: folder or file of the checkpoint.
        layout: name of the checkpoint layout, or "packed".
        config: the model's configuration with the keys of config.json, whatever the layout.
        generation: content of generation_config.json; empty if there is none.
        dtype: dtype of activations and plain weights.
        formats: format of each role of weights, and of single tensors by name, as ``models.build`` takes them.
        stored: type of each tensor on disk, such as Q4_1 or bfloat16; empty if it is that of ``formats``.
    """

    path: Path
    layout: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    dtype: torch.dtype
    formats: Mapping[str, WeightFormat] = field(repr=False)
    stored: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def dtype_name(self) -> str:
        """Name of ``dtype``, such as bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def build(self, device: torch.device | str) -> Decoder:
        """Return the model with uninitialized weights on ``device``.

        Raises:
            ConfigError: the configuration is not understood.
        """
        return models.build(self.config, self.path, self.formats, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Plan:
    """How a model is loaded, and the memory that it takes.

    Attributes:
        spec: description from which the model is built.
        device: device that the model is loaded to.
        weights: types and bytes of the weights, the largest group first; the router and norms, which are small and
            always float32, are only in ``weight_bytes``.
        parameters: number of parameters, counted as before quantization.
        weight_bytes: bytes of all weights in their formats.
        labels: class names of a classifier, which has no cache; empty for a language model.
        max_length: maximum tokens of a sequence that the model supports.
        context: maximum tokens of a request; the engine lowers it to ``cache_tokens`` if the cache is smaller, unless
            the model has an attention window that fits in the cache.
        cache_tokens: tokens that the key/value cache holds.
        cache_dtype: dtype of the cache.
        cache_bytes_per_token: bytes of the keys and values of a token in all layers.
        block_size: tokens in a block of the cache.
    """

    spec: ModelSpec
    device: torch.device
    weights: tuple[WeightGroup, ...]
    parameters: int
    weight_bytes: int
    labels: tuple[str, ...]
    max_length: int
    context: int
    cache_tokens: int
    cache_dtype: torch.dtype
    cache_bytes_per_token: int
    block_size: int

    @property
    def mapped(self) -> bool:
        """Whether the weights stay in their file, mapped into memory; the system can then reclaim their pages."""
        return _is_mapped(self.spec, self.device)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key/value cache."""
        return self.cache_tokens * self.cache_bytes_per_token

    @property
    def bytes(self) -> int:
        """Bytes of the device's memory that the loaded model takes: the cache, and weights that are not mapped."""
        return self.cache_bytes + (0 if self.mapped else self.weight_bytes)


def make_plan(path: Path, options: LoadOptions | None = None, device_memory: tuple[int, int] | None = None) -> Plan:
    """Return the plan for the model at ``path``. No weights are read or allocated.

    Args:
        path: folder or GGUF file of a checkpoint in any layout, or a packed folder.
        options: how the model is loaded; None: the defaults.
        device_memory: available and total bytes of the device's memory; None: those of now.

    Raises:
        NotFound: the folder or file does not exist.
        CheckpointError: the checkpoint is incomplete, damaged or not understood.
        InvalidParameter: an option does not suit the model or the device, or the format would round quantized weights.
    """
    if not path.exists():
        raise NotFound(f"{path}: no such folder or file; `moesaic pull {path}` fetches a model from the hub")
    options = options or LoadOptions()
    if options.format is not None:
        models.choose(options.format, "float32")  # refuses an unknown format before anything is read
    spec = _packed_spec(path, options) if packed.is_packed(path) else _checkpoint_spec(path, options)
    return plan_spec(spec, options, device_memory)


def _checkpoint_spec(path: Path, options: LoadOptions) -> ModelSpec:
    with checkpoints.open_checkpoint(path) as checkpoint:
        dtype = checkpoints.stored_dtype(checkpoint) if options.dtype == "auto" else options.dtype
        return ModelSpec(
            path=checkpoint.path,
            layout=checkpoint.layout,
            config=checkpoint.config,
            generation=checkpoint.generation,
            dtype=getattr(torch, dtype),
            formats=packed.choose_formats(checkpoint, options.format, dtype, requantize=options.requantize),
            stored={name: checkpoint.stored_type(name) for name in checkpoint.tensors},
        )


def _packed_spec(path: Path, options: LoadOptions) -> ModelSpec:
    """Return the spec of a packed folder; raise InvalidParameter if a format or a dtype is given.

    Packed weights cannot be converted.
    """
    if options.format is not None or options.dtype != "auto":
        parameter = "format" if options.format is not None else "dtype"
        raise InvalidParameter(
            parameter, f"cannot be changed: the weights in {path} are packed already; leave it out, or pack again"
        )
    manifest = packed.read_manifest(path)
    dtype, formats = getattr(torch, manifest.dtype), manifest.weight_formats()
    return ModelSpec(path, PACKED, manifest.config, manifest.generation, dtype, formats)


def plan_spec(spec: ModelSpec, options: LoadOptions, device_memory: tuple[int, int] | None = None) -> Plan:
    """Return the plan for the model of ``spec``, with the device and the sizes of ``options``.

    Arguments and errors are those of ``make_plan``. The format and the dtype of ``options`` are not read.
    """
    device = _device(options.device)
    available, total = device_memory or _device_memory(device)
    model = spec.build("meta")
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if not _is_mapped(spec, device):  # mapped weights are page cache, which counts as available
        available = max(0, available - weight_bytes)
    cache_dtype = model.dtype if options.kv_cache_dtype == "auto" else getattr(torch, options.kv_cache_dtype)
    bytes_per_token = ops.Cache.bytes_per_token(model.cache_shapes, cache_dtype)
    context, cache_tokens = model.max_length, 0
    if not model.shape.labels:
        context, cache_tokens = _cache_sizes(model.max_length, options, bytes_per_token, (available, total))
    return Plan(
        spec=spec,
        device=device,
        weights=weight_groups(model.slots(), spec.stored, device.type),
        parameters=models.parameters(model),
        weight_bytes=weight_bytes,
        labels=model.shape.labels,
        max_length=model.max_length,
        context=context,
        cache_tokens=cache_tokens,
        cache_dtype=cache_dtype,
        cache_bytes_per_token=bytes_per_token,
        block_size=options.block_size,
    )


def _is_mapped(spec: ModelSpec, device: torch.device) -> bool:
    return spec.layout == PACKED and device.type == "cpu"


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidParameter("device", f"is {name!r}, but torch has no such device") from error


def _device_memory(device: torch.device) -> tuple[int, int]:
    """Return the available and total bytes of the memory of ``device``."""
    try:
        return memory.device_memory(device)
    except (AssertionError, RuntimeError) as error:  # torch raises either, depending on how it was built
        problem = f"is {str(device)!r}, but torch cannot use it here: {str(error).partition(chr(10))[0]}"
        raise InvalidParameter("device", problem) from error


def _cache_sizes(
    max_length: int, options: LoadOptions, bytes_per_token: int, device_memory: tuple[int, int]
) -> tuple[int, int]:
    """Return the longest request and the size of the key/value cache, both in tokens.

    Given numbers are kept; the cache is rounded up to whole blocks. A size that is left open takes at most a quarter of
    the available memory.
    """
    context, cache_tokens, block_size = options.context, options.cache_tokens, options.block_size
    available, total = device_memory
    if context is not None and not 1 < context <= max_length:
        raise InvalidParameter("context", f"is {context}, but the model supports 2 to {max_length} tokens")
    if cache_tokens is not None and cache_tokens * bytes_per_token > total:
        size, limit = cache_tokens * bytes_per_token / 1e9, total / 1e9
        problem = f"is {cache_tokens}, which needs {size:.1f} GB, but the device has {limit:.1f} GB of memory"
        raise InvalidParameter("cache_tokens", problem)
    affordable = max(block_size, available // 4 // bytes_per_token)
    if context is None:
        context = min(max_length, affordable)
    if cache_tokens is None:
        cache_tokens = max(context, min(CACHED_CONTEXTS * context, affordable))
    return context, -(-cache_tokens // block_size) * block_size
