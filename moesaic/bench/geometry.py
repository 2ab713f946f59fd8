"""Models with the sizes of published models and random weights, made in place in any format, for benchmarks.

This module refuses models that do not fit in memory. It fills weights without ever holding them in another format. It
does not measure anything.
"""

from __future__ import annotations

import bisect
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic import models, packed
from moesaic.builtin import TALES_FOLDER
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.formats import Packed, WeightFormat
from moesaic.load_options import LoadOptions
from moesaic.loading import Loaded
from moesaic.model_spec import PACKED, ModelSpec
from moesaic.models import Decoder
from moesaic.ops import native
from moesaic.plan import Plan, plan_spec
from moesaic.published import configuration

SAMPLE_ROWS = 2048
"""Rows that are drawn and quantized once per format and width; weights are random selections of these rows."""
WEIGHT_STD = 0.02
"""Standard deviation of the weights: with it, the outputs of a layer are about as large as its inputs.

Embeddings have a standard deviation of 1. If they were smaller than the outputs of the layers, all tokens would soon
have similar states and choose the same experts."""
PROCESS_BYTES = 1_200_000_000
"""Memory of the interpreter, its libraries and the activations of a step of 512 tokens."""

UNLIMITED = 1 << 60
"""Bytes of free memory for a plan that ``checked_plan`` compares with the memory itself."""

Progress = Callable[[int, int], None]


def random_plan(config: Mapping[str, Any], name: str, options: LoadOptions, *, mapped: bool = False) -> Plan:
    """Return the plan for a model with random weights.

    Args:
        config: result of ``published.configuration``.
        name: name of the model.
        options: how the model is loaded; the dtype auto means bfloat16, and the format None means that of the dtype.
        mapped: whether the weights are mapped from a packed folder.
    """
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    formats = models.choose(options.format or dtype, dtype)
    spec = ModelSpec(Path(name), PACKED if mapped else "random", config, {}, getattr(torch, dtype), formats)
    return plan_spec(spec, options, UNLIMITED)


def checked_plan(name: str, layers: int | None, options: LoadOptions, free: int, *, mapped: bool = False) -> Plan:
    """Return the plan for a model with the sizes of ``name`` that fits in ``free`` bytes of memory with its process.

    The other arguments are as for ``published.configuration`` and ``random_plan``.

    Raises:
        InvalidParameter: the geometry does not fit; the message suggests options that fit.
    """

    def fits(config: Mapping[str, Any], options: LoadOptions, mapped: bool = False) -> bool:
        return random_plan(config, name, options, mapped=mapped).bytes + PROCESS_BYTES <= free

    config = configuration(name, layers)
    plan = random_plan(config, name, options, mapped=mapped)
    if plan.bytes + PROCESS_BYTES <= free:
        return plan
    presets = (preset for preset in models.PRESETS if fits(config, replace(options, format=preset), mapped))
    hints = [f"--format {preset}" for preset in islice(presets, 1)]
    counts = range(1, config["num_hidden_layers"])

    def too_many(layers: int) -> bool:
        return not fits(config | {"num_hidden_layers": layers}, options, mapped)

    fewer = bisect.bisect(counts, False, key=too_many)
    hints += [f"--layers {fewer}"] if fewer else []
    hints += ["--packed DIR"] if fits(config, options, mapped=True) else []
    sizes = f"takes {plan.weight_bytes / 1e9:.1f} GB of weights, {plan.cache_bytes / 1e9:.1f} GB of cache"
    raise InvalidParameter(
        "geometry",
        f"{name} in {options.format or plan.spec.dtype_name} {sizes} and {PROCESS_BYTES / 1e9:.1f} GB for the "
        f"process, but {free / 1e9:.1f} GB are free: "
        + (f"{' or '.join(hints)} would fit" if hints else "no part of it would fit"),
    )


def build(plan: Plan, progress: Progress | None = None) -> Loaded:
    """Return the model of ``plan`` with random weights, which are made in place so that none exists twice.

    All memory of the weights is written, in huge pages if the system provides them. ``progress`` is called with the
    bytes written so far and the total.
    """
    model = plan.spec.build("meta").to_empty(device="cpu")
    randomize(model, progress)
    return Loaded(plan, model)


def pack(plan: Plan, folder: Path, progress: Progress | None = None) -> None:
    """Write the model of ``plan`` with random weights to a new packed folder, with the tokenizer of tales.

    The weights may be larger than memory.

    Raises:
        InvalidParameter: the folder exists, or the disk has too little space.
        CheckpointError: the folder cannot be written.
    """
    if folder.exists():
        raise InvalidParameter("packed", f"{folder} exists already: pass a new folder, or pass this one as MODEL")
    size, spec = plan.weight_bytes, plan.spec
    try:
        folder.mkdir(parents=True)
        if size > (free := shutil.disk_usage(folder).free):
            folder.rmdir()
            raise InvalidParameter("packed", f"takes {size / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB left")
        for source in TALES_FOLDER.glob("tokenizer*"):
            shutil.copyfile(source, folder / source.name)
        kinds = {role: str(chosen) for role, chosen in spec.formats.items()}
        manifest = packed.PackedManifest(spec.dtype_name, kinds, spec.config, {})
        packed.create(folder, manifest, lambda model: randomize(model, progress))
        with (folder / packed.WEIGHTS).open("rb") as file:
            os.fsync(file.fileno())  # a measurement after this must not wait for the disk
    except OSError as error:
        raise CheckpointError(folder, f"cannot be written: {error.strerror}") from error


def randomize(model: Decoder, progress: Progress | None = None) -> None:
    """Fill all weights with random numbers; ``progress`` is called with the bytes written so far and the total."""
    samples: dict[tuple[str, int, float], Mapping[str, Tensor]] = {}
    total, done = sum(part.nbytes for part in model.parameters()), 0
    for module in model.modules():
        parts = list(module.parameters(recurse=False))
        if isinstance(module, Packed):
            kind = (module.name, module.shape[-1], 1.0 if module is model.embed.weight else WEIGHT_STD)
            if kind not in samples:
                samples[kind] = sample(module.format, *kind[1:])
            fill(module, samples[kind])
        else:
            for part in parts:  # weights of a norm (ones change nothing) or of a router
                nn.init.ones_(part) if part.dim() == 1 else nn.init.normal_(part, std=WEIGHT_STD)
        done += sum(part.nbytes for part in parts)
        if parts and progress is not None:
            progress(done, total)


def sample(weight_format: WeightFormat, columns: int, std: float = WEIGHT_STD) -> Mapping[str, Tensor]:
    """Return ``SAMPLE_ROWS`` random rows of ``columns`` columns in a format, as its parts by name.

    ``std`` is the standard deviation of the numbers.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small steps: on a busy core, several threads would take minutes
    try:
        return weight_format.quantize(torch.randn(SAMPLE_ROWS, columns) * std)
    finally:
        torch.set_num_threads(threads)


def fill(weight: Packed, rows: Mapping[str, Tensor]) -> None:
    """Fill a new weight with copies of randomly chosen rows of ``rows``, a result of ``sample``."""
    for name, part in weight.parts().items():
        native.huge_pages(part)  # before the memory is first written
        target, pool = part.flatten(0, -2), rows[name].flatten(0, -2)
        torch.index_select(pool, 0, torch.randint(len(pool), (len(target),)), out=target)
