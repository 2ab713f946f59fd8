"""Shared parts of our two peers, the model step and the whole LLM. They run where Moesaic is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moesaic import packed
from moesaic.formats import Packed
from moesaic.models import Decoder
from moesaic.ops import native
from moesaic.registry import names


def packed_folder(source: Path, folder: Path, weight_format: str) -> Path:
    """Return the packed folder of ``source`` in a format, inside ``folder``; create it if it does not exist.

    Return ``source`` itself if the format is not quantized.
    """
    if weight_format in names("formats") and weight_format in ("float32", "bfloat16", "float16"):
        return source
    target = folder / f"moesaic-{weight_format}"
    if not target.exists():
        packed.pack(source, target, weight_format)
    return target


def use_threads(threads: int, torch_threads: int | None) -> None:
    """Set the number of threads of the kernels, and of torch (None: the same number)."""
    if native.why_not("rms_norm", "cpu", None) is None:
        native.set_threads(threads)
    torch.set_num_threads(torch_threads or threads)


def about(model: Decoder) -> dict[str, Any]:
    """Return the kernels, formats and data type that run the model."""
    compiled = native.why_not("rms_norm", "cpu", None) is None
    formats = {module.name for module in model.modules() if isinstance(module, Packed)}
    isa = native.instruction_set() if compiled else "none: torch"
    return {"kernels": isa, "formats": sorted(formats), "dtype": str(model.dtype).removeprefix("torch.")}


def weights(model: Decoder) -> tuple[int, int]:
    """Return the bytes of all experts, and of all other weights that every step reads."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    embedding = sum(size for name, size in sizes.items() if name.startswith("embed."))
    return experts, sum(sizes.values()) - experts - embedding
