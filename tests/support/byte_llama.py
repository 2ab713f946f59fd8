"""A Llama of random weights whose tokenizer has a token for each byte, then special tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moesaic.text._vocabulary import byte_alphabet

LLAMA3_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|more|>"),
)
"""Tokens 256 to 263."""
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_byte_llama(
    folder: Path, special: Sequence[str] = LLAMA3_TOKENS, *, bos: int = 256, eos: int = 257, always: int | None = None
) -> Path:
    """Write the model to ``folder``, in the layout of Hugging Face. With ``always``, it generates this token only."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = 256 + len(special)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_act": "silu"}
    config |= SIZES | {"num_key_value_heads": 1, "vocab_size": rows, "max_position_embeddings": 1024}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "bos_token_id": bos, "eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(special)))
    names = {"bos_token": special[bos - 256], "eos_token": special[eos - 256]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    weights = _weights(rows)
    if always is not None:
        weights = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        weights["model.embed_tokens.weight"] += 1
        weights["model.norm.weight"] += 1
        weights["lm_head.weight"][always] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tokenizer(special: Sequence[str]) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"), None)
    model |= {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 256 + i, "content": name, "special": True} | flags for i, name in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": levels,
        "post_processor": None,
        "decoder": levels,
        "model": model | {"vocab": {piece: byte for byte, piece in enumerate(byte_alphabet())}, "merges": []},
    }


def _weights(rows: int) -> dict[str, torch.Tensor]:
    generator, layer = torch.Generator().manual_seed(1), "model.layers.0."
    shapes = {"model.embed_tokens": (rows, 32), "lm_head": (rows, 32), layer + "mlp.down_proj": (32, 48)}
    shapes |= {
        layer + f"self_attn.{name}_proj": (size, 32) for name, size in zip("qkvo", (32, 16, 16, 32), strict=True)
    }
    shapes |= {layer + f"mlp.{name}_proj": (48, 32) for name in ("gate", "up")}
    norms = ("model.norm", layer + "input_layernorm", layer + "post_attention_layernorm")
    matrices = {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}
    return {f"{name}.weight": tensor for name, tensor in (matrices | {norm: torch.ones(32) for norm in norms}).items()}
