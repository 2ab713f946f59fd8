"""Conversion of checkpoints to another layout, to weights in another program's format, or to another number of files.

The conversion connects a reader and a writer of ``checkpoints``. Tensor names, row order and configuration keys are
translated, and values stay the same. Quantized weights keep their codes in the targets ``gguf``, ``compressed-tensors``
and ``gptq``, and are decoded to float32 in the others. Nothing is lost: a checkpoint is refused before anything is
written if a tensor that its configuration requires is missing, or if the target cannot hold one of its tensors. This
module does not depend on any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moesaic import checkpoints, formats, models, packed
from moesaic.adapters.merge import merged
from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._targets import writer
from moesaic.checkpoints._write import WriteOptions
from moesaic.errors import ConfigError, InvalidParameter
from moesaic.gguf import Value
from moesaic.text import gguf_metadata

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
    *,
    decode: bool = False,
    adapter: Path | None = None,
) -> None:
    """Write the checkpoint in ``src`` to the new folder ``dst`` as ``to``, with its tokenizer.

    The folder appears only when it is complete. At most one shard is in memory.

    Args:
        src: the folder or file of a checkpoint in any layout, or a packed folder.
        dst: a folder that does not exist or is empty; for ``gguf`` also a new file whose name ends with .gguf.
        to: a layout, ``hf``, ``mistral``, ``meta`` or ``gguf``, or a method of quantization in the layout ``hf``,
            ``compressed-tensors`` or ``gptq``.
        shards: number of files; for ``meta`` the number of model-parallel ranks, which must divide the heads.
        progress: called after each tensor with (bytes written, total bytes).
        decode: whether quantized weights that the target cannot hold exactly are written as floats; otherwise they are
            refused.
        adapter: folder of an adapter that is added to the weights; None: they stay the same.

    Raises:
        NotFound: the folder, the target or the adapter does not exist.
        InvalidParameter: the adapter does not fit the model, ``dst`` is not empty, or the weights cannot be split into
            ``shards`` files.
        ConfigError: the layout cannot express a setting that changes the computation.
        TokenizerError: the layout cannot express the tokenizer.
        CheckpointError: ``src`` is damaged, lacks a tensor, or has one that the target cannot hold; or ``dst`` cannot
            be written.
    """
    source, target = Path(src), Path(dst)
    write = writer(to)
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise InvalidParameter("dst", f"{target} is inside the source folder; choose another folder")
    with _open(source) as opened:
        checkpoint = merged(opened, adapter) if adapter else opened
        _check_tensors(checkpoint)
        total, done = sum(info.nbytes for info in checkpoint.tensors.values()), 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, max(total, done))

        def vocabulary() -> Mapping[str, Value]:
            rows = checkpoint.tensors[checkpoints.EMBEDDING].shape[0]
            return gguf_metadata.read(checkpoint.path, rows, checkpoint.generation.get("eos_token_id"))

        write(checkpoint, target, WriteOptions(shards, report, decode, vocabulary))
        if progress is not None:
            progress(max(total, done), max(total, done))


def _open(source: Path) -> Checkpoint:
    return packed.open_checkpoint(source) if packed.is_packed(source) else checkpoints.open_checkpoint(source)


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
