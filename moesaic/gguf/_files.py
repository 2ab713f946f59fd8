"""Finds the GGUF files of a model: one file, all files of a split model, or the one model in a folder."""

from __future__ import annotations

import re
from pathlib import Path

from moesaic.errors import CheckpointError

MAGIC = b"GGUF"
VOCABULARY = "tokenizer.gguf"
"""Name of a GGUF file that holds a vocabulary and no weights; Moesaic writes it beside converted weights."""
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def split_name(name: str) -> tuple[str, int, int] | None:
    """Return (beginning of the name, number, count) of a file of a split model; None for another name.

    Numbers begin with 1. ``name`` may contain folders.
    """
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return None
    return match[1], int(match[2]), int(match[3])


def part_name(stem: str, number: int, count: int) -> str:
    """Return the name of file ``number`` of a model that is split into ``count`` files."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def is_gguf(path: Path) -> bool:
    """Return whether ``path`` is a GGUF file, by its suffix or its first bytes; files of Ollama have no suffix."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def candidates(folder: Path) -> list[Path]:
    """Return the GGUF files in ``folder`` that may hold weights, sorted by name."""
    return sorted(file for file in folder.glob("*.gguf") if file.name != VOCABULARY and file.is_file())


def files(path: Path) -> list[Path]:
    """Return the files of the model at ``path``, in the order of a split model's parts; empty if there are none.

    Args:
        path: a file, any file of a split model, or a folder that holds one model.

    Raises:
        CheckpointError: the folder holds several models, or a file of a split model is missing.
    """
    if path.is_file():
        return _parts(path) if is_gguf(path) else []
    found = candidates(path)
    if not found:
        return []
    first = _parts(found[0])
    others = [file.name for file in found if file not in first]
    if others:
        names = ", ".join([first[0].name, *others][:8])
        raise CheckpointError(path, f"holds several GGUF models: give the path of one of {names}")
    return first


def vocabulary(path: Path) -> Path | None:
    """Return the GGUF file with the vocabulary and chat template of the model at ``path``; None if there is none."""
    own = path / VOCABULARY
    return own if own.is_file() else next(iter(files(path)), None)


def _parts(file: Path) -> list[Path]:
    """Return all files of the split model that ``file`` belongs to, or only ``file`` if it is not split."""
    split = split_name(file.name)
    if split is None:
        return [file]
    stem, _, count = split
    parts = []
    for number in range(1, count + 1):
        parts.append(file.with_name(part_name(stem, number, count)))
        if not parts[-1].is_file():
            raise CheckpointError(parts[-1], f"is missing: the model has {count} parts")
    return parts
