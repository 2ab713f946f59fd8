"""Recognizes files and tensors that belong to something other than a whole model, and says what to do with them.

Adapters, models that were saved inside a wrapper, and parts of larger models have their own names. Without this module,
the first error about them would be that a tensor is missing. This module depends on names only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from moesaic.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MERGE = "merge it into its model first (merge_and_unload and save_pretrained of PEFT), and use the folder of the result"
LFS_POINTER = b"version https://git-lfs.github.com/"

_ADAPTER = f"belong to a PEFT adapter: {MERGE}"
_WRAPPED = {
    "base_model.model": _ADAPTER,
    "lora_A": _ADAPTER,
    "lora_B": _ADAPTER,
    "lora_embedding_A": _ADAPTER,
    "lora_embedding_B": _ADAPTER,
    "base_layer": _ADAPTER,
    "modules_to_save": _ADAPTER,
    "_orig_mod": "were saved from a model inside torch.compile: save its _orig_mod instead",
    "_fsdp_wrapped_module": "were saved from a model inside FSDP: save its full state dict instead",
    "_checkpoint_wrapped_module": "were saved with activation checkpointing: save the model without its wrappers",
    "_forward_module": "were saved from a model inside Lightning Fabric: save its module instead",
    "module": "were saved from a model inside DataParallel or DeepSpeed: save its module instead",
    "pretrained_model": "were saved from a model inside TRL's value head: save its pretrained_model instead",
    "language_model": "belong to a model of more than text, which is not supported",
}
"""Parts of tensor names that no supported model has, and a description of such tensors for the message. The first match
counts."""
_EMBEDDING = re.compile(r"(.*?)(?:model\.)?embed_tokens\.weight")


def refuse_adapter(path: Path) -> None:
    """Raise CheckpointError if the folder ``path`` holds the weights of a PEFT adapter, even beside a model."""
    weights = [name for name in ADAPTER_WEIGHTS if (path / name).is_file()]
    if weights:
        raise CheckpointError(path / weights[0], f"is a PEFT adapter{_base(path)}, not a whole model: {MERGE}")


def refuse_adapter_config(path: Path) -> None:
    """Raise CheckpointError if the folder ``path``, which holds no model, has the configuration of a PEFT adapter."""
    if (path / ADAPTER_CONFIG).is_file():
        problem = f"describes a PEFT adapter{_base(path)}, and the folder holds no weights of a model: {MERGE}"
        raise CheckpointError(path / ADAPTER_CONFIG, problem)


def refuse_names(names: Collection[str], path: Path) -> None:
    """Raise CheckpointError if the tensors ``names`` are not a whole language model; the message says what they are."""
    refuse_wrapped(names, path)
    _refuse_prefixed(names, path)


def refuse_wrapped(names: Collection[str], path: Path) -> None:
    """Raise CheckpointError if a tensor has a name that a wrapper, such as torch.compile, or an adapter gives it."""
    for part, meaning in _WRAPPED.items():
        for name in names:
            if f".{part}." in f".{name}":
                raise CheckpointError(path, f"the tensors with {part!r} in their names, such as {name}, {meaning}")


def _refuse_prefixed(names: Collection[str], path: Path) -> None:
    """Raise CheckpointError if the embedding's name shows that the tensors are not a whole language model."""
    if "model.embed_tokens.weight" in names:
        return
    if "tok_embeddings.weight" in names:
        problem = "the tensors have the names of Meta's and Mistral's own files, which need params.json: add it, and"
        raise CheckpointError(path, f"{problem} name the files consolidated*")
    for name in names:
        match = _EMBEDDING.fullmatch(name)
        if match and match[1]:
            wrapper = f"the tensors were saved from a model inside another one: their names begin with {match[1]!r}"
            raise CheckpointError(path, f"{wrapper}, such as {name}; save the inner model instead")
        if match:
            problem = "the tensors are a decoder without a head: their names do not begin with 'model.'"
            raise CheckpointError(path, f"{problem}; save the model of the class ...ForCausalLM instead")


def refuse_pointer(file: Path) -> None:
    """Raise CheckpointError if ``file`` is a Git LFS pointer, which a clone without LFS holds in place of a file."""
    try:
        with file.open("rb") as stream:
            begin = stream.read(len(LFS_POINTER))
    except OSError:
        return  # the reader of the file reports the problem
    if begin == LFS_POINTER:
        raise CheckpointError(file, "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


def _base(path: Path) -> str:
    """Return the words that name the adapter's base model in a message; empty if it is not known."""
    try:
        name = json.loads((path / ADAPTER_CONFIG).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" for {name[:200]!r}" if isinstance(name, str) else ""
