"""Writes the folder of a checkpoint, completely or not at all.

The folder is written under a temporary name and renamed when all files are on disk. Tokenizer files are copied
unchanged; the vocabulary in a GGUF file becomes a GGUF file without tensors. This module does not depend on layouts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moesaic import gguf
from moesaic.checkpoints import EMBEDDING, HEAD, TIED, Checkpoint, check_head, ignored_reason
from moesaic.checkpoints._safetensors import write_file
from moesaic.checkpoints._views import Stored, View
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.gguf import GgufFile

OnWrite = Callable[[int], None]
"""Function that is called with the number of bytes of each tensor written."""

TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "*.model.v*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken*.json",
    "chat_template*",
    gguf.VOCABULARY,
)
"""Names of a tokenizer's files, which every layout holds beside the weights."""


@contextmanager
def new_folder(path: Path, source: Checkpoint) -> Iterator[Path]:
    """Yield an empty folder that is renamed to ``path`` when the block ends, and deleted when the block fails.

    Before it is renamed, the tokenizer files of ``source`` are copied into it.

    Raises:
        InvalidParameter: ``path`` exists already and is not an empty folder.
        CheckpointError: the folder cannot be written.
    """
    check_new(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    created = [parent for parent in path.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, path, source)
    except OSError as error:
        raise CheckpointError(path, f"could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists():
            _remove_empty(created)


def check_new(path: Path) -> None:
    """Raise InvalidParameter if ``path`` exists already and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidParameter("dst", f"{path} exists already; name a new folder")


def publish(temporary: Path, path: Path, source: Checkpoint) -> None:
    """Copy the tokenizer files of ``source`` into the folder ``temporary`` and rename it to ``path``.

    Raises:
        OSError: a file cannot be written.
    """
    _copy_tokenizer(source, temporary)
    for file in (*temporary.iterdir(), temporary):
        sync(file)
    temporary.rename(path)
    sync(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write the JSON object ``value`` to the file ``path``, indented for human readers."""
    path.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def views(source: Checkpoint) -> dict[str, View]:
    """Return views of all tensors of ``source``, without tables that can be computed from its configuration."""
    return {name: Stored(source, name) for name in source.tensors if ignored_reason(name) is None}


def views_with_head(source: Checkpoint) -> dict[str, View]:
    """Return ``views``, plus a head with the embedding's weights if the two are tied.

    It is for layouts that cannot express tied embeddings.

    Raises:
        CheckpointError: the two are tied, but the checkpoint has a head that differs from the embedding.
    """
    tensors = views(source)
    check_head(source)
    if source.config.get(TIED) is True and EMBEDDING in tensors:
        tensors[HEAD] = tensors[EMBEDDING]
    return tensors


def generation_config(source: Checkpoint) -> dict[str, Any]:
    """Return the content of generation_config.json, with the begin and end token ids of config.json.

    It is for layouts without config.json.
    """
    ids = {key: source.config[key] for key in ("bos_token_id", "eos_token_id") if source.config.get(key) is not None}
    return ids | dict(source.generation)


def write_shards(
    folder: Path, tensors: Mapping[str, View], files: list[str], on_write: OnWrite | None
) -> dict[str, str]:
    """Write ``tensors`` in order to the safetensors ``files``, of about equal size; return {tensor: file name}.

    Raises:
        InvalidParameter: there are more files than tensors.
    """
    if not 1 <= len(files) <= len(tensors):
        raise InvalidParameter("shards", f"is {len(files)}, but must be 1 to {len(tensors)}, the number of tensors")
    total, assigned = sum(view.info.nbytes for view in tensors.values()), 0
    shards = [dict[str, View]() for _ in files]
    index = 0
    for position, (name, view) in enumerate(tensors.items()):
        # Continue with the next file if this one has its share, or if every file left needs one of the tensors left.
        full = assigned * len(files) >= total * (index + 1) or len(tensors) - position < len(files) - index
        if shards[index] and full and index + 1 < len(files):
            index += 1
        shards[index][name] = view
        assigned += view.info.nbytes
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard, on_write)
    return {name: file for file, shard in zip(files, shards, strict=True) for name in shard}


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of ``folders`` that are empty; they are listed from the innermost outwards."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _copy_tokenizer(source: Checkpoint, folder: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for file in source.path.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if source.layout == "gguf" and not (folder / gguf.VOCABULARY).exists():
        with GgufFile(gguf.files(source.path)[0]) as header:
            (folder / gguf.VOCABULARY).write_bytes(header.header_without_tensors())


def sync(path: Path) -> None:
    """Write a file or folder from the page cache to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
