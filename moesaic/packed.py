"""Weights as the kernels read them, in a folder: quantized once, mapped ever after.

    moesaic.json           {"packed": 1, "dtype": ..., "formats": {role: format}, "config": {...}, "generation": {...}}
    weights.safetensors    every parameter of the model by its name, each at a multiple of 64 bytes

beside the tokenizer's files. Loading maps the file, which all processes share, and returns at once: a
model that fits in memory is fetched in the background, in large pages; a larger one runs, slowly: what
every token needs is kept, and experts are asked for as soon as they are chosen.

Knows this folder. Does not know formats: a part is bytes of a shape and a dtype.
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
from moesaic.checkpoints import _safetensors, _write
from moesaic.errors import CheckpointError
from moesaic.models import Decoder, Experts

MARK, WEIGHTS = "moesaic.json", "weights.safetensors"
VERSION = 1
ALIGNED = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Mark:
    """What a packed folder says about itself."""

    dtype: str
    formats: Mapping[str, str]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]


def is_packed(path: Path) -> bool:
    """Return whether ``path`` is a folder that ``pack`` wrote."""
    return (path / MARK).is_file()


def pack(src: Path | str, dst: Path | str, format: str, dtype: str = "auto", progress: Progress | None = None) -> None:
    """Quantize the checkpoint in ``src`` into the new folder ``dst``.

    The folder appears whole or not at all. Memory: one tensor, and what of the new file the system caches.

    Args:
        src: a folder in any layout.
        dst: a folder that does not exist yet, or is empty.
        format: see ``models.choose``.
        dtype: of activations and of what stays plain; auto: as the checkpoint is stored.
        progress: called with the bytes read so far and in all.

    Raises:
        NotFound: there is no such folder.
        InvalidParameter: an unknown format, or ``dst`` holds something.
        CheckpointError: ``src`` is damaged, or ``dst`` cannot be written.
    """
    models.choose(format, "float32")  # refused before anything is read
    with checkpoints.open(src) as checkpoint:
        name = checkpoints.stored_dtype(checkpoint) if dtype == "auto" else dtype
        roles = models.choose(format, name)
        with _write.target(Path(dst), checkpoint) as folder:
            kinds = {role: each.name for role, each in roles.items()}
            said = Mark(name, kinds, dict(checkpoint.config), _write.generation(checkpoint))
            create(folder, said, lambda model: checkpoints.fill(model.slots(), checkpoint, progress=progress))


def create(folder: Path, said: Mark, fill: Callable[[Decoder], object]) -> None:
    """Make a packed folder of what ``fill`` stores in a model's weights, which lie in the new file.

    Raises:
        ConfigError: the configuration is not understood.
        OSError: the disk does not take it.
    """
    model = build(folder, said)
    _map(model, _lay(model, folder / WEIGHTS), written=True)
    fill(model)
    del model  # what is mapped cannot be dropped
    memory.forget(folder / WEIGHTS)
    _write.write_json(folder / MARK, {"packed": VERSION} | asdict(said))  # last: without it there is no packed folder


def read(path: Path) -> Mark:
    """Return what ``moesaic.json`` in the folder ``path`` says.

    Raises:
        CheckpointError: it cannot be read or understood.
    """
    file = path / MARK
    try:
        content = json.loads(file.read_bytes())
        found = Mark(**{key: content[key] for key in Mark.__dataclass_fields__})
        version = content["packed"]
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(file, "damaged: it does not describe packed weights; pack the model again") from error
    if version != VERSION:
        raise CheckpointError(file, f"has version {version}, this build reads {VERSION}: pack the model again")
    return found


def build(path: Path, manifest: Mark) -> Decoder:
    """Return the model that ``manifest`` describes on the meta device, where its weights take no memory.

    Raises:
        ConfigError: the configuration of the model is not understood.
    """
    roles = {role: formats.load(name) for role, name in manifest.formats.items()}
    return models.build(manifest.config, path, roles, dtype=getattr(torch, manifest.dtype), device="meta")


def load(path: Path, said: Mark | None = None) -> Decoder:
    """Return the model in the packed folder ``path``, its weights mapped; ``said``: what ``read`` gave.

    Raises:
        CheckpointError: something in it is missing, damaged or not understood.
    """
    said = said or read(path)
    model = build(path, said)
    _map(model, path / WEIGHTS, written=False)
    return model


def _places(model: Decoder) -> dict[str, tuple[int, Tensor]]:
    """Return where each parameter begins in the data; what is always read comes first, then the experts."""
    named = sorted(model.named_parameters(), key=lambda item: ".experts." in item[0])
    places: dict[str, tuple[int, Tensor]] = {}
    at = 0
    for name, parameter in named:
        places[name] = (at, parameter)
        at += -(-parameter.nbytes // ALIGNED) * ALIGNED
    return places


def _lay(model: Decoder, file: Path) -> Path:
    """Make ``file`` with a header for the model's parameters and room for their data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (begin, parameter) in _places(model).items():
        if begin > end:  # the format of safetensors knows no holes
            header[f"pad.{begin}"] = {"dtype": "U8", "shape": [begin - end], "data_offsets": [end, begin]}
        end = begin + parameter.nbytes
        code = _safetensors.CODES[parameter.dtype]
        header[name] = {"dtype": code, "shape": list(parameter.shape), "data_offsets": [begin, end]}
    head = _safetensors.head(header, 4096)
    with file.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + end)
    return file


def _map(model: Decoder, file: Path, *, written: bool) -> None:
    """Let the model's parameters be parts of ``file``; with ``written``, what is stored in them goes to it."""
    infos = _safetensors.header(file)
    whole = _whole(file, written)
    with file.open("rb") as stream:
        data = 8 + struct.unpack("<Q", stream.read(8))[0]
    always = []
    for name, (begin, parameter) in _places(model).items():
        info = infos.get(name)
        if info is None or info.shape != tuple(parameter.shape) or info.dtype != parameter.dtype:
            raise CheckpointError(file, f"damaged: {name} is not as its configuration wants it; pack the model again")
        part = whole[data + begin : data + begin + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        if ".experts." not in name:
            always.append(part)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(part, requires_grad=False))
    if not written:
        # The rest is for the experts, the cache and others: what is locked cannot be taken back in need.
        memory.lock(always, memory.total() // 2)
        if whole.nbytes < memory.available():
            memory.fetch(whole)
        else:
            _ask_early(model)


def _whole(file: Path, written: bool) -> Tensor:
    if written:
        return torch.from_file(str(file), shared=True, size=file.stat().st_size, dtype=torch.uint8)
    try:
        return memory.map_file(file)
    except OSError as error:
        raise CheckpointError(file, f"cannot be mapped: {error.strerror}") from error


def _ask_early(model: Decoder) -> None:
    """Have experts read from disk as soon as they are chosen, all at once, and not where a kernel stumbles on them."""
    early = memory.Early()

    def ask(layer: Experts, inputs: tuple[Tensor, ...]) -> None:
        chosen = inputs[1]
        if chosen.device.type != "cpu":  # the model was moved: nothing of it is mapped any more
            return

        def parts() -> Iterator[Tensor]:
            for expert in chosen.unique().tolist():
                for stack in (layer.gate, layer.up, layer.down):  # in the order in which they are read
                    yield from (part[expert] for part in stack.parts().values())

        early.ask(parts)

    for module in model.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(ask)
