"""Hugging Face's layout: config.json, and safetensors (or older torch) files with or without an index.

Several versions of transformers gave the same weights different names. This module presents all of them under
classic names: Mixtral's experts one by one (``block_sparse_moe.experts.E.w1``), although newer files stack them
(``mlp.experts.gate_up_proj`` [E, 2f, d], gate rows before up rows, and ``mlp.experts.down_proj`` [E, d, f]). Quantized
stacks have become one matrix for each expert before (``_expert_stacks``). Quantized weights are decoded to floats when
they are read, or keep their codes. Of the configuration, only the settings of the quantization are interpreted.

Legend: E experts, f intermediate size, d hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._decoder import decoded_dtype
from moesaic.checkpoints._expert_stacks import cut_rows
from moesaic.checkpoints._hf_files import NAMES, find_files
from moesaic.checkpoints._hf_write import write_hf
from moesaic.checkpoints._json import read_json, read_json_if_there
from moesaic.checkpoints._quantized import dequantized
from moesaic.checkpoints._views import Part, View, renamed
from moesaic.checkpoints._weight_files import open_weight_files
from moesaic.checkpoints._write import WriteOptions, views
from moesaic.errors import CheckpointError

LOOKS_FOR = " or ".join(name for names in NAMES for name in names)
PRIORITY = 1

_EXPERT = re.compile(
    r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_up|gate|up|down)_proj\.weight"
)
_STACK = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up|down)_proj(?:\.weight)?")
_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")
_NUMBERS = {"gate": "w1", "down": "w2", "up": "w3"}


def detect(path: Path) -> bool:
    """Return whether the folder holds weight files with Hugging Face's names.

    If it also holds Mistral's or Meta's files, these weight files must be complete and config.json must exist.
    Otherwise the other layout is read.
    """
    try:
        found = find_files(path)
    except CheckpointError:
        return not _has_other_layout(path)  # open_checkpoint reports the problem
    if _has_other_layout(path):
        return found.complete and (path / "config.json").is_file()
    return bool(found.files)


def _has_other_layout(path: Path) -> bool:
    return (path / "params.json").is_file() and any(path.glob("consolidated*"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in the folder ``path``.

    Raises:
        ConfigError: config.json is missing or does not hold a JSON object, or its quantization is not supported.
        CheckpointError: a file is missing or damaged, or the index and the files disagree.
    """
    config = read_json(path / "config.json")
    generation = read_json_if_there(path / "generation_config.json")
    stored, close = _open_files(path)
    try:
        plain, settings = dequantized(stored, config, path)
        classic = renamed(plain, _classic)
    except CheckpointError:
        close()
        raise
    dtype = None if plain is stored else decoded_dtype(view.info for view in classic.values())
    return Checkpoint("hf", path, settings, generation, classic, close, dtype)


def write(source: Checkpoint, path: Path, options: WriteOptions) -> None:
    """Write ``source`` in this layout, under classic names, into ``options.shards`` safetensors files.

    Raises:
        InvalidParameter: ``path`` is not empty, or there are more shards than tensors.
        CheckpointError: the source cannot be read, or the target cannot be written.
    """
    write_hf(source, path, views(source), source.config, options)


def _open_files(path: Path) -> tuple[dict[str, View], Callable[[], None]]:
    """Return the tensors by their names on disk, and a function that closes the files.

    Raises:
        CheckpointError: a file is missing or damaged, or the files do not hold the tensors that their index lists.
    """
    found = find_files(path)
    tensors, close = open_weight_files(found.files)
    try:
        found.check(tensors)
    except CheckpointError:
        close()
        raise
    return tensors, close


def _classic(name: str, tensor: View) -> Iterator[tuple[str, View]]:
    """Yield (classic name, view) for each tensor that the tensor ``name`` on disk consists of."""
    if match := _STACK.fullmatch(name):
        yield from _unstack(tensor, match[1], match[2])
    elif match := _EXPERT.fullmatch(name):
        expert = f"{match[1]}.block_sparse_moe.experts.{match[2]}"
        for number, cut in _cuts(name, tensor, match[3]):
            yield f"{expert}.{number}.weight", tensor if match[3] in _NUMBERS else cut_rows(tensor, cut)
    elif match := _ROUTER.fullmatch(name):
        yield f"{match[1]}.block_sparse_moe.gate.weight", tensor
    else:
        yield name, tensor


def _unstack(stack: View, layer: str, kind: str) -> Iterator[tuple[str, View]]:
    """Yield (classic name, view) for the weights of each expert in a stacked tensor."""
    name = f"{layer}.mlp.experts.{kind}_proj"
    if len(stack.info.shape) != 3:
        raise CheckpointError(stack.info.file, f"{name} has shape {list(stack.info.shape)}")
    for expert in range(stack.info.shape[0]):
        for number, cut in _cuts(name, stack, kind):
            part = Part(stack, (slice(expert, expert + 1), cut), drop=True)
            yield f"{layer}.block_sparse_moe.experts.{expert}.{number}.weight", part


def _cuts(name: str, tensor: View, kind: str) -> Iterator[tuple[str, slice]]:
    """Yield the number, such as w1, and the rows of each weight in a matrix, or in each matrix of a stack."""
    rows = tensor.info.shape[-2] if len(tensor.info.shape) > 1 else 0
    if kind in _NUMBERS:
        yield _NUMBERS[kind], slice(0, rows)
        return
    if rows % 2 or not rows:
        raise CheckpointError(tensor.info.file, f"{name} has shape {list(tensor.info.shape)}")
    yield from (("w1", slice(0, rows // 2)), ("w3", slice(rows // 2, rows)))
