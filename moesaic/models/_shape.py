"""Reads from a configuration the sizes that all decoders have.

The defaults of absent keys depend on the family of models; ``Defaults`` holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesaic import config_keys
from moesaic.models import _rope
from moesaic.models._config import Keys
from moesaic.models._layers import Shape

CAUSAL = "ForCausalLM"
CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class Defaults:
    """Values that a family of models has for absent keys of config.json.

    ``kv_heads`` None: the number of query heads.
    """

    rope_theta: float
    kv_heads: int | None
    norm_eps: float
    window: int | None = None


def read(keys: Keys, families: Mapping[str, Defaults]) -> Shape:
    """Return the sizes of the decoder that ``keys`` describe; ``families`` has the defaults of each model_type."""
    defaults = families[keys.get("model_type")]
    keys.only("hidden_act", "silu", "swish")  # two names of one function
    keys.only("attention_bias", False)
    heads = keys.integer("num_attention_heads")
    kv_heads = keys.integer("num_key_value_heads", defaults.kv_heads or heads)
    if heads % kv_heads:
        raise keys.fail(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    size = keys.integer("hidden_size")
    head_dim = keys.integer("head_dim", size // heads)
    if head_dim % 2:
        raise keys.fail(f"head_dim is {head_dim}, but rotary positions need an even number")
    layers, max_length = keys.integer("num_hidden_layers"), keys.integer("max_position_embeddings", 2048)
    window = _window(keys, defaults.window)
    if problem := config_keys.layer_types_problem(keys.get("layer_types"), layers, window, max_length):
        raise keys.fail(problem)
    return Shape(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=size,
        intermediate_size=keys.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_length=max_length,
        norm_eps=keys.number("rms_norm_eps", defaults.norm_eps),
        rope=_rope.read(keys, defaults.rope_theta),
        window=window,
        tied=keys.flag("tie_word_embeddings", False),
        labels=_labels(keys),
    )


def _window(keys: Keys, default: int | None) -> int | None:
    """Return the sliding window in tokens, or ``default`` if the key is absent; null means no window."""
    if not keys.has("sliding_window"):
        return default
    return None if keys.get("sliding_window") is None else keys.integer("sliding_window")


def _labels(keys: Keys) -> tuple[str, ...]:
    """Return a classifier's class names, in the order of the rows of its head; empty for a language model."""
    architectures = keys.get("architectures") or [CAUSAL]
    name = architectures if isinstance(architectures, str) else str(architectures[0])
    if name.endswith(CAUSAL):
        return ()
    if not name.endswith(CLASSIFIER):
        raise keys.fail(f"architecture {name!r} is not supported; only ...{CAUSAL} and ...{CLASSIFIER} are")
    named = keys.get("id2label") or {str(i): f"LABEL_{i}" for i in range(keys.integer("num_labels", 2))}
    try:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    except (AttributeError, TypeError, ValueError) as error:
        raise keys.fail(f"id2label is {named!r}, expected {{number: name}}") from error
