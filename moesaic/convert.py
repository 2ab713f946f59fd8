"""Conversion of checkpoints to another layout or another number of files.

The conversion connects a reader and a writer of ``checkpoints``. Values and dtypes stay the same, except that quantized
weights are decoded to float32; tensor names, row order and configuration keys are translated. Nothing is lost: a
checkpoint is refused before anything is written if a tensor that its configuration requires is missing, or if the new
layout cannot hold one of its tensors. This module does not depend on any layout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from moesaic import checkpoints, formats, models, registry
from moesaic.checkpoints import Checkpoint
from moesaic.errors import ConfigError, InvalidParameter

_SIZES = (
    "model_type architectures id2label num_labels tie_word_embeddings vocab_size hidden_size intermediate_size "
    "num_hidden_layers num_attention_heads num_key_value_heads head_dim num_local_experts num_experts_per_tok"
).split()
"""Keys of config.json that define the names and shapes of tensors."""
_QUANTIZATION = ("compression_config", "quantization")
"""Keys of config.json that mean that the weights are quantized in a way that is not read, so that the tensors are not
those of the architecture."""


def convert(
    src: Path | str,
    dst: Path | str,
    to: str,
    shards: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the checkpoint in ``src`` to the new folder ``dst`` in layout ``to``, with its tokenizer files.

    The folder appears only when it is complete. At most one shard is in memory.

    Args:
        src: the folder or file of a checkpoint in any layout.
        dst: a folder that does not exist or is empty.
        to: the name of the layout: ``hf``, ``mistral`` or ``meta``.
        shards: number of files; for ``meta`` the number of model-parallel ranks, which must divide the heads.
        progress: called after each tensor with (bytes written, total bytes).

    Raises:
        NotFound: the folder or the layout does not exist.
        InvalidParameter: ``dst`` is not empty, or the weights cannot be split into ``shards`` files.
        ConfigError: the layout cannot express a setting that changes the computation.
        CheckpointError: ``src`` is damaged, lacks a tensor, or has one that the layout cannot hold; or ``dst`` cannot
            be written.
    """
    source, target = Path(src), Path(dst)
    layout = registry.load("checkpoints", to)
    if not hasattr(layout, "write"):
        raise InvalidParameter("to", f"is {to}, a layout that is only read; choose another one")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise InvalidParameter("dst", f"{target} is inside the source folder; choose another folder")
    with checkpoints.open_checkpoint(source) as checkpoint:
        _check_tensors(checkpoint)
        total, done = sum(info.nbytes for info in checkpoint.tensors.values()), 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, max(total, done))

        layout.write(checkpoint, target, shards, report)


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a tensor that the configuration requires is missing or has the wrong shape.

    For an architecture that is not supported, the required tensors are not known. Nothing is checked then, and the
    tensors are copied unchanged.
    """
    config = checkpoint.config
    if config.get("model_type") not in models.types() or any(config.get(key) for key in _QUANTIZATION):
        return
    sizes = {key: config[key] for key in _SIZES if key in config}
    try:
        model = models.build(sizes, checkpoint.path, formats.load("float32"), dtype=torch.float32, device="meta")
    except ConfigError:
        return  # another head, or sizes that loading refuses
    checkpoints.check_complete(model.slots(), checkpoint)
