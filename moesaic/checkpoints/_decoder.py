"""Configuration of a decoder-only model, independent of the keys that a file uses for it.

This module reads and writes the keys of config.json. A layout with other keys translates between those and
``DecoderConfig``, and refuses keys that it cannot translate. This module does not depend on tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic import config_keys
from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._views import TensorInfo, dtype_name

LARGE = 1_000_000_000
"""Number of weights from which on decoded weights are loaded in bfloat16 if the user does not choose a dtype."""
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary wavelengths as in Llama 3.1, published by Meta with the weights."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    """The longest sequence of the model before its wavelengths were scaled, in tokens."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder-only model; a feature that the model does not have is None."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_length: int
    eps: float
    theta: float
    window: int | None = None
    scaling: RopeScaling | None = None
    experts: int | None = None
    experts_per_token: int | None = None

    def to_config(self, model_type: str, dtype: str) -> dict[str, Any]:
        """Return this configuration with the keys of config.json, for a model family and weights in ``dtype``."""
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[model_type]],
            "model_type": model_type,
            "dtype": dtype,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_length,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "tie_word_embeddings": False,
        }
        if model_type != "llama":
            config["sliding_window"] = self.window  # some readers use 4096 if the key is absent
        if self.scaling:
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": self.scaling.factor,
                "low_freq_factor": self.scaling.low_freq_factor,
                "high_freq_factor": self.scaling.high_freq_factor,
                "original_max_position_embeddings": self.scaling.original_length,
            }
        if self.experts:
            config |= {"num_local_experts": self.experts, "num_experts_per_tok": self.experts_per_token}
        return config


def parse_config(config: Mapping[str, Any], path: Path) -> DecoderConfig:
    """Parse a configuration with the keys of config.json.

    Raises:
        ConfigError: a key is missing, or has a value that only the hf layout can express.
    """
    fields = Fields(config, path)
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise fields.error(f"model_type {model_type!r} exists only in the hf layout; other layouts have {supported}")
    if model_type == "mistral" and "sliding_window" not in config:
        raise fields.error("has no 'sliding_window'; write null for a model without a window")
    fields.allow("hidden_act", "silu", "swish")
    theta, scaling = _rope(fields, None if model_type == "mixtral" else 10_000.0)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    decoder = DecoderConfig(
        hidden=hidden,
        intermediate=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads)
        if model_type == "llama"
        else fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim", hidden // heads),
        vocab=fields.integer("vocab_size"),
        max_length=fields.integer("max_position_embeddings"),
        eps=fields.number("rms_norm_eps"),
        theta=theta,
        window=fields.integer("sliding_window", None),
        scaling=scaling,
        experts=fields.integer("num_local_experts") if model_type == "mixtral" else None,
        experts_per_token=fields.integer("num_experts_per_tok") if model_type == "mixtral" else None,
    )
    problem = config_keys.layer_types_problem(
        fields.take("layer_types", None), decoder.layers, decoder.window, decoder.max_length
    )
    fields.take("tie_word_embeddings", None)  # layouts that cannot tie store the head as a tensor of its own
    if problem := problem or config_keys.problem(fields.left):
        raise fields.error(problem)
    return decoder


def _rope(fields: Fields, default: float | None) -> tuple[float, RopeScaling | None]:
    """Remove the rotary keys, in their older or newer form, from ``fields``; return the base and the scaling.

    The scaling is None if there is none. ``default`` is the base if no key states it; None: a key must state it.
    """
    base = fields.number("rope_theta", default)
    older, newer = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    rope = newer or older
    if rope is None:
        if base is None:
            raise fields.error("has no 'rope_theta', which this layout requires")
        return base, None
    theta = rope.number("rope_theta", base)
    if theta is None:
        raise fields.error("has no 'rope_theta', which this layout requires")
    rope_type = rope.take("rope_type", rope.take("type", "default"))
    rope.take("type", None)
    rope.allow("partial_rotary_factor", 1.0)
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer("original_max_position_embeddings"),
        )
    elif rope_type == "default" or (rope_type == "linear" and rope.number("factor") == 1.0):
        rope.allow("factor", 1.0)
        rope.take("original_max_position_embeddings", None)  # a record: this kind does not use it
    else:
        raise fields.error(f"rope scaling of type {rope_type!r} can be written only in the hf layout; use hf")
    rope.finish()
    return theta, scaling


def common_dtype(tensors: Iterable[TensorInfo]) -> str:
    """Return the name of the dtype in which most bytes of the tensors are stored, as in config.json."""
    sizes: Counter[torch.dtype] = Counter()
    for info in tensors:
        sizes[info.dtype] += info.nbytes
    return dtype_name(sizes.most_common(1)[0][0])


def decoded_dtype(tensors: Iterable[TensorInfo]) -> str:
    """Return the name of the dtype to load decoded weights in: float32, or bfloat16 for a large model."""
    return "bfloat16" if sum(info.nbytes // info.dtype.itemsize for info in tensors) >= LARGE else "float32"
