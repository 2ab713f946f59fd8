"""Translates the configuration of a checkpoint into the metadata of a GGUF file; the reverse of ``_gguf_config``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic import gguf
from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._decoder import DecoderConfig, parse_config
from moesaic.checkpoints._gguf_config import ARCHITECTURE, SAMPLING
from moesaic.config_keys import whole
from moesaic.errors import ConfigError
from moesaic.gguf import GgufFile, Value

QUANTIZATION_VERSION = 2
"""Version of the block types; every file since 2023 has it."""
NO_VOCABULARY: Mapping[str, Value] = {"tokenizer.ggml.model": "none"}
"""Metadata of a file without a vocabulary. llama.cpp runs its model on token ids alone."""
_NAME = "general.name"
_OWN_KEYS = ("general.file_type", "general.alignment")
"""Keys and prefixes of keys that describe another file, from which other metadata is copied."""
_OWN_PREFIXES = (f"{ARCHITECTURE}.", "split.")


def parse(source: Checkpoint) -> tuple[DecoderConfig, float | None]:
    """Return the sizes of the model, and the factor of a linear rope scaling (None if there is none).

    Raises:
        ConfigError: a key is missing, or GGUF files cannot express it.
    """
    config, factor = dict(source.config), None
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) == "linear":
            factor = whole(rope.get("factor"))
            if type(factor) not in (int, float) or not 0 < factor < math.inf:
                raise ConfigError(source.path, f"{key} has the factor {factor!r}, expected a positive number")
            config[key] = {name: value for name, value in rope.items() if name not in ("type", "factor")}
            config[key] |= {"rope_type": "default"}
    return parse_config(config, source.path), None if factor is None else float(factor)


def records(
    source: Checkpoint, decoder: DecoderConfig, linear: float | None, vocabulary: Mapping[str, Value]
) -> list[bytes]:
    """Return the metadata of a file for ``source``, each value as bytes.

    Args:
        source: the checkpoint.
        decoder, linear: what ``parse`` returns.
        vocabulary: the tokenizer, unless a GGUF file of the source has it; empty if the source has none.
    """
    values = gguf.encode(_general(source) | _model(decoder, linear))
    header = own_header(source)
    if header is None:
        return [*values.values(), *gguf.encode(vocabulary or NO_VOCABULARY).values()]
    with GgufFile(header) as file:
        for key in file.metadata:
            replaced = key in values and key != _NAME
            if not (replaced or key in _OWN_KEYS or key.startswith(_OWN_PREFIXES)):
                values[key] = file.record(key)
    return list(values.values())


def own_header(source: Checkpoint) -> Path | None:
    """Return the GGUF file of ``source`` that holds its vocabulary; None if it has none."""
    if source.layout == "gguf":
        return gguf.files(source.path)[0]
    file = source.path / gguf.VOCABULARY
    return file if file.is_file() else None


def rope_factors(decoder: DecoderConfig) -> Tensor | None:
    """Return the factors [D/2] float32 of the wavelengths that Llama 3.1's scaling gives; None if there is none.

    They are computed in float32, as the programs that write such files do.
    """
    if (scaling := decoder.scaling) is None:
        return None
    frequencies = 1.0 / decoder.theta ** (torch.arange(0, decoder.head_dim, 2, dtype=torch.float32) / decoder.head_dim)
    turns = scaling.original_length / (2 * math.pi / frequencies)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return 1 / (kept + (1 - kept) / scaling.factor)


def _general(source: Checkpoint) -> dict[str, Value]:
    name, family = source.path.name, source.config.get("model_type")
    if family == "mistral" and family not in name.lower():
        name = f"mistral {name}"  # only the name distinguishes a Mistral without a window from a Llama
    values: dict[str, Value] = {
        "general.architecture": ARCHITECTURE,
        _NAME: name,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    for key, name in SAMPLING.items():
        value = source.generation.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and (key != "top_k" or value > 0):
            values[f"general.sampling.{key}"] = int(value) if key == "top_k" else float(value)
    return values


def _model(decoder: DecoderConfig, linear: float | None) -> dict[str, Value]:
    values: dict[str, Any] = {
        "block_count": decoder.layers,
        "context_length": decoder.max_length,
        "embedding_length": decoder.hidden,
        "feed_forward_length": decoder.intermediate,
        "attention.head_count": decoder.heads,
        "attention.head_count_kv": decoder.kv_heads,
        "attention.key_length": decoder.head_dim,
        "attention.value_length": decoder.head_dim,
        "attention.layer_norm_rms_epsilon": decoder.eps,
        "attention.sliding_window": decoder.window,
        "rope.dimension_count": decoder.head_dim,
        "rope.freq_base": decoder.theta,
        "rope.scaling.type": None if linear is None else "linear",
        "rope.scaling.factor": linear,
        "expert_count": decoder.experts,
        "expert_used_count": decoder.experts_per_token,
        "vocab_size": decoder.vocab,
    }
    return {f"{ARCHITECTURE}.{name}": value for name, value in values.items() if value is not None}
