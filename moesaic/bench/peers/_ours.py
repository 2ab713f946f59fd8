"""What our two peers, the model step and the whole LLM, have in common. Runs where Moesaic is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moesaic import packed
from moesaic.formats import Packed
from moesaic.models import Decoder
from moesaic.ops import native
from moesaic.registry import names


def packed_folder(source: Path, folder: Path, format: str) -> Path:
    """Return ``source`` packed in ``format`` inside ``folder``; ``source`` itself where nothing is quantized."""
    if format in names("formats") and format in ("float32", "bfloat16", "float16"):
        return source
    target = folder / f"moesaic-{format}"
    if not target.exists():
        packed.pack(source, target, format)
    return target


def use_threads(threads: int, of_torch: int | None) -> None:
    """Let the kernels use ``threads``, and torch as many as the engine would give it."""
    if native.why_not("rms_norm", "cpu", None) is None:
        native.set_threads(threads)
    torch.set_num_threads(of_torch or threads)


def about(model: Decoder) -> dict[str, Any]:
    """Return what runs the model."""
    compiled = native.why_not("rms_norm", "cpu", None) is None
    formats = {each.name for each in model.modules() if isinstance(each, Packed)}
    isa = native.instruction_set() if compiled else "none: torch"
    return {"kernels": isa, "formats": sorted(formats), "dtype": str(model.dtype).removeprefix("torch.")}


def weights(model: Decoder) -> tuple[int, int]:
    """Return the bytes of the experts, and of all else that every step reads."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    embedding = sum(size for name, size in sizes.items() if name.startswith("embed."))
    return experts, sum(sizes.values()) - experts - embedding
