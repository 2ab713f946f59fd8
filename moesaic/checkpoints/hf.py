"""Hugging Face's layout: config.json, and safetensors (or, older, torch) files with or without an index.

Knows the names that transformers gives and gave to the same weights, and presents all of them in
the classic scheme: Mixtral's experts one by one (``block_sparse_moe.experts.E.w1``), although newer
files stack them (``mlp.experts.gate_up_proj`` [E, 2f, d], gate rows before up rows, and
``mlp.experts.down_proj`` [E, d, f]). Does not interpret the configuration.

Legend: E experts, f intermediate size, d hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._json import read_json, read_json_if_there
from moesaic.checkpoints._union import union
from moesaic.checkpoints._views import Part, View
from moesaic.checkpoints._write import Wrote, safetensors, target, views, write_json
from moesaic.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
KINDS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""What weights are called, whole or indexed; safetensors is taken where both are there."""
LOOKS_FOR = " or ".join(name for kind in KINDS for name in kind)

_EXPERT = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_STACK = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up|down)_proj(?:\.weight)?")
_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")
_NUMBERS = {"gate": "w1", "down": "w2", "up": "w3"}


def detect(path: Path) -> bool:
    """Return whether the folder holds weights under Hugging Face's names."""
    return any((path / name).is_file() for kind in KINDS for name in kind)


def open(path: Path) -> Checkpoint:
    """Open the checkpoint in the folder ``path``.

    Raises:
        ConfigError: config.json is missing or is no JSON object.
        CheckpointError: a file is missing or damaged, or the index and the files disagree.
    """
    config = read_json(path / "config.json")
    stored, close = _stored(path)
    try:
        found = dict(named for name, view in stored.items() for named in _classic(name, view))
    except CheckpointError:
        close()
        raise
    generation = read_json_if_there(path / "generation_config.json")
    return Checkpoint("hf", path, config, generation, found, close)


def write(source: Checkpoint, path: Path, shards: int = 1, wrote: Wrote | None = None) -> None:
    """Write ``source`` in this layout, under classic names, into ``shards`` safetensors files.

    Args:
        source: what to write.
        path: a folder that does not exist yet, or is empty.
        shards: how many files.
        wrote: called with the bytes of each tensor written.

    Raises:
        InvalidParameter: ``path`` holds something, or there are more shards than tensors.
        CheckpointError: the source cannot be read, or the target cannot be written.
    """
    found = views(source)
    files = [SINGLE] if shards == 1 else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    with target(path, source) as folder:
        places = safetensors(folder, found, files, wrote)
        if shards != 1:
            total = sum(view.info.nbytes for view in found.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        if source.generation:
            write_json(folder / "generation_config.json", source.generation)
        write_json(folder / "config.json", source.config)


def _stored(path: Path) -> tuple[dict[str, View], Callable[[], None]]:
    """Return the tensors under the names on disk, checked against the index if there is one, and what closes them."""
    for single, index in KINDS:
        if (path / index).is_file():
            places = _places(path / index, Path(single).suffix)
            found, close = union([path / file for file in dict.fromkeys(places.values())])
            try:
                _agree(found, places, path / index)
            except CheckpointError:
                close()
                raise
            return found, close
        if (path / single).is_file():
            return union([path / single])
    raise CheckpointError(path, f"holds no weights; looked for {LOOKS_FOR}")


def _agree(found: Mapping[str, View], places: Mapping[str, str], index: Path) -> None:
    """Raise CheckpointError unless every tensor is where the index says, and no other is there."""
    for name, file in places.items():
        if name not in found or found[name].info.file.name != file:
            raise CheckpointError(index.with_name(file), f"{name} is missing: {index.name} says it is here")
    for name, view in found.items():
        if name not in places:
            raise CheckpointError(view.info.file, f"{name} is surplus: {index.name} does not name it")


def _places(index: Path, suffix: str) -> dict[str, str]:
    """Return {tensor: file} of an index, file names plain and sorted by file."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(index, "has no weight_map")
    for name, file in places.items():
        # A name with a separator would let an index read outside its folder.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(suffix):
            raise CheckpointError(index, f"{name} lies in {file!r}, which is not a plain {suffix} file name")
    return dict(sorted(places.items(), key=lambda item: item[1]))


def _classic(name: str, whole: View) -> Iterator[tuple[str, View]]:
    """Yield the classic names, and what stands behind them, of one tensor on disk."""
    if found := _STACK.fullmatch(name):
        yield from _unstack(whole, found[1], found[2])
    elif found := _EXPERT.fullmatch(name):
        yield f"{found[1]}.block_sparse_moe.experts.{found[2]}.{_NUMBERS[found[3]]}.weight", whole
    elif found := _ROUTER.fullmatch(name):
        yield f"{found[1]}.block_sparse_moe.gate.weight", whole
    else:
        yield name, whole


def _unstack(whole: View, layer: str, kind: str) -> Iterator[tuple[str, View]]:
    """Yield the experts of one stacked tensor."""
    if len(whole.info.shape) != 3 or (kind == "gate_up" and whole.info.shape[1] % 2):
        raise CheckpointError(whole.info.file, f"{layer}.mlp.experts.{kind}_proj has shape {list(whole.info.shape)}")
    experts, rows, _ = whole.info.shape
    cuts = {"w2": slice(0, rows)} if kind == "down" else {"w1": slice(0, rows // 2), "w3": slice(rows // 2, rows)}
    for expert in range(experts):
        for number, cut in cuts.items():
            part = Part(whole, (slice(expert, expert + 1), cut), drop=True)
            yield f"{layer}.block_sparse_moe.experts.{expert}.{number}.weight", part
