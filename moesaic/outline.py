"""The outline of a model on the hub: its configuration, and the headers of its weights, without the weights.

An outline is a folder with the files of the model. Those with weights have their true size, but only their beginnings
are downloaded; the rest is a hole that takes no space. ``plan.describe`` reads it as it reads the model itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from moesaic import gguf
from moesaic.errors import CheckpointError, DownloadError
from moesaic.hub_access import hub_errors
from moesaic.hub_files import HubName, Selection

FIRST_BYTES = 1 << 20
"""Bytes of a GGUF file that are read at first; each further attempt to read its header takes four times as many."""
MAX_FILE_BYTES = 64 << 20
"""Size of the largest file without weights that is downloaded."""
NEEDED = (".json", ".model", ".jinja")
"""Suffixes of files without weights that a plan may read."""

Progress = Callable[[int, int], None]


def fetch(
    name: HubName, selection: Selection, sizes: Mapping[str, int], folder: Path, progress: Progress | None
) -> Path:
    """Download the outline of a model into ``folder``; return the folder, or the GGUF file in it.

    Args:
        name: name of the model on the hub.
        selection: files that make up the model.
        sizes: size of each file of the repository.
        folder: an existing folder.
        progress: called with the files read so far and their number; None: not called.

    Raises:
        DownloadError: a file cannot be read, or its weights are in a format whose header is not at its beginning.
    """
    from huggingface_hub import HfFileSystem

    files = [file for file in selection.files if file.endswith((".safetensors", ".gguf", *NEEDED))]
    pickled = next((file for file in selection.files if file.endswith((".bin", ".pt", ".pth"))), None)
    if pickled is not None:
        raise DownloadError(
            f"{name.model}: {pickled} has no header that tells its tensors: `moesaic pull` it to plan it"
        )
    hub = HfFileSystem()
    for index, file in enumerate(files):
        if progress is not None:
            progress(index, len(files))
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        with hub_errors(name), hub.open(f"{name.repository}/{file}", revision=name.revision, block_size=0) as remote:
            _fetch(remote, target, sizes[file])
    return folder / selection.opened if selection.opened else folder


def _fetch(remote: BinaryIO, target: Path, size: int) -> None:
    """Write what is needed of a remote file of ``size`` bytes to the file ``target``."""
    with target.open("wb") as file:
        if target.suffix == ".safetensors":
            length = _copy(remote, file, 8)
            _copy(remote, file, min(struct.unpack("<Q", length)[0], size) if len(length) == 8 else 0)
        elif target.suffix == ".gguf":
            _copy_gguf_header(remote, file, target, size)
        elif size <= MAX_FILE_BYTES:
            _copy(remote, file, size)
        else:
            raise DownloadError(f"{target.name} has {size} bytes, more than a configuration can have")
        file.truncate(size)


def _copy_gguf_header(remote: BinaryIO, file: BinaryIO, target: Path, size: int) -> None:
    """Copy the beginning of a GGUF file until it contains the whole header."""
    wanted, have = FIRST_BYTES, 0
    while True:
        have += len(_copy(remote, file, min(wanted, size) - have))
        file.truncate(size)
        try:
            with gguf.GgufFile(target) as header:
                if header.header_bytes <= have:
                    return
        except CheckpointError:
            if wanted >= min(size, gguf.MAX_HEADER_BYTES):
                raise
        wanted *= 4


def _copy(remote: BinaryIO, file: BinaryIO, nbytes: int) -> bytes:
    data = remote.read(nbytes)
    file.write(data)
    file.flush()
    return data
