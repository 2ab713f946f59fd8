"""Published models: their sizes, and where the hub has them.

A configuration has the keys of config.json. It is that of the first release of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.errors import InvalidParameter

_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
_MIXTRAL = {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}


def _sizes(size: int, inner: int, layers: int, heads: int, length: int) -> dict[str, Any]:
    return {
        "hidden_size": size,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": length,
    }


CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "mixtral-8x7b": _MIXTRAL | _sizes(4096, 14336, 32, 32, 32768),
    "mixtral-8x22b": _MIXTRAL | _sizes(6144, 16384, 56, 48, 65536),
    "mistral-7b": {"model_type": "mistral", "vocab_size": 32000} | _sizes(4096, 14336, 32, 32, 32768),
    "llama-3-8b": _LLAMA3 | _sizes(4096, 14336, 32, 32, 8192),
    "llama-3-70b": _LLAMA3 | _sizes(8192, 28672, 80, 64, 8192),
}
"""Configuration of each model by its name."""

REPOSITORIES: Mapping[str, tuple[str, ...]] = {
    "mixtral-8x7b": ("TheBloke/Mixtral-8x7B-Instruct-v0.1-GGUF", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    "mixtral-8x22b": ("MaziyarPanahi/Mixtral-8x22B-Instruct-v0.1-GGUF", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
    "mistral-7b": ("bartowski/Mistral-7B-Instruct-v0.3-GGUF", "mistralai/Mistral-7B-Instruct-v0.3"),
    "llama-3-8b": ("bartowski/Meta-Llama-3-8B-Instruct-GGUF", "meta-llama/Meta-Llama-3-8B-Instruct"),
    "llama-3-70b": ("bartowski/Meta-Llama-3-70B-Instruct-GGUF", "meta-llama/Meta-Llama-3-70B-Instruct"),
}
"""Repositories on the Hugging Face hub with the chat model of each size: one of GGUF files, then its maker's."""


def configuration(name: str, layers: int | None = None) -> dict[str, Any]:
    """Return the configuration of a published model; ``layers`` None: all its layers.

    Raises:
        InvalidParameter: there is no such model, or it has fewer layers.
    """
    if name not in CONFIGURATIONS:
        raise InvalidParameter("geometry", f"{name!r} is unknown; available geometries: {', '.join(CONFIGURATIONS)}")
    config = dict(CONFIGURATIONS[name])
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise InvalidParameter(
                "layers", f"is {layers}, expected 1 to {config['num_hidden_layers']}, the layers of {name}"
            )
        config["num_hidden_layers"] = layers
    return config
