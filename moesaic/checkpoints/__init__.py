"""How weights lie on disk: one file = one layout.

A file ``checkpoints/<name>.py`` defines

    LOOKS_FOR                                   what ``detect`` looks for, to be shown to a person
    detect(path) -> bool                        whether this folder is in this layout; never raises
    open(path) -> Checkpoint                    the checkpoint, its tensors known but not read
    write(source, path, shards, wrote)          the same weights in this layout, all or nothing

Every layout speaks one language: Hugging Face's classic tensor names, query and key rows in
half-split rotary order, and a configuration in config.json's vocabulary. Nothing here knows what
a tensor is used for; ``fill`` brings a checkpoint and a model's slots together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from moesaic import registry
from moesaic.checkpoints._views import Index, TensorInfo, View
from moesaic.errors import CheckpointError, NotFound
from moesaic.formats import Slot

__all__ = ["Checkpoint", "TensorInfo", "detect", "fill", "open"]

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

HARMLESS = {
    # Tables of rotary frequencies follow from the configuration; older writers stored them all the same.
    re.compile(r"(.*\.)?rotary_emb\.inv_freq"): "computed from the configuration",
    re.compile(r"rope\.freqs"): "computed from the configuration",
}
"""Tensors that a checkpoint may hold and no model asks for, and why that loses nothing."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = "tie_word_embeddings"


FLOATS = ("float32", "bfloat16", "float16")


class Checkpoint(AbstractContextManager["Checkpoint"]):
    """A checkpoint on disk, whatever its layout, in the common language; leaving it closes its files.

    Attributes:
        layout: the file of this folder that opened it.
        path: the folder it lies in.
        config: in config.json's vocabulary, values untouched.
        generation: what generation_config.json says, or nothing.
        tensors: shape, dtype and file of every tensor, in the order in which they lie on disk.
    """

    def __init__(
        self,
        layout: str,
        path: Path,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        views: Mapping[str, View],
        close: Callable[[], None],
    ) -> None:
        self.layout = layout
        self.path = path
        self.config = MappingProxyType(dict(config))
        self.generation = MappingProxyType(dict(generation))
        self.tensors: Mapping[str, TensorInfo] = {name: view.info for name, view in views.items()}
        self._views = views
        self._close = close

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return tensor ``name``, or the part of it that ``index`` names; no more than that is read.

        Raises:
            CheckpointError: there is no such tensor, or its data cannot be read.
        """
        if name not in self._views:
            raise CheckpointError(self.path, f"there is no tensor {name}")
        return self._views[name].read(index)

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        self._close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def detect(path: Path) -> ModuleType:
    """Return the layout that the folder ``path`` is in.

    A folder can hold the same weights in two layouts, as Mistral's releases do; the first that
    answers, in the order of their names, is taken, and that is ``hf`` before the others.

    Raises:
        NotFound: there is no such folder.
        CheckpointError: there is nothing in it that any layout knows; the message says what was looked for.
    """
    if not path.exists():
        raise NotFound(f"{path}: no such folder")
    if not path.is_dir():
        raise CheckpointError(path, "is a file; give the folder that holds it")
    layouts = [registry.load("checkpoints", name) for name in registry.names("checkpoints")]
    for layout in layouts:
        if layout.detect(path):
            return layout
    looked = "; ".join(f"{layout.__name__.rpartition('.')[2]}: {layout.LOOKS_FOR}" for layout in layouts)
    raise CheckpointError(path, f"holds no checkpoint. Looked for {looked}")


def open(path: Path | str) -> Checkpoint:
    """Open the checkpoint in the folder ``path``, whatever its layout.

    Raises:
        NotFound: there is no such folder.
        CheckpointError: it holds no checkpoint, or a damaged one.
    """
    folder = Path(path)
    checkpoint: Checkpoint = detect(folder).open(folder)
    return checkpoint


def surplus_reason(name: str) -> str | None:
    """Return why a checkpoint may hold a tensor of this name that no model asks for, or None if it may not."""
    return next((reason for pattern, reason in HARMLESS.items() if pattern.fullmatch(name)), None)


def fill(slots: Iterable[Slot], checkpoint: Checkpoint, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Fill every slot of a model from ``checkpoint``, streamed in disk order, one tensor in memory at a time.

    Args:
        slots: what the model wants; several slots may want the same tensor.
        checkpoint: where it comes from.
        progress: called after each tensor with the bytes read so far and the bytes there are to read.

    Raises:
        CheckpointError: a tensor is missing, surplus, of the wrong shape or not a plain float (all found
            before the first is stored), or holds NaN or infinity (found when it is read).
    """
    wanted: dict[str, list[Slot]] = {}
    for slot in slots:
        wanted.setdefault(slot.name, []).append(slot)
    _compare(wanted, checkpoint)
    parts = [(name, slot) for name in checkpoint.tensors for slot in wanted.get(name, ())]
    total, done = sum(_nbytes(slot, checkpoint) for _, slot in parts), 0
    for name, slot in parts:
        tensor = checkpoint.read(name, slot.index)
        _finite(tensor, checkpoint.tensors[name].file, name)
        slot.store(tensor)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def _compare(wanted: Mapping[str, list[Slot]], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the tensors are exactly those wanted, in shape and kind."""
    tensors = checkpoint.tensors
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        expected = list(wanted[missing[0]][0].shape)
        raise CheckpointError(
            checkpoint.path, f"{missing[0]} is missing{_more(missing)}: expected shape {expected}, found no such tensor"
        )
    surplus = [name for name in tensors if name not in wanted and not _harmless(name, checkpoint)]
    if surplus:
        info = tensors[surplus[0]]
        raise CheckpointError(
            info.file,
            f"{surplus[0]} is surplus{_more(surplus)}: expected no such tensor in this architecture, "
            f"found shape {list(info.shape)}",
        )
    for name, places in wanted.items():
        info, expected = tensors[name], list(places[0].shape)
        if list(info.shape) != expected:
            raise CheckpointError(
                info.file, f"{name} has the wrong shape: expected {expected}, found {list(info.shape)}"
            )
        if info.dtype not in PLAIN:
            kinds = ", ".join(_kind(dtype) for dtype in PLAIN)
            raise CheckpointError(info.file, f"{name} has the wrong dtype: expected {kinds}, found {_kind(info.dtype)}")


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _harmless(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether a surplus tensor may be passed over; reads only where a tied head must be compared."""
    if name == HEAD and checkpoint.config.get(TIED) is True and EMBEDDING in checkpoint.tensors:
        return _same(checkpoint, HEAD, EMBEDDING)
    return surplus_reason(name) is not None


def _same(checkpoint: Checkpoint, one: str, other: str, rows: int = 4096) -> bool:
    """Return whether two tensors are equal, comparing ``rows`` rows at a time."""
    shape = checkpoint.tensors[one].shape
    if shape != checkpoint.tensors[other].shape:
        return False
    spans = [(slice(begin, begin + rows),) for begin in range(0, shape[0], rows)]
    return all(torch.equal(checkpoint.read(one, span), checkpoint.read(other, span)) for span in spans)


def _nbytes(slot: Slot, checkpoint: Checkpoint) -> int:
    """Return the bytes that reading this slot's part takes."""
    lengths = [len(range(*part.indices(size))) for part, size in zip(slot.index, slot.shape, strict=False)]
    return torch.Size((*lengths, *slot.shape[len(lengths) :])).numel() * checkpoint.tensors[slot.name].dtype.itemsize


def _finite(tensor: Tensor, file: Path, name: str) -> None:
    """Raise CheckpointError if ``tensor`` holds NaN or infinity; needs no memory of its size."""
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        kind = "NaN" if torch.isnan(torch.aminmax(tensor)[0]) else "infinity"
        raise CheckpointError(file, f"{name} holds {kind}: expected finite weights; fetch the file again")


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that most of the checkpoint's bytes are in; float64 counts as float32."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + info.nbytes
    most = max(sizes, key=lambda name: sizes[name], default="float32")
    return most if most in FLOATS else "float32"
