"""Conversion of checkpoints to another layout or another number of files.

The conversion connects a reader and a writer of ``checkpoints``. Values and dtypes stay the same; tensor names, row
order and configuration keys are translated. This module does not depend on any layout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moesaic import checkpoints, registry
from moesaic.errors import InvalidParameter


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
        src: the folder of a checkpoint in any layout.
        dst: a folder that does not exist or is empty.
        to: the name of the layout: ``hf``, ``mistral`` or ``meta``.
        shards: number of files; for ``meta`` the number of model-parallel ranks, which must divide the heads.
        progress: called after each tensor with (bytes written, total bytes).

    Raises:
        NotFound: the folder or the layout does not exist.
        InvalidParameter: ``dst`` is not empty, or the weights cannot be split into ``shards`` files.
        ConfigError: the layout cannot express a setting that changes the computation.
        CheckpointError: ``src`` is damaged, or ``dst`` cannot be written.
    """
    source, target = Path(src), Path(dst)
    layout = registry.load("checkpoints", to)
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise InvalidParameter("dst", f"{target} is inside the source folder; choose another folder")
    with checkpoints.open_checkpoint(source) as checkpoint:
        total, done = sum(info.nbytes for info in checkpoint.tensors.values()), 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, max(total, done))

        layout.write(checkpoint, target, shards, report)
