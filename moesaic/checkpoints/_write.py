"""Writing a checkpoint so that it is there whole or not at all.

Knows the folder around the weights: a temporary one beside the target, renamed when everything is on
disk, and the files that go along unchanged. Does not know layouts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesaic.checkpoints import EMBEDDING, HEAD, TIED, Checkpoint, surplus_reason
from moesaic.checkpoints._safetensors import write_file
from moesaic.checkpoints._views import Stored, View
from moesaic.errors import CheckpointError, InvalidParameter

Wrote = Callable[[int], None]

ALONG = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v2",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "chat_template.jinja",
)
"""Files that say how text becomes tokens: they belong to the weights whatever the layout."""


@contextmanager
def target(path: Path, source: Checkpoint) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends, and vanishes when it fails.

    Raises:
        InvalidParameter: ``path`` is there already and not an empty folder.
        CheckpointError: the disk does not take it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidParameter("dst", f"{path} exists already; name a new folder")
    made = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        made.mkdir(parents=True)
        yield made
        _carry(source, made)
        for file in (*made.iterdir(), made):
            _flush(file)
        made.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise CheckpointError(path, f"could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def views(source: Checkpoint) -> dict[str, View]:
    """Return every tensor of ``source`` that says anything."""
    return {name: Stored(source, name) for name in source.tensors if surplus_reason(name) is None}


def untied(source: Checkpoint) -> dict[str, View]:
    """Return ``views``, and the head too where it is tied to the embedding.

    Layouts without a word for tied embeddings need the head written out; it is the same bits.
    """
    kept = views(source)
    if source.config.get(TIED) is True and EMBEDDING in kept:
        kept[HEAD] = kept[EMBEDDING]
    return kept


def generation(source: Checkpoint) -> dict[str, Any]:
    """Return generation_config.json for a layout without config.json, where the ids of begin and end would be lost."""
    ids = {key: source.config[key] for key in ("bos_token_id", "eos_token_id") if source.config.get(key) is not None}
    return ids | dict(source.generation)


def safetensors(folder: Path, found: Mapping[str, View], files: list[str], wrote: Wrote | None) -> dict[str, str]:
    """Write ``found`` in its order over ``files``, about equal in bytes, and return {tensor: file}.

    Raises:
        InvalidParameter: there are more files than tensors.
    """
    if not 1 <= len(files) <= len(found):
        raise InvalidParameter("shards", f"is {len(files)}, but must be 1 to {len(found)}, the number of tensors")
    total, seen, parts = sum(view.info.nbytes for view in found.values()), 0, [dict[str, View]() for _ in files]
    place = 0
    for position, (name, view) in enumerate(found.items()):
        # Go on to the next file when this one has its share, or when the tensors left are needed one per file.
        full = seen * len(files) >= total * (place + 1) or len(found) - position < len(files) - place
        if parts[place] and full and place + 1 < len(files):
            place += 1
        parts[place][name] = view
        seen += view.info.nbytes
    for file, part in zip(files, parts, strict=True):
        write_file(folder / file, part, wrote)
    return {name: file for file, part in zip(files, parts, strict=True) for name in part}


def _carry(source: Checkpoint, folder: Path) -> None:
    for name in ALONG:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
