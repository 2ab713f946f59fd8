"""Folders of packed weights: quantized once, in the form that the kernels read, and mapped when they are loaded.

    moesaic.json           {"packed": 2, "dtype": ..., "formats": {...}, "config": {...}, "generation": {...}};
                           formats has the format of each role, and of single tensors by name
    weights.safetensors    every parameter of the model by its name, each at a multiple of 64 bytes

The folder also holds the tokenizer's files. Loading maps the weights and returns at once; all processes share the
mapped memory. A model that fits in memory is then read in the background, in large pages. A larger model runs
slowly: weights that every token needs stay in memory, and experts are read as soon as the router chooses them.

This module does not depend on particular weight formats: a part of a weight is bytes with a shape and a dtype.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic import checkpoints, formats, memory, models
from moesaic.checkpoints import Checkpoint, _safetensors, _write
from moesaic.checkpoints._packed_views import packed_view
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.formats import WeightFormat
from moesaic.models import Decoder, Experts

MANIFEST, WEIGHTS = "moesaic.json", "weights.safetensors"
VERSION = 2
ALIGNMENT = 64
"""Each parameter begins at a multiple of this number of bytes in the file."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackedManifest:
    """Content of moesaic.json: the dtype, weight formats and configuration of a packed model."""

    dtype: str
    formats: Mapping[str, str]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]

    def weight_formats(self) -> dict[str, WeightFormat]:
        """Return the format of each role of weights, and of single tensors by name, as ``models.build`` takes them."""
        return {name: formats.load(text) for name, text in self.formats.items()}

    def build(self, path: Path) -> Decoder:
        """Return the model on the meta device, where its weights take no memory; ``path`` is named in errors.

        Raises:
            ConfigError: the configuration of the model is not understood.
        """
        dtype = getattr(torch, self.dtype)
        return models.build(self.config, path, self.weight_formats(), dtype=dtype, device="meta")


def is_packed(path: Path) -> bool:
    """Return whether ``path`` is a folder of packed weights."""
    return (path / MANIFEST).is_file()


def pack(
    src: Path | str,
    dst: Path | str,
    weight_format: str | None = None,
    dtype: str = "auto",
    *,
    requantize: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the checkpoint ``src``, quantized, as the new packed folder ``dst``.

    The folder appears complete or not at all. Packing takes the memory of one tensor, and page cache for the new file.

    Args:
        src: folder or GGUF file of a checkpoint in any layout.
        dst: a folder that does not exist yet, or is empty.
        weight_format: formats that weights are quantized to, as ``models.choose`` reads them. Quantized weights of
            roles that it does not name keep their codes; None: all of them do.
        dtype: dtype of activations and plain weights; auto: the dtype that the checkpoint is stored in.
        requantize: whether weights that are quantized already may be rounded a second time.
        progress: called with the bytes read so far and in total.

    Raises:
        NotFound: ``src`` does not exist.
        InvalidParameter: the format is unknown, missing, or would round quantized weights, or ``dst`` is not empty.
        CheckpointError: ``src`` is damaged, or ``dst`` cannot be written.
    """
    if weight_format is not None:
        models.choose(weight_format, "float32")  # refuses an unknown format before anything is read
    with checkpoints.open_checkpoint(src) as checkpoint:
        if weight_format is None and not checkpoint.kept_formats():
            raise InvalidParameter("format", f"is missing: {checkpoint.path} has no quantized weights that can be kept")
        manifest = manifest_for(checkpoint, weight_format, dtype, requantize=requantize)
        with _write.new_folder(Path(dst), checkpoint) as folder:

            def store_weights(model: Decoder) -> None:
                checkpoints.load_weights(model.slots(), checkpoint, progress=progress)

            create(folder, manifest, store_weights)


def manifest_for(checkpoint: Checkpoint, weight_format: str | None, dtype: str, *, requantize: bool) -> PackedManifest:
    """Return the manifest of the packed folder that ``pack`` makes of a checkpoint; arguments are those of ``pack``.

    Raises:
        InvalidParameter: the format would round quantized weights.
    """
    plain = checkpoints.stored_dtype(checkpoint) if dtype == "auto" else dtype
    chosen = choose_formats(checkpoint, weight_format, plain, requantize=requantize)
    names = {key: str(value) for key, value in chosen.items()}
    return PackedManifest(plain, names, dict(checkpoint.config), _write.generation_config(checkpoint))


def choose_formats(
    checkpoint: Checkpoint, weight_format: str | None, plain: str, *, requantize: bool
) -> dict[str, WeightFormat]:
    """Return the format of each role of weights, and of single tensors by name, as ``models.build`` takes them.

    Args:
        checkpoint: the open checkpoint.
        weight_format: formats as ``models.choose`` reads them. Quantized weights of roles that it does not name keep
            their codes, as all of them do if it is None.
        plain: name of the format of other weights.
        requantize: whether ``weight_format`` may round weights that are quantized already.

    Raises:
        InvalidParameter: the format would round quantized weights.
    """
    named = {} if weight_format is None else models.named(weight_format)
    for name in () if requantize else checkpoint.quantized:
        role = models.role(name)
        chosen = named.get(role or "", "float32")
        if chosen != "float32":
            problem = f"{chosen} would round the {role} weights of {checkpoint.path} a second time"
            raise InvalidParameter("format", f"{problem}; leave --format out to keep them, or add --requantize")
    if checkpoint.config.get(checkpoints.TIED) is True and named.get("head") in checkpoints.FLOAT_DTYPES:
        named["embedding"] = plain  # a tied head is the embedding itself, which is decoded with it
    kept = {name: kept for name, kept in checkpoint.kept_formats().items() if models.role(name) not in named}
    return models.choose(weight_format or plain, plain) | kept


def create(folder: Path, manifest: PackedManifest, store_weights: Callable[[Decoder], object]) -> None:
    """Write the weights and the manifest of a packed folder.

    Args:
        folder: an existing folder.
        manifest: description of the model.
        store_weights: function that fills the weights of the model that it gets; they are mapped from the new file.

    Raises:
        ConfigError: the configuration is not understood.
        OSError: the folder cannot be written.
    """
    model = begin(folder, manifest)
    store_weights(model)
    del model  # the page cache keeps pages that are still mapped
    finish(folder, manifest)


def begin(folder: Path, manifest: PackedManifest, *, resume: bool = False) -> Decoder:
    """Return a model whose weights are mapped from the weight file of a packed folder, and change it.

    Args:
        folder: an existing folder.
        manifest: description of the model.
        resume: keep the weights of the file, which an earlier call has created; otherwise they are uninitialized.

    Raises:
        ConfigError: the configuration is not understood.
        CheckpointError: the file that is kept is not that of this model.
        OSError: the file cannot be written.
    """
    model = manifest.build(folder)
    if not resume:
        _write_header(model, folder / WEIGHTS)
    _map_weights(model, folder / WEIGHTS, shared=True)
    return model


def finish(folder: Path, manifest: PackedManifest) -> None:
    """Complete the packed folder whose weights are all stored; no model may map them for writing any more."""
    memory.evict(folder / WEIGHTS)
    # The manifest is written last: a folder without it is not a packed folder.
    _write.write_json(folder / MANIFEST, {"packed": VERSION} | asdict(manifest))


def read_manifest(path: Path) -> PackedManifest:
    """Return the manifest of the packed folder ``path``.

    Raises:
        CheckpointError: the manifest cannot be read or understood.
    """
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        manifest = PackedManifest(**{key: content[key] for key in PackedManifest.__dataclass_fields__})
        version = content["packed"]
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(file, "damaged: it does not describe packed weights; pack the model again") from error
    if version != VERSION:
        raise CheckpointError(file, f"has version {version}, but this build reads {VERSION}: pack the model again")
    return manifest


def map_weights(model: Decoder, path: Path) -> None:
    """Map the weights of ``model``, which is on the meta device, from the packed folder ``path``.

    Raises:
        CheckpointError: the file of the weights is missing, damaged or not that of this model.
    """
    mapped, read_by_every_token = _map_weights(model, path / WEIGHTS, shared=False)
    # Half of memory stays for experts, the cache and other processes: the kernel cannot reclaim locked pages.
    memory.lock(read_by_every_token, memory.total() // 2)
    if mapped.nbytes < memory.available():
        memory.load_in_background(mapped)
    else:
        _prefetch_experts(model)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the packed folder ``path`` as a checkpoint, whose weights keep their codes; the weights are mapped.

    Raises:
        CheckpointError: a file is missing, damaged or not understood.
    """
    manifest = read_manifest(path)
    model = manifest.build(path)
    _map_weights(model, path / WEIGHTS, shared=False)
    views = {slot.name: packed_view(slot, path / WEIGHTS) for slot in model.slots()}
    return Checkpoint("packed", path, manifest.config, manifest.generation, views, lambda: None, manifest.dtype)


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _offsets(model: Decoder) -> dict[str, tuple[int, Tensor]]:
    """Return, by name, each parameter of ``model`` with its offset in bytes in the data of the weight file.

    Experts come last, after the weights that every token reads.
    """
    offsets: dict[str, tuple[int, Tensor]] = {}
    end = 0
    for name, parameter in sorted(model.named_parameters(), key=lambda item: _is_expert(item[0])):
        offsets[name] = (end, parameter)
        end += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets


def _write_header(model: Decoder, file: Path) -> None:
    """Create ``file`` with a header for the model's parameters and unwritten space for their data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (begin, parameter) in _offsets(model).items():
        if begin > end:  # safetensors files may not have gaps between tensors
            header[f"pad.{begin}"] = {"dtype": "U8", "shape": [begin - end], "data_offsets": [end, begin]}
        end = begin + parameter.nbytes
        code = _safetensors.CODES[parameter.dtype]
        header[name] = {"dtype": code, "shape": list(parameter.shape), "data_offsets": [begin, end]}
    head = _safetensors.head(header, 4096)
    with file.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + end)


def _map_weights(model: Decoder, file: Path, *, shared: bool) -> tuple[Tensor, list[Tensor]]:
    """Replace the model's parameters with views of ``file``; if ``shared``, writes to them change the file.

    Return the bytes of the file, and the parts of them that every token reads.
    """
    infos = _safetensors.header(file)
    mapped = _map_file(file, shared)
    with file.open("rb") as stream:
        data = 8 + struct.unpack("<Q", stream.read(8))[0]
    read_by_every_token = []
    for name, (begin, parameter) in _offsets(model).items():
        info = infos.get(name)
        if info is None or info.shape != tuple(parameter.shape) or info.dtype != parameter.dtype:
            raise CheckpointError(file, f"damaged: {name} does not match the configuration; pack the model again")
        part = mapped[data + begin : data + begin + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        if not _is_expert(name):
            read_by_every_token.append(part)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(part, requires_grad=False))
    return mapped, read_by_every_token


def _map_file(file: Path, shared: bool) -> Tensor:
    if shared:
        return torch.from_file(str(file), shared=True, size=file.stat().st_size, dtype=torch.uint8)
    try:
        return memory.map_file(file)
    except OSError as error:
        raise CheckpointError(file, f"cannot be mapped: {error.strerror}") from error


def _prefetch_experts(model: Decoder) -> None:
    """Make ``model`` read experts from disk as soon as the router has chosen them.

    All chosen experts of a layer are then read together, and not one after another when a kernel accesses them.
    """
    prefetcher = memory.Prefetcher()

    def prefetch(layer: Experts, inputs: tuple[Tensor, ...]) -> None:
        chosen = inputs[1]
        if chosen.device.type != "cpu":  # the weights were moved to another device and are no longer mapped
            return

        def parts() -> Iterator[Tensor]:
            for expert in chosen.unique().tolist():
                for stack in (layer.gate, layer.up, layer.down):  # in the order in which the kernel reads them
                    yield from (part[expert] for part in stack.parts().values())

        prefetcher.prefetch(parts)

    for module in model.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(prefetch)
