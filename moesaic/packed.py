"""Weights as the kernels read them, in a folder: quantized once, mapped ever after.

    moesaic.json           {"packed": 1, "dtype": ..., "formats": {role: format}, "config": {...}, "generation": {...}}
    weights.safetensors    every parameter of the model by its name, each at a multiple of 64 bytes

beside the tokenizer's files. Loading maps the file: nothing is read before it is needed, what is
needed is shared by all processes, and a model larger than memory runs, slowly.

Knows this folder. Does not know formats: a part is bytes of a shape and a dtype.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic import checkpoints, formats, models
from moesaic.checkpoints import _safetensors, _write
from moesaic.errors import CheckpointError
from moesaic.formats import Packed
from moesaic.models import Decoder

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
        model = _build(checkpoint.config, checkpoint.path, name, roles)
        with _write.target(Path(dst), checkpoint) as folder:
            _map(model, _lay(model, folder / WEIGHTS), written=True)
            checkpoints.fill(model.slots(), checkpoint, progress=progress)
            content = {"packed": VERSION, "dtype": name, "formats": {role: each.name for role, each in roles.items()}}
            content |= {"config": dict(checkpoint.config), "generation": _write.generation(checkpoint)}
            _write.write_json(folder / MARK, content)


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


def load(path: Path, said: Mark | None = None) -> Decoder:
    """Return the model in the packed folder ``path``, its weights mapped; ``said``: what ``read`` gave.

    Raises:
        CheckpointError: something in it is missing, damaged or not understood.
    """
    said = said or read(path)
    roles = {role: formats.load(name) for role, name in said.formats.items()}
    model = _build(said.config, path, said.dtype, roles)
    _map(model, path / WEIGHTS, written=False)
    return model


def _build(config: Mapping[str, Any], path: Path, dtype: str, roles: Mapping[str, type[Packed]]) -> Decoder:
    return models.build(config, path, roles, dtype=getattr(torch, dtype), device="meta")


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
    size = file.stat().st_size
    whole = torch.from_file(str(file), shared=written, size=size, dtype=torch.uint8)
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
        _lock(always)


def _lock(parts: list[Tensor]) -> None:
    """Ask the system to keep these in memory, as far as it lets us: they are read for every token."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        lock = libc.mlock2
    except (OSError, AttributeError):
        return
    on_fault = 1  # when they are first read, not now
    for part in parts:
        lock(ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(part.nbytes), on_fault)
