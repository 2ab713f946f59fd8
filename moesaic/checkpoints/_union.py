"""Files that hold different tensors of one checkpoint, as one set of views.

Knows which reader a suffix calls for. Does not know names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moesaic.checkpoints._safetensors import SafetensorsFiles
from moesaic.checkpoints._torchfile import TorchFiles
from moesaic.checkpoints._views import Stored, View
from moesaic.errors import CheckpointError


def union(files: Sequence[Path]) -> tuple[dict[str, View], Callable[[], None]]:
    """Return every tensor of ``files``, in the order in which they lie, and what closes the files.

    Raises:
        CheckpointError: a file is missing or damaged, or two files hold a tensor of the same name.
    """
    if files[0].suffix == ".safetensors":
        safe = SafetensorsFiles(files)
        return {name: Stored(safe, name) for name in safe.tensors}, safe.close
    unpickled = TorchFiles(files)
    found: dict[str, View] = {}
    for file in unpickled.files:
        for name in file.tensors:
            if name in found:
                unpickled.close()
                raise CheckpointError(file.path, f"{name} is also in {found[name].info.file.name}")
            found[name] = Stored(file, name)
    return found, unpickled.close
