"""Opens the files of one checkpoint, each of which holds some of the tensors, as one set of views.

This module chooses the reader by the suffix of the files. It does not depend on the names of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moesaic.checkpoints._foreign import refuse_pointer
from moesaic.checkpoints._safetensors import SafetensorsFiles
from moesaic.checkpoints._torchfile import TorchFiles
from moesaic.checkpoints._views import Stored, View
from moesaic.errors import CheckpointError


def open_weight_files(files: Sequence[Path]) -> tuple[dict[str, View], Callable[[], None]]:
    """Return views of all tensors of ``files`` in the order on disk, and a function that closes the files.

    Raises:
        CheckpointError: a file is missing, damaged or a Git LFS pointer, or two files hold a tensor of the same name.
    """
    for path in files:
        refuse_pointer(path)
    if files[0].suffix == ".safetensors":
        safetensors = SafetensorsFiles(files)
        return {name: Stored(safetensors, name) for name in safetensors.tensors}, safetensors.close
    torch_files = TorchFiles(files)
    views: dict[str, View] = {}
    for file in torch_files.files:
        for name in file.tensors:
            if name in views:
                torch_files.close()
                raise CheckpointError(file.path, f"{name} is also in {views[name].info.file.name}")
            views[name] = Stored(file, name)
    return views, torch_files.close
