"""Writes the folder or the file of a checkpoint, completely or not at all.

It is written under a temporary name and renamed when all data is on disk. Tokenizer files are copied unchanged; the
vocabulary in a GGUF file becomes a GGUF file without tensors. This module does not depend on layouts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is written.

    Attributes:
        shards: the number of files; for ``meta`` the number of model-parallel ranks.
        on_write: called with the number of bytes of each tensor written.
        decode: whether weights that the target cannot hold exactly as they are quantized are written as floats;
            otherwise they are refused. Targets without quantized weights always write floats.
        vocabulary: returns the tokenizer of the source as the metadata of a GGUF file; only ``gguf`` calls it.
    """

    shards: int = 1
    on_write: OnWrite | None = None
    decode: bool = False
    vocabulary: Callable[[], Mapping[str, gguf.Value]] = dict


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
    with new_path(path) as temporary:
        temporary.mkdir()
        yield temporary
        copy_tokenizer(source, temporary)


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Yield a path at which the block creates a file or a folder of files.

    It is renamed to ``path`` when the block ends, and deleted when the block fails.

    Raises:
        InvalidParameter: ``path`` exists already and is not an empty folder.
        CheckpointError: the file or folder cannot be written.
    """
    check_new(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    created = [parent for parent in path.parents if not parent.exists()]
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        yield temporary
        publish(temporary, path)
    except OSError as error:
        raise CheckpointError(path, f"could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()
        if not path.exists():
            _remove_empty(created)


def check_new(path: Path) -> None:
    """Raise InvalidParameter if ``path`` exists already and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidParameter("dst", f"{path} exists already; name a new folder")


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete file or folder to ``path``, after its data is on disk.

    Raises:
        OSError: a file cannot be written.
    """
    for file in (*(temporary.iterdir() if temporary.is_dir() else ()), temporary):
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
    check_shards(len(files), len(tensors))
    sizes = {name: view.info.nbytes for name, view in tensors.items()}
    shards = [{name: tensors[name] for name in names} for names in balanced(sizes, len(files))]
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard, on_write)
    return {name: file for file, shard in zip(files, shards, strict=True) for name in shard}


def check_shards(count: int, tensors: int) -> None:
    """Raise InvalidParameter if this number of tensors cannot be written into ``count`` files."""
    if not 1 <= count <= tensors:
        raise InvalidParameter("shards", f"is {count}, but must be 1 to {tensors}, the number of tensors")


def balanced(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Return the names of tensors of these sizes, in order, in ``count`` parts of about equal size; none is empty."""
    total, assigned = sum(sizes.values()), 0
    parts: list[list[str]] = [[] for _ in range(count)]
    index = 0
    for position, (name, size) in enumerate(sizes.items()):
        # Continue with the next part if this one has its share, or if every part left needs one of the tensors left.
        full = assigned * count >= total * (index + 1) or len(sizes) - position < count - index
        if parts[index] and full and index + 1 < count:
            index += 1
        parts[index].append(name)
        assigned += size
    return parts


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of ``folders`` that are empty; they are listed from the innermost outwards."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def copy_tokenizer(source: Checkpoint, folder: Path) -> None:
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
