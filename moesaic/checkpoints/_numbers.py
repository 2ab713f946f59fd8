"""What a decoder's configuration says, whichever vocabulary it is written in.

Knows config.json's vocabulary, in both directions; a layout with a vocabulary of its own
translates between that and ``Numbers``, so that nothing is lost unnoticed. Does not know tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._views import TensorInfo

# Keys of config.json that describe training or bookkeeping, and change no answer.
HARMLESS = frozenset(
    {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"}
    | {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "pretraining_tp", "tie_word_embeddings"}
)

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}


@dataclass(frozen=True)
class Scaling:
    """Llama 3.1's stretching of rotary wavelengths, as Meta published it with the weights."""

    factor: float
    low: float
    high: float
    length: int


@dataclass(frozen=True)
class Numbers:
    """The numbers of a decoder. ``window``, ``scaling`` and ``experts`` are None where there is none."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    length: int
    eps: float
    theta: float
    window: int | None = None
    scaling: Scaling | None = None
    experts: int | None = None
    chosen: int | None = None  # experts per token

    def config(self, kind: str, dtype: str) -> dict[str, Any]:
        """Return these numbers in config.json's vocabulary, for model_type ``kind`` and weights in ``dtype``."""
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[kind]],
            "model_type": kind,
            "dtype": dtype,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.length,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "tie_word_embeddings": False,
        }
        if kind != "llama":
            config["sliding_window"] = self.window  # null matters: some readers take absence for 4096
        if self.scaling:
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": self.scaling.factor,
                "low_freq_factor": self.scaling.low,
                "high_freq_factor": self.scaling.high,
                "original_max_position_embeddings": self.scaling.length,
            }
        if self.experts:
            config |= {"num_local_experts": self.experts, "num_experts_per_tok": self.chosen}
        return config


def from_config(config: Mapping[str, Any], path: Path) -> Numbers:
    """Return the numbers that a config.json says.

    Raises:
        ConfigError: a key is missing, or asks for what only config.json can express.
    """
    fields = Fields(config, path)
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise fields.fail(f"model_type {kind!r} has no other layout; only {', '.join(ARCHITECTURES)} have")
    if kind == "mistral" and "sliding_window" not in config:
        raise fields.fail("does not say 'sliding_window'; null means none")
    fields.only("hidden_act", "silu")
    theta, scaling = _rope(fields, None if kind == "mixtral" else 10_000.0)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    numbers = Numbers(
        hidden=hidden,
        inner=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads)
        if kind == "llama"
        else fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim", hidden // heads),
        vocab=fields.integer("vocab_size"),
        length=fields.integer("max_position_embeddings"),
        eps=fields.number("rms_norm_eps"),
        theta=theta,
        window=fields.integer("sliding_window", None),
        scaling=scaling,
        experts=fields.integer("num_local_experts") if kind == "mixtral" else None,
        chosen=fields.integer("num_experts_per_tok") if kind == "mixtral" else None,
    )
    fields.finish(HARMLESS)
    return numbers


def _rope(fields: Fields, default: float | None) -> tuple[float, Scaling | None]:
    """Take the rotary keys, of the old vocabulary or the new."""
    base = fields.number("rope_theta", default)
    older, newer = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    inner = newer or older
    if inner is None:
        if base is None:
            raise fields.fail("does not say 'rope_theta', which this layout needs")
        return base, None
    theta = inner.number("rope_theta", base)
    if theta is None:
        raise fields.fail("does not say 'rope_theta', which this layout needs")
    kind = inner.take("rope_type", inner.take("type", "default"))
    inner.take("type", None)
    inner.only("partial_rotary_factor", 1.0)
    scaling = None
    if kind == "llama3":
        scaling = Scaling(
            inner.number("factor"),
            inner.number("low_freq_factor"),
            inner.number("high_freq_factor"),
            inner.integer("original_max_position_embeddings"),
        )
    elif kind != "default":
        raise fields.fail(f"rope scaling of type {kind!r} has no expression outside config.json; keep the hf layout")
    inner.finish()
    return theta, scaling


def common_dtype(tensors: Iterable[TensorInfo]) -> str:
    """Return the dtype, as config.json spells it, in which most of the weights' bytes are."""
    weight: Counter[torch.dtype] = Counter()
    for info in tensors:
        weight[info.dtype] += info.nbytes
    return str(weight.most_common(1)[0][0]).removeprefix("torch.")
