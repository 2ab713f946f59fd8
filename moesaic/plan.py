"""Plans how a model is loaded, and counts the memory that it takes, before any weights are read.

    plan = make_plan(path, LoadOptions(format="q4"))
    plan.bytes                                  memory that the loaded model takes
    loading.load_model(plan)                    the model, exactly as planned

The counts come from the real module on torch's meta device, where tensors have shapes and no memory. This module does
not load weights and does not depend on text or the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moesaic import checkpoints, memory, models, ops, packed
from moesaic.errors import InvalidParameter, NotEnoughMemory, NotFound
from moesaic.load_options import AUTO_FORMAT, LoadOptions
from moesaic.model_sizes import ModelSizes
from moesaic.model_spec import PACKED, ModelSpec
from moesaic.weight_report import WeightGroup, weight_groups

CACHED_CONTEXTS = 16
"""Requests of maximum length that the cache holds if memory allows; in a smaller cache, some are preempted."""
LEAST_CONTEXT = 512
"""Tokens that a cache must hold, or the model is refused; a model with a smaller maximum needs only that."""


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


def make_plan(path: Path, options: LoadOptions | None = None, available: int | None = None) -> Plan:
    """Return the plan for the model at ``path``. No weights are read or allocated.

    Args:
        path: folder or GGUF file of a checkpoint in any layout, or a packed folder.
        options: how the model is loaded; None: the defaults.
        available: free bytes of the device's memory; None: those of now.

    Raises:
        NotFound: the folder or file does not exist.
        CheckpointError: the checkpoint is incomplete, damaged or not understood.
        InvalidParameter: an option does not suit the model or the device, or the format would round quantized weights.
        NotEnoughMemory: the device has too little free memory; the message says what fits.
    """
    options = options or LoadOptions()
    automatic = options.format == AUTO_FORMAT
    spec = describe(path, replace(options, format=None) if automatic else options)
    return _first_that_fits(spec, options, available) if automatic else plan_spec(spec, options, available)


def describe(path: Path, options: LoadOptions) -> ModelSpec:
    """Return the description of the model at ``path`` with the formats and the dtype of ``options``.

    Raises:
        NotFound: the folder or file does not exist.
        CheckpointError: the checkpoint is incomplete, damaged or not understood.
        InvalidParameter: an option does not suit the model, or the format would round quantized weights.
    """
    if not path.exists():
        raise NotFound(f"{path}: no such folder or file; `moesaic pull {path}` fetches a model from the hub")
    if options.format is not None:
        models.choose(options.format, "float32")  # refuses an unknown format before anything is read
    return _packed_spec(path, options) if packed.is_packed(path) else _checkpoint_spec(path, options)


def _first_that_fits(spec: ModelSpec, options: LoadOptions, available: int | None) -> Plan:
    """Return the plan for the model as it is stored, or in the first format of ``models.PRESETS`` that fits.

    Weights that are quantized already, in a file or a packed folder, are never rounded again without being asked.
    """
    try:
        return plan_spec(spec, options, available)
    except NotEnoughMemory:
        chosen = [] if spec.quantized else _fitting(spec, options, _available(options.device, available))
        if not chosen:
            raise
        return plan_spec(spec.in_formats(chosen[0]), options, available)


def _fitting(spec: ModelSpec, options: LoadOptions, available: int) -> list[str]:
    """Return the names among ``models.PRESETS`` of formats in which the model fits, the one with most bits first."""
    sizes = ModelSizes.count(spec)
    room = available - sizes.workspace_bytes() - _least_cache_bytes(sizes, options)
    names = () if spec.layout == PACKED else models.PRESETS
    return [name for name in names if sizes.weights(name).nbytes <= room]


def _least_cache_bytes(sizes: ModelSizes, options: LoadOptions) -> int:
    """Return the bytes of the smallest cache that ``options`` allow."""
    tokens = options.cache_tokens or options.context or min(LEAST_CONTEXT, sizes.shape.max_length)
    return 0 if sizes.shape.labels else tokens * sizes.cache_bytes_per_token(options.kv_cache_dtype)


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


def plan_spec(spec: ModelSpec, options: LoadOptions, available: int | None = None) -> Plan:
    """Return the plan for the model of ``spec``, with the device and the sizes of ``options``.

    Arguments and errors are those of ``make_plan``. The format and the dtype of ``options`` are not read.
    """
    device = _device(options.device)
    free = _available(options.device, available)
    model = spec.build("meta")
    sizes = ModelSizes.count(spec, model)
    if options.context is not None and not 1 < options.context <= model.max_length:
        raise InvalidParameter(
            "context", f"is {options.context}, but the model supports 2 to {model.max_length} tokens"
        )
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    # Mapped weights are page cache, which counts as free.
    room = free - sizes.workspace_bytes() - (0 if _is_mapped(spec, device) else weight_bytes)
    if room < _least_cache_bytes(sizes, options):
        raise NotEnoughMemory(_problem(sizes, options, free, mapped=_is_mapped(spec, device)))
    cache_dtype = model.dtype if options.kv_cache_dtype == "auto" else getattr(torch, options.kv_cache_dtype)
    bytes_per_token = ops.Cache.bytes_per_token(model.cache_shapes, cache_dtype)
    context, cache_tokens = model.max_length, 0
    if not model.shape.labels:
        context, cache_tokens = _cache_sizes(model.max_length, options, bytes_per_token, room)
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


def _problem(sizes: ModelSizes, options: LoadOptions, available: int, *, mapped: bool) -> str:
    """Return a message that the model does not fit in ``available`` bytes, with what does."""
    name, weights = sizes.spec.path.name, 0 if mapped else sizes.weights().nbytes
    cache, work = _least_cache_bytes(sizes, options), sizes.workspace_bytes()
    parts = f"{_size(weights)} of weights, {_size(cache)} of key/value cache and {_size(work)} to work"
    tokens = (available - weights - work) // max(1, sizes.cache_bytes_per_token(options.kv_cache_dtype))
    changes = []
    if tokens >= LEAST_CONTEXT and (options.cache_tokens or options.context):
        changes.append(f"--{'cache-tokens' if options.cache_tokens else 'context'} {tokens} fits")
    again = " --requantize" if sizes.spec.quantized else ""
    changes += [f"--format {name}{again} fits" for name in _fitting(sizes.spec, options, available)[:1]]
    if not changes and options.device == "cpu" and not mapped:
        changes.append("a folder made by `moesaic pack` is mapped, so that a part of it may stay on disk")
    found = ", or ".join(changes) or "no format of this build is small enough"
    return f"{name} takes {parts}, but {_size(available)} of memory are free: {found}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def _is_mapped(spec: ModelSpec, device: torch.device) -> bool:
    return spec.layout == PACKED and device.type == "cpu"


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidParameter("device", f"is {name!r}, but torch has no such device") from error


def _available(name: str, given: int | None) -> int:
    """Return ``given``, or the free bytes of the memory of the device if it is None."""
    if given is not None:
        return given
    try:
        return memory.device_available(_device(name))
    except (AssertionError, RuntimeError) as error:  # torch raises either, depending on how it was built
        problem = f"is {name!r}, but torch cannot use it here: {str(error).partition(chr(10))[0]}"
        raise InvalidParameter("device", problem) from error


def _cache_sizes(max_length: int, options: LoadOptions, bytes_per_token: int, available: int) -> tuple[int, int]:
    """Return the longest request and the size of the key/value cache, both in tokens.

    Given numbers are kept; the cache is rounded up to whole blocks. A size that is left open takes at most a quarter of
    the available memory.
    """
    context, cache_tokens, block_size = options.context, options.cache_tokens, options.block_size
    affordable = max(block_size, available // 4 // bytes_per_token)
    if context is None:
        context = min(max_length, affordable)
    if cache_tokens is None:
        cache_tokens = max(context, min(CACHED_CONTEXTS * context, affordable))
    return context, -(-cache_tokens // block_size) * block_size
