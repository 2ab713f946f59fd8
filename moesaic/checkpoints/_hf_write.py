"""Writes a folder in Hugging Face's layout: tensors in safetensors files, and the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._hf_files import INDEX, SINGLE
from moesaic.checkpoints._views import View
from moesaic.checkpoints._write import WriteOptions, new_folder, write_json, write_shards


def write_hf(
    source: Checkpoint, path: Path, tensors: Mapping[str, View], config: Mapping[str, Any], options: WriteOptions
) -> None:
    """Write ``tensors`` and the content of config.json to the new folder ``path``, with the other files of ``source``.

    Raises:
        InvalidParameter: ``path`` is not empty, or there are more shards than tensors.
        CheckpointError: the source cannot be read, or the target cannot be written.
    """
    count = options.shards
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    with new_folder(path, source) as folder:
        file_names = write_shards(folder, tensors, files, options.on_write)
        if count != 1:
            total = sum(view.info.nbytes for view in tensors.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_names})
        if source.generation:
            write_json(folder / "generation_config.json", source.generation)
        write_json(folder / "config.json", config)
