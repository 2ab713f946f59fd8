"""GGUF, the layout of llama.cpp: one file, or several of a split model, with weights, configuration and vocabulary.

Experts have had three layouts: one tensor each (``blk.L.ffn_gate.E.weight``, until spring 2024), one stack of each kind
(``blk.L.ffn_gate_exps.weight`` [E, f, d]), and stacks in which gate and up rows are merged
(``blk.L.ffn_gate_up_exps.weight`` [E, 2f, d], gate rows first). Query and key rows are in interleaved rotary order.
Quantized weights are decoded to floats when they are read, or keep their codes.

Legend: L layer, E experts, f intermediate size, d hidden size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moesaic import gguf
from moesaic.checkpoints import EMBEDDING, HEAD, Checkpoint
from moesaic.checkpoints._decoder import common_dtype, decoded_dtype
from moesaic.checkpoints._gguf_config import read_config, read_generation
from moesaic.checkpoints._gguf_names import LAYER, NUMBERS, ROPE_FACTORS, ROTARY, TOP
from moesaic.checkpoints._gguf_tensors import GgufTensors, rearranged
from moesaic.checkpoints._gguf_write import write
from moesaic.checkpoints._views import Part, Rotary, View, renamed
from moesaic.errors import CheckpointError
from moesaic.gguf import GgufFile

__all__ = ["LOOKS_FOR", "PRIORITY", "detect", "open_checkpoint", "write"]

LOOKS_FOR = "*.gguf"
PRIORITY = 4

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_EXPERT = re.compile(r"ffn_(gate|down|up)\.(\d+)\.weight")
_STACK = re.compile(r"ffn_(gate|down|up|gate_up)_exps\.weight")


def detect(path: Path) -> bool:
    """Return whether ``path`` is a GGUF file, or a folder that holds one."""
    return gguf.is_gguf(path) or bool(gguf.candidates(path))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the GGUF file at ``path``, any file of a split model, or the one model in a folder.

    Raises:
        ConfigError: the architecture or a setting is not supported.
        CheckpointError: a file is missing or damaged, a type is not supported, or a folder holds several models.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(GgufFile(file)) for file in gguf.files(path)]
        _check_parts(parts)
        store = GgufTensors(parts)
        stored = {name: store.view(name) for name in store.tensors}
        factors = stored.pop(ROPE_FACTORS, None)
        views = _classic_names(stored, parts[0].path)
        config = read_config(
            parts[0],
            views[EMBEDDING].info.shape[0],
            tied=HEAD not in views,
            dtype=common_dtype(view.info for view in views.values()),
            factors=None if factors is None else factors.read(),
        )
        generation = read_generation(parts[0])
    _check_sizes(views, config, parts[0].path)
    views = {name: _half_split(name, view, config) for name, view in views.items()}
    dtype = decoded_dtype(view.info for view in views.values()) if store.quantized else None
    return Checkpoint("gguf", path, config, generation, views, store.close, dtype)


def _check_parts(parts: Sequence[GgufFile]) -> None:
    """Raise CheckpointError unless the files are all files of one model, in order."""
    count = parts[0].metadata.get("split.count", 0) or 1
    if count != len(parts):
        problem = f"is part of a model of {count} files, which must be named NAME-00001-of-{count:05}.gguf and so on"
        raise CheckpointError(parts[0].path, problem)
    for number, part in enumerate(parts if count > 1 else ()):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise CheckpointError(part.path, f"is not part {number + 1} of {count}; fetch the file again")
    expected = parts[0].metadata.get("split.tensors.count")
    found = sum(len(part.tensors) for part in parts)
    if count > 1 and expected not in (None, found):
        raise CheckpointError(parts[0].path, f"announces {expected} tensors, but the parts hold {found}")


def _classic_names(stored: Mapping[str, View], path: Path) -> dict[str, View]:
    """Return the tensors under classic names, those of Hugging Face, with stacked experts one by one."""
    views = renamed(stored, _classic)
    if EMBEDDING not in views:
        raise CheckpointError(path, "holds no weights: token_embd.weight is missing")
    return views


def _check_sizes(views: Mapping[str, View], config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if the tensors have other sizes than the metadata states.

    The model is allocated from the configuration before its tensors are compared one by one.
    """
    layers = {name.split(".")[2] for name in views if name.startswith("model.layers.")}
    first = "model.layers.0.block_sparse_moe.experts"
    experts = [name for name in views if name.startswith(first) and name.endswith("w2.weight")]
    down = f"{first}.0.w2.weight" if experts else "model.layers.0.mlp.down_proj.weight"
    if down not in views:
        raise CheckpointError(path, "holds no feed-forward network in the first layer")
    for key, found in {
        "num_hidden_layers": len(layers),
        "num_local_experts": len(experts) or None,
        "hidden_size": views[EMBEDDING].info.shape[-1],
        "intermediate_size": views[down].info.shape[-1],
    }.items():
        if config.get(key) != found:
            raise CheckpointError(path, f"{key} is {config.get(key)} in the metadata, but the tensors have {found}")


def _classic(name: str, view: View) -> Iterator[tuple[str, View]]:
    """Yield (classic name, view) for each tensor that the tensor ``name`` of the file consists of.

    A tensor whose name is not known keeps its name.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        yield TOP.get(name, name), view
        return
    layer, rest = f"model.layers.{match[1]}", match[2]
    if expert := _EXPERT.fullmatch(rest):
        yield f"{layer}.block_sparse_moe.experts.{int(expert[2])}.{NUMBERS[expert[1]]}.weight", view
    elif stack := _STACK.fullmatch(rest):
        yield from _unstack(name, view, f"{layer}.block_sparse_moe.experts", stack[1])
    else:
        yield (f"{layer}.{LAYER[rest]}" if rest in LAYER else name), view


def _unstack(name: str, stack: View, prefix: str, kind: str) -> Iterator[tuple[str, View]]:
    """Yield (classic name, view) for the weights of each expert in a stack."""
    shape = stack.info.shape
    if len(shape) != 3 or (kind == "gate_up" and shape[1] % 2):
        raise CheckpointError(stack.info.file, f"{name} has shape {list(shape)}, expected experts, rows and columns")
    rows = shape[1]
    cuts = {"w1": slice(0, rows // 2), "w3": slice(rows // 2, rows)}
    if kind != "gate_up":
        cuts = {NUMBERS[kind]: slice(0, rows)}
    for expert in range(shape[0]):
        for number, cut in cuts.items():
            part = functools.partial(Part, index=(slice(expert, expert + 1), cut), drop=True)
            yield f"{prefix}.{expert}.{number}.weight", rearranged(stack, part)


def _half_split(name: str, view: View, config: Mapping[str, Any]) -> View:
    """Return ``view`` with its rows in half-split rotary order if it holds query or key rows, otherwise unchanged."""
    match = ROTARY.fullmatch(name)
    if match is None:
        return view
    heads, size = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"], config["head_dim"]
    expected, found = [heads * size, *([config["hidden_size"]] if match[2] == "weight" else [])], list(view.info.shape)
    if found != expected:
        raise CheckpointError(view.info.file, f"{name} has the wrong shape: expected {expected}, found {found}")
    return rearranged(view, lambda rows: Rotary(rows, size, half_split=True))
