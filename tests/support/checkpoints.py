"""Small checkpoints of random weights, written without transformers, so that a test can write many of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moesaic import checkpoints, formats, models
from moesaic.text._vocabulary import byte_alphabet

SIZES: dict[str, Any] = {
    "hidden_act": "silu",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "sliding_window": None,
}


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return the config.json of a small model; a key with the value ... is left out."""
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    name = f"{kind.capitalize()}ForCausalLM"
    keys = {"model_type": kind, "architectures": [name], "tie_word_embeddings": False, **SIZES, **experts, **changes}
    return {key: value for key, value in keys.items() if value is not ...}


def weights(keys: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random tensors with the classic names for a configuration."""
    generator = torch.Generator().manual_seed(seed)
    model = models.build(keys, Path("config.json"), formats.load("float32"), dtype=torch.float32, device="meta")
    return {slot.name: torch.randn(slot.shape, generator=generator) * 0.2 for slot in model.slots()}


def write(path: Path, keys: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write a checkpoint in the layout hf, with random tensors if none are given."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(keys)))
    save_file(dict(weights(keys) if tensors is None else tensors), path / "model.safetensors")
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the checkpoint in ``path`` by their classic names."""
    with checkpoints.open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


BOS, EOS = "<s>", "</s>"
"""Tokens 256 and 257 of ``write_tokenizer``."""


def write_tokenizer(path: Path, *special: str, added: tuple[str, ...] = ()) -> None:
    """Write a tokenizer.json with a token for each byte, then BOS, EOS, special tokens, and other added tokens."""
    names = [(name, True) for name in (BOS, EOS, *special)] + [(name, False) for name in added]
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tree = {
        "version": "1.0",
        "added_tokens": [
            {"id": 256 + index, "content": name, "special": control, **options}
            for index, (name, control) in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {char: byte for byte, char in enumerate(byte_alphabet())}, "merges": []},
    }
    (path / "tokenizer.json").write_text(json.dumps(tree))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
