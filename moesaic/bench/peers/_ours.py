"""Helpers for Moesaic's own two engines, the model step and the whole LLM. They run where Moesaic is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from moesaic import packed
from moesaic.bench.peers._process import INSTRUCTION_SET
from moesaic.formats import Packed
from moesaic.models import Decoder
from moesaic.ops import native
from moesaic.registry import names


def packed_folder(source: Path, folder: Path, weight_format: str) -> Path:
    """Return the folder inside ``folder`` with ``source`` packed in a weight format; create it if it does not exist.

    If the format is not quantized, return ``source`` itself.
    """
    if weight_format in names("formats") and weight_format in ("float32", "bfloat16", "float16"):
        return source
    target = folder / f"moesaic-{weight_format}"
    if not target.exists():
        packed.pack(source, target, weight_format)
    return target


def set_up(threads: int, torch_threads: int | None) -> None:
    """Set the number of threads of the kernels to ``threads``, and of torch to ``torch_threads`` (None: the same).

    The environment may name the instruction set of the kernels.
    """
    if native.why_not("rms_norm", "cpu", None) is None:
        native.set_threads(threads)
        if isa := os.environ.get(INSTRUCTION_SET):
            native.use_instruction_set(isa)
    torch.set_num_threads(torch_threads or threads)


def about(model: Decoder) -> dict[str, Any]:
    """Return the kernels' instruction set, the weight formats and the data type with which the model runs."""
    compiled = native.why_not("rms_norm", "cpu", None) is None
    formats = {module.name for module in model.modules() if isinstance(module, Packed)}
    isa = native.instruction_set() if compiled else "none: torch"
    return {"kernels": isa, "formats": sorted(formats), "dtype": str(model.dtype).removeprefix("torch.")}


def weights(model: Decoder) -> tuple[int, int]:
    """Return (bytes of all experts, bytes of all other weights that every step reads)."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    looked_up = not model.shape.tied  # a tied embedding is the head, too
    embedding = sum(size for name, size in sizes.items() if looked_up and name.startswith("embed."))
    return experts, sum(sizes.values()) - experts - embedding
