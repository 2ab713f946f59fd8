"""Checkpoint layouts: one module for each way in which weights are stored on disk.

A module ``checkpoints/<name>.py`` defines

    LOOKS_FOR                                   description of the files that ``detect`` looks for
    PRIORITY                                    layouts with a lower number are tried first
    detect(path) -> bool                        whether a folder or a file is in this layout; never raises
    open_checkpoint(path) -> Checkpoint         the checkpoint, with its tensors described but not read
    write(source, path, options)                optional: writes a checkpoint completely or not at all

All layouts present the same view of a checkpoint: Hugging Face's classic tensor names, query and key rows in half-split
rotary order, and a configuration with the keys of config.json. This package does not depend on models. A model declares
slots, each of which names a tensor and stores it in a parameter. ``load_weights`` fills the slots.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from moesaic import registry
from moesaic.checkpoints._foreign import refuse_adapter, refuse_adapter_config, refuse_names
from moesaic.checkpoints._views import CodedView, Index, TensorInfo, View, dtype_name
from moesaic.errors import CheckpointError, NotFound
from moesaic.formats import Slot, WeightFormat, grouped

__all__ = ["Checkpoint", "TensorInfo", "detect_layout", "load_weights", "open_checkpoint"]

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

IGNORED_TENSORS = {
    # Older programs stored the tables of rotary frequencies, which follow from the configuration.
    re.compile(r"(.*\.)?rotary_emb\.inv_freq"): "computed from the configuration",
    re.compile(r"rope\.freqs"): "computed from the configuration",
}
"""Names of tensors that a checkpoint may hold although no model needs them, and the reason."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = "tie_word_embeddings"
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
_EXPERT = re.compile(r"\.experts\.\d+\.")


class Checkpoint(AbstractContextManager["Checkpoint"]):
    """An open checkpoint in any layout; as a context manager, it closes its files on exit.

    Attributes:
        layout: name of the layout.
        path: folder or file of the checkpoint.
        config: configuration with the keys of config.json and unchanged values.
        generation: content of generation_config.json; empty if there is none.
        tensors: shape, dtype and file of every tensor by its classic (Hugging Face's) name, in the order on disk.
        preferred_dtype: name of the dtype to load weights in if the user does not choose one; None: the dtype in which
            most bytes are stored.
    """

    def __init__(
        self,
        layout: str,
        path: Path,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        views: Mapping[str, View],
        close: Callable[[], None],
        preferred_dtype: str | None = None,
    ) -> None:
        self.layout = layout
        self.path = path
        self.config = MappingProxyType(dict(config))
        self.generation = MappingProxyType(dict(generation))
        self.tensors: Mapping[str, TensorInfo] = {name: view.info for name, view in views.items()}
        self.preferred_dtype = preferred_dtype
        self._views = views
        self._close = close

    @functools.cached_property
    def quantized(self) -> Mapping[str, CodedView]:
        """Views of the quantized tensors, by name.

        Raises:
            CheckpointError: the ``g_idx`` of a tensor, the group of each of its columns, is damaged.
        """
        return {name: view for name, view in self._views.items() if isinstance(view, CodedView)}

    def stored_format(self, name: str) -> grouped.Format | None:
        """Return the format that keeps the codes of tensor ``name``; None if there is none, or the tensor is plain."""
        return self.quantized[name].format if name in self.quantized else None

    def kept_formats(self) -> dict[str, grouped.Format]:
        """Return the format of each tensor whose codes are kept, by name.

        The experts of a layer share one format, which has the name of the first expert's tensor. If their formats
        differ, it is one that holds all of them; if there is none, these experts are left out.
        """
        found: dict[str, set[grouped.Format | None]] = {}
        for name in self.tensors:
            found.setdefault(_EXPERT.sub(".experts.0.", name), set()).add(self.stored_format(name))
        kept = {}
        for name, kinds in found.items():
            formats = {kind for kind in kinds if kind is not None}
            if formats == kinds and (shared := grouped.common(formats)):
                kept[name] = shared
        return kept

    def keeps(self, name: str, weight_format: WeightFormat | None) -> bool:
        """Return whether tensor ``name`` keeps its codes in a weight of this format."""
        return isinstance(weight_format, grouped.Format) and weight_format.holds(self.stored_format(name))

    def stored_type(self, name: str) -> str:
        """Return the type of tensor ``name`` on disk: the kind of its codes, such as Q4_1, or its dtype."""
        return self.quantized[name].kind if name in self.quantized else dtype_name(self.tensors[name].dtype)

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return tensor ``name``, or the part of it that ``index`` selects; only that part is read.

        Raises:
            CheckpointError: the tensor does not exist, or its data cannot be read.
        """
        if name not in self._views:
            raise CheckpointError(self.path, f"there is no tensor {name}")
        return self._views[name].read(index)

    def view(self, name: str) -> View:
        """Return a description of tensor ``name``, which it can be read from later."""
        return self._views[name]

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        self._close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def detect_layout(path: Path) -> ModuleType:
    """Return the module in ``checkpoints`` that reads the layout of the folder or file ``path``.

    A folder can hold the same weights in two layouts, as Mistral's releases do. The ``PRIORITY`` of the layouts then
    decides: hf before meta before mistral before gguf.

    Raises:
        NotFound: the folder or file does not exist.
        CheckpointError: the path holds a PEFT adapter, or no known layout; the message names the files of all layouts.
    """
    if not path.exists():
        raise NotFound(f"{path}: no such folder or file")
    refuse_adapter(path)
    layouts = [registry.load("checkpoints", name) for name in registry.names("checkpoints")]
    layouts.sort(key=lambda layout: layout.PRIORITY)
    for layout in layouts:
        if layout.detect(path):
            return layout
    if not path.is_dir():
        raise CheckpointError(path, "is a file, but not a GGUF file; give the folder that holds it instead")
    refuse_adapter_config(path)
    expected = "; ".join(f"{layout.__name__.rpartition('.')[2]}: {layout.LOOKS_FOR}" for layout in layouts)
    raise CheckpointError(path, f"holds no checkpoint. Looked for {expected}")


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open the checkpoint in the folder or file ``path``, in whatever layout it is.

    Raises:
        NotFound: the folder or file does not exist.
        CheckpointError: the path holds no checkpoint, or a damaged one.
    """
    folder = Path(path)
    checkpoint: Checkpoint = detect_layout(folder).open_checkpoint(folder)
    return checkpoint


def ignored_reason(name: str) -> str | None:
    """Return why a checkpoint may hold the tensor ``name`` although no model needs it; None if it may not."""
    return next((reason for pattern, reason in IGNORED_TENSORS.items() if pattern.fullmatch(name)), None)


def load_weights(
    slots: Iterable[Slot],
    checkpoint: Checkpoint,
    *,
    later: Callable[[Slot], bool] = lambda _slot: False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Store the tensors of ``checkpoint`` in the parameters of a model, in disk order, one tensor in memory at a time.

    Args:
        slots: the slots of the model. Each names a tensor, or a part of it, and stores it in a parameter. Several slots
            may name the same tensor. A quantized tensor in the format of its slot keeps its codes.
        checkpoint: the open checkpoint.
        later: whether a slot is only checked, because the caller fills it later.
        progress: called after each tensor with the bytes read so far and in total, counted as decoded.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape or not a plain float; this is checked
            before any tensor is stored. Or a tensor holds NaN or infinity; this is checked when it is read.
    """
    wanted = _by_name(slots)
    _check_tensors(wanted, checkpoint)
    parts = [(name, slot) for name in checkpoint.tensors for slot in wanted.get(name, ()) if not later(slot)]
    total, done = sum(_nbytes(slot, checkpoint) for _, slot in parts), 0
    for name, slot in parts:
        _load(name, slot, checkpoint)
        done += _nbytes(slot, checkpoint)
        if progress is not None:
            progress(done, total)


def _load(name: str, slot: Slot, checkpoint: Checkpoint) -> None:
    """Store a tensor in its slot: as its codes if the format of the slot holds them, otherwise as floats."""
    info, kept = checkpoint.tensors[name], checkpoint.stored_format(name)
    if isinstance(slot.format, grouped.Format) and kept and slot.format.holds(kept) and slot.store_codes is not None:
        codes = checkpoint.quantized[name].codes(slot.index)
        for scale in codes.scales():
            _check_finite(scale, info.file, f"a scale of {name}")
        slot.store_codes(slot.format.converted(codes, kept) if slot.format != kept else codes)
        return
    slot.store(read_plain(slot, checkpoint))


def read_plain(slot: Slot, checkpoint: Checkpoint) -> Tensor:
    """Return the floats of the tensor that fills a slot.

    Raises:
        CheckpointError: the tensor holds NaN or infinity, or its data cannot be read.
    """
    tensor = checkpoint.read(slot.name, slot.index)
    _check_finite(tensor, checkpoint.tensors[slot.name].file, slot.name)
    return tensor


def check_complete(slots: Iterable[Slot], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless ``checkpoint`` has the tensor of every slot, in the right shape.

    Also raise it if the head is tied to the embedding, but differs from it. This is the check before a copy. The copy
    keeps all tensors: any dtype is accepted, and so are tensors that no slot names.
    """
    wanted = _by_name(slots)
    _check_missing(wanted, checkpoint)
    _check_shapes(wanted, checkpoint)
    check_head(checkpoint)


def _by_name(slots: Iterable[Slot]) -> dict[str, list[Slot]]:
    wanted: dict[str, list[Slot]] = {}
    for slot in slots:
        wanted.setdefault(slot.name, []).append(slot)
    return wanted


def _check_tensors(wanted: Mapping[str, list[Slot]], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless names, shapes and dtypes of the tensors are those that the model's slots expect."""
    tensors = checkpoint.tensors
    _check_missing(wanted, checkpoint)
    check_head(checkpoint)
    unexpected = [name for name in tensors if name not in wanted and not _is_ignored(name, checkpoint)]
    if unexpected:
        info = tensors[unexpected[0]]
        raise CheckpointError(
            info.file,
            f"{unexpected[0]} is unexpected{_more(unexpected)}: this architecture has no such tensor, "
            f"found shape {list(info.shape)}",
        )
    _check_shapes(wanted, checkpoint)
    for name in wanted:
        info = tensors[name]
        if info.dtype not in PLAIN_DTYPES:
            names = ", ".join(dtype_name(dtype) for dtype in PLAIN_DTYPES)
            problem = f"{name} has the wrong dtype: expected {names}, found {dtype_name(info.dtype)}"
            raise CheckpointError(info.file, problem)


def _check_missing(wanted: Mapping[str, list[Slot]], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a tensor that the slots expect is missing."""
    refuse_names(checkpoint.tensors, checkpoint.path)
    missing = sorted(wanted.keys() - checkpoint.tensors.keys())
    if missing:
        expected = list(wanted[missing[0]][0].shape)
        raise CheckpointError(
            checkpoint.path, f"{missing[0]} is missing{_more(missing)}: expected shape {expected}, found no such tensor"
        )


def _check_shapes(wanted: Mapping[str, list[Slot]], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a tensor does not have the shape that the slots expect."""
    for name, slots in wanted.items():
        info, expected = checkpoint.tensors[name], list(slots[0].shape)
        if list(info.shape) != expected:
            raise CheckpointError(
                info.file, f"{name} has the wrong shape: expected {expected}, found {list(info.shape)}"
            )


def check_head(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the checkpoint has a head that differs from the embedding, although the two are tied.

    It is not known which of the two was meant, so neither is ignored. Data is read only if there are both tensors.
    """
    if not _tied_with_head(checkpoint):
        return
    if not _equal(checkpoint, HEAD, EMBEDDING):
        raise CheckpointError(
            checkpoint.tensors[HEAD].file,
            f"{HEAD} is unexpected: {TIED} is true, but it differs from {EMBEDDING}; set {TIED} to false in "
            "config.json if the model has this head, or delete the tensor",
        )


def _tied_with_head(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get(TIED) is True and {HEAD, EMBEDDING} <= checkpoint.tensors.keys()


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _is_ignored(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether the tensor ``name``, which no slot takes, may be ignored; ``check_head`` compares a tied head."""
    if (name == HEAD and _tied_with_head(checkpoint)) or ignored_reason(name) is not None:
        return True
    # Some programs that quantize write a bias of zeros for each layer that has none.
    layer, _, part = name.rpartition(".")
    is_bias = part == "bias" and f"{layer}.weight" in checkpoint.tensors
    return is_bias and checkpoint.tensors[name].dtype in PLAIN_DTYPES and not checkpoint.read(name).any()


def _equal(checkpoint: Checkpoint, one: str, other: str, rows: int = 4096) -> bool:
    """Return whether the tensors ``one`` and ``other`` are equal; they are read ``rows`` rows at a time."""
    shape = checkpoint.tensors[one].shape
    if shape != checkpoint.tensors[other].shape:
        return False
    spans = [(slice(begin, begin + rows),) for begin in range(0, shape[0], rows)]
    return all(torch.equal(checkpoint.read(one, span), checkpoint.read(other, span)) for span in spans)


def _nbytes(slot: Slot, checkpoint: Checkpoint) -> int:
    """Return the bytes of the part of a tensor that a slot takes, as ``read`` returns it: quantized weights decoded."""
    lengths = [len(range(*part.indices(size))) for part, size in zip(slot.index, slot.shape, strict=False)]
    return torch.Size((*lengths, *slot.shape[len(lengths) :])).numel() * checkpoint.tensors[slot.name].dtype.itemsize


def _check_finite(tensor: Tensor, file: Path, name: str) -> None:
    """Raise CheckpointError if ``tensor`` holds NaN or infinity, without allocating memory of its size."""
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        kind = "NaN" if torch.isnan(torch.aminmax(tensor)[0]) else "infinity"
        raise CheckpointError(file, f"{name} holds {kind}: expected finite weights; fetch the file again")


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the name of the dtype to load weights in.

    It is ``preferred_dtype``, or else the dtype in which most bytes are stored. If the latter is not float32, bfloat16
    or float16, return "float32".
    """
    if checkpoint.preferred_dtype is not None:
        return checkpoint.preferred_dtype
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        name = dtype_name(info.dtype)
        sizes[name] = sizes.get(name, 0) + info.nbytes
    most_used = max(sizes, key=lambda name: sizes[name], default="float32")
    return most_used if most_used in FLOAT_DTYPES else "float32"
