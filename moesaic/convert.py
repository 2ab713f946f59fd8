"""The same weights in another layout, or cut into another number of files.

Knows how to bring a reader and a writer of ``checkpoints`` together: bits and dtypes stay, names,
order and configuration change vocabulary. Does not know any layout.
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
    """Write the checkpoint in ``src`` to the new folder ``dst``, in layout ``to``; tokenizer files go along.

    The folder appears whole or not at all. At most one shard is in memory.

    Args:
        src: a folder in any layout.
        dst: a folder that does not exist yet, or is empty.
        to: the layout's name: ``hf``, ``mistral`` or ``meta``.
        shards: into how many files; for ``meta`` these are model-parallel ranks, and must divide the heads.
        progress: called after each tensor with the bytes written so far and the bytes there are to write.

    Raises:
        NotFound: there is no such folder or layout.
        InvalidParameter: ``dst`` holds something, or the weights cannot be cut into so many files.
        ConfigError: ``to`` has no words for something that changes the computation.
        CheckpointError: ``src`` is damaged, or ``dst`` cannot be written.
    """
    source, target = Path(src), Path(dst)
    layout = registry.load("checkpoints", to)
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise InvalidParameter("dst", f"{target} lies in the source; name another folder")
    with checkpoints.open_checkpoint(source) as checkpoint:
        total, done = sum(info.nbytes for info in checkpoint.tensors.values()), 0

        def on_write(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, max(total, done))

        layout.write(checkpoint, target, shards, on_write)
