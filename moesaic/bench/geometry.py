"""Models of known sizes with random weights, made in place in whatever format: for speed and memory, not for sense.

Knows the published configurations, what a model takes in memory, and how to fill a weight without ever
holding it in another format. Does not know what is measured.
"""

from __future__ import annotations

import bisect
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic import models, packed
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.formats import Packed
from moesaic.llm import BUILT_IN
from moesaic.loading import Loaded, cache_bytes_per_token, cache_dtype
from moesaic.models import Decoder
from moesaic.ops import native

_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
_MIXTRAL = {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}


def _sizes(size: int, inner: int, layers: int, heads: int, length: int) -> dict[str, Any]:
    return {
        "hidden_size": size,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": length,
    }


GEOMETRIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral-8x7b": _MIXTRAL | _sizes(4096, 14336, 32, 32, 32768),
    "mixtral-8x22b": _MIXTRAL | _sizes(6144, 16384, 56, 48, 65536),
    "mistral-7b": {"model_type": "mistral", "vocab_size": 32000} | _sizes(4096, 14336, 32, 32, 32768),
    "llama-3-8b": _LLAMA3 | _sizes(4096, 14336, 32, 32, 8192),
    "llama-3-70b": _LLAMA3 | _sizes(8192, 28672, 80, 64, 8192),
}
"""Configurations in config.json's vocabulary, as they were published with the first release of each."""

SAMPLE = 2048
"""Rows that are drawn and quantized, once for each format and width; weights are made of them in random order."""
SPREAD = 0.02
"""Standard deviation of weights, with which what a layer gives is about as large as what it gets. Embeddings have 1:
were they smaller than what the layers add, all tokens would soon look alike, and be routed alike."""
WORK = 1_200_000_000
"""Bytes for the interpreter, its libraries and the activations of a step of 512 tokens."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Need:
    """What a model takes in memory, in bytes."""

    parameters: int
    """How many, not bytes."""
    weights: int
    cache: int

    @property
    def total(self) -> int:
        """All of it, with what the process itself takes."""
        return self.weights + self.cache + WORK


def configuration(name: str, layers: int | None = None) -> dict[str, Any]:
    """Return the configuration called ``name``, with ``layers`` layers in place of its own.

    Raises:
        InvalidParameter: there is no such geometry, or it has not so many layers.
    """
    if name not in GEOMETRIES:
        raise InvalidParameter("geometry", f"{name!r} is unknown: there are {', '.join(GEOMETRIES)}")
    config = dict(GEOMETRIES[name])
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise InvalidParameter("layers", f"is {layers}, but {name} has 1 to {config['num_hidden_layers']}")
        config["num_hidden_layers"] = layers
    return config


def need(config: Mapping[str, Any], format: str, dtype: str, cache_tokens: int, cache: str = "auto") -> Need:
    """Return what a model of this configuration, and a cache of dtype ``cache``, take; nothing is allocated."""
    model = _outline(config, format, dtype)
    places = cache_tokens * cache_bytes_per_token(model, cache_dtype(model, cache))
    return Need(models.parameters(model), sum(each.nbytes for each in model.parameters()), places)


def check(
    name: str,
    layers: int | None,
    format: str,
    dtype: str,
    cache_tokens: int,
    free: int,
    *,
    cache: str = "auto",
    mapped: bool = False,
) -> None:
    """Refuse a geometry for which ``free`` bytes are not enough; with ``mapped``, its weights need none of them.

    Raises:
        InvalidParameter: the message says what would fit.
    """

    def fits(config: Mapping[str, Any], format: str, mapped: bool = False) -> bool:
        wanted = need(config, format, dtype, cache_tokens, cache)
        return wanted.total - mapped * wanted.weights <= free

    config = configuration(name, layers)
    if fits(config, format, mapped):
        return
    hints = [f"--format {each}" for each in models.PRESETS if fits(config, each, mapped)][:1]
    numbers = range(1, config["num_hidden_layers"])
    fewer = bisect.bisect(numbers, False, key=lambda n: not fits(config | {"num_hidden_layers": n}, format, mapped))
    hints += [f"--layers {fewer}"] if fewer else []
    hints += ["--packed DIR"] if fits(config, format, mapped=True) else []
    wanted = need(config, format, dtype, cache_tokens, cache)
    takes = f"takes {wanted.weights / 1e9:.1f} GB of weights, {wanted.cache / 1e9:.1f} GB of cache"
    raise InvalidParameter(
        "geometry",
        f"{name} in {format} {takes} and {WORK / 1e9:.1f} GB to work with, but {free / 1e9:.1f} GB are free: "
        + (f"{' or '.join(hints)} would fit" if hints else "nothing of it would fit"),
    )


def build(config: Mapping[str, Any], name: str, format: str, dtype: str, progress: Progress | None = None) -> Loaded:
    """Return a model of this configuration with random weights, made in place: nothing of it exists twice.

    Every part is memory of its own, written, in huge pages where the system gives them.

    Args:
        config: see ``configuration``.
        name: what the model is called.
        format: see ``models.choose``.
        dtype: of activations and of what stays plain.
        progress: called with the bytes written so far and in all.
    """
    model = _outline(config, format, dtype).to_empty(device="cpu")
    randomize(model, progress)
    return Loaded(Path(name), "random", model, config, {})


def pack(config: Mapping[str, Any], folder: Path, format: str, dtype: str, progress: Progress | None = None) -> None:
    """Make the same in a new packed folder, where it may be more than memory; with the built-in model's tokenizer.

    Raises:
        InvalidParameter: the folder is there already, or the disk has no room for the weights.
        CheckpointError: it cannot be written.
    """
    if folder.exists():
        raise InvalidParameter("packed", f"{folder} exists already; name a new folder, or measure it as MODEL")
    wanted = need(config, format, dtype, 0).weights
    try:
        folder.mkdir(parents=True)
        if wanted > (free := shutil.disk_usage(folder).free):
            folder.rmdir()
            raise InvalidParameter("packed", f"takes {wanted / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB left")
        for each in BUILT_IN.glob("tokenizer*"):
            shutil.copyfile(each, folder / each.name)
        kinds = {role: each.name for role, each in models.choose(format, dtype).items()}
        packed.create(folder, packed.PackedManifest(dtype, kinds, config, {}), lambda model: randomize(model, progress))
        with (folder / packed.WEIGHTS).open("rb") as file:
            os.fsync(file.fileno())  # so that what is measured afterwards does not wait for it
    except OSError as error:
        raise CheckpointError(folder, f"cannot be written: {error.strerror}") from error


def randomize(model: Decoder, progress: Progress | None = None) -> None:
    """Fill a model's weights, wherever they lie; ``progress`` is called with the bytes written so far and in all."""
    samples: dict[tuple[str, int, float], Mapping[str, Tensor]] = {}
    total, done = sum(each.nbytes for each in model.parameters()), 0
    for module in model.modules():
        parts = list(module.parameters(recurse=False))
        if isinstance(module, Packed):
            kind = (module.name, module.shape[-1], 1.0 if module is model.embed.weight else SPREAD)
            if kind not in samples:
                samples[kind] = sample(type(module), *kind[1:])
            fill(module, samples[kind])
        else:
            for part in parts:  # of a norm, which leaves alone what is normal, or of a router
                nn.init.ones_(part) if part.dim() == 1 else nn.init.normal_(part, std=SPREAD)
        done += sum(part.nbytes for part in parts)
        if parts and progress is not None:
            progress(done, total)


def sample(format: type[Packed], columns: int, spread: float = SPREAD) -> Mapping[str, Tensor]:
    """Return the parts of ``SAMPLE`` random rows in this format."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small steps: where a core is busy with other things, more threads take minutes
    try:
        return format.quantize(torch.randn(SAMPLE, columns) * spread)
    finally:
        torch.set_num_threads(threads)


def fill(weight: Packed, rows: Mapping[str, Tensor]) -> None:
    """Fill a weight that was never written with rows of a ``sample`` in random order, every one of them a copy."""
    for name, part in weight.parts().items():
        native.huge_pages(part)  # before it is touched
        target, pool = part.flatten(0, -2), rows[name].flatten(0, -2)
        torch.index_select(pool, 0, torch.randint(len(pool), (len(target),)), out=target)


def _outline(config: Mapping[str, Any], format: str, dtype: str) -> Decoder:
    """Return the model on the meta device, where it takes no memory."""
    roles = models.choose(format, dtype)
    return models.build(config, Path(str(config["model_type"])), roles, dtype=getattr(torch, dtype), device="meta")
