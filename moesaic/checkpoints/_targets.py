"""What a checkpoint can be written as: a layout, or Hugging Face's layout with weights in a method of quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moesaic import registry
from moesaic.checkpoints import Checkpoint, _compressed_write, _gptq_write
from moesaic.checkpoints._write import WriteOptions
from moesaic.errors import InvalidParameter

Write = Callable[[Checkpoint, Path, WriteOptions], None]
"""Writes a checkpoint to a new folder, or to a new file, completely or not at all."""
QUANTIZATIONS: Mapping[str, Write] = {"compressed-tensors": _compressed_write.write, "gptq": _gptq_write.write}
"""Methods of quantization whose weights can be written, by their names: ``quant_method`` in config.json."""


def writer(name: str) -> Write:
    """Return the function that writes the target ``name``: a layout, or one of ``QUANTIZATIONS``.

    Raises:
        NotFound: there is no such target.
        InvalidParameter: the layout is only read.
    """
    if name in QUANTIZATIONS:
        return QUANTIZATIONS[name]
    layout = registry.load("checkpoints", name)
    if not hasattr(layout, "write"):
        raise InvalidParameter("to", f"is {name}, a layout that is only read; choose another one")
    write: Write = layout.write
    return write
