"""Translates the metadata of a GGUF file into the keys of config.json and generation_config.json.

Only the architecture ``llama`` is known, which llama.cpp uses for Llama, Mistral and Mixtral. A key that is not known
here may change the computation and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoints._decoder import DecoderConfig, RopeScaling
from moesaic.checkpoints._fields import Fields
from moesaic.errors import ConfigError
from moesaic.gguf import Array, GgufFile, Text

ARCHITECTURE = "llama"
FIRST_MIXTRAL = 8, 1e6
"""Number of experts and rotary base of Mixtral 8x7B, whose first GGUF files do not contain the base."""
IGNORED_KEYS = ("rope.scaling.finetuned", "tensor_data_layout", "vocab_size")
"""Keys that do not change the computation. The number of tokens is that of the embedding's rows."""
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
"""Names of tokens that end an answer although the file does not list them; llama.cpp knows them as well."""
SPECIAL = (3, 4)
"""Types of tokens that may end an answer: control tokens, and user-defined texts, as which many files list control
tokens."""
MAX_NAME = 200
"""Number of characters of a text value that are read; all known values are shorter."""
MAX_IDS, MAX_LAYERS = 1 << 21, 1 << 12
"""Maximum lengths of arrays that have a value for each token, or for each layer."""
LLAMA3_BAND = 1.0, 4.0
"""``low_freq_factor`` and ``high_freq_factor`` in every configuration that Meta published."""
DEFAULT_ORIGINAL_LENGTH, MAX_ORIGINAL_LENGTH = 8192, 1 << 30


def read_config(file: GgufFile, vocab: int, *, tied: bool, dtype: str, factors: Tensor | None) -> dict[str, Any]:
    """Return the configuration of the model with the keys of config.json.

    Args:
        file: the GGUF file, or the first file of a split model.
        vocab: the number of rows of the embedding.
        tied: whether the head has the weights of the embedding.
        dtype: the dtype to write into the configuration.
        factors: content of the tensor ``rope_freqs.weight`` [D/2] for heads of size D, or None if there is none.

    Raises:
        ConfigError: the architecture is another one, or a value is missing or not supported.
    """
    architecture = file.text("general.architecture")
    if architecture != ARCHITECTURE:
        raise ConfigError(
            file.path,
            f"has the architecture {architecture!r:.80}; only {ARCHITECTURE!r} (Llama, Mistral, Mixtral) is supported",
        )
    decoder, linear = _decoder(Fields(_values(file, f"{ARCHITECTURE}."), file.path), vocab)
    if factors is not None:
        decoder = replace(decoder, scaling=_scaling(factors, decoder, file))
        if linear:
            raise ConfigError(file.path, "has both rope_freqs.weight and a rope scaling; only one is supported")
    config = decoder.to_config(_model_type(file, decoder), dtype)
    if linear:
        config["rope_scaling"] = {"rope_type": "linear", "factor": linear}
    return config | {"tie_word_embeddings": tied}


def read_generation(file: GgufFile) -> dict[str, Any]:
    """Return the ids of the tokens that begin and end a text, and the sampling, as in generation_config.json."""
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    names = {name.encode() for name in END_OF_TURN}
    kinds = file.numbers("tokenizer.ggml.token_type", MAX_IDS)
    for token_id, piece in enumerate(file.texts("tokenizer.ggml.tokens", MAX_IDS)):
        if piece in names and token_id < len(kinds) and kinds[token_id] in SPECIAL:
            ends.append(token_id)
    generation: dict[str, Any] = {
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if isinstance(end, int))) or None,
    }
    for key, name in SAMPLING.items():
        value = file.metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and math.isfinite(value):
            # A float32 of the file is 0.2 only after rounding.
            generation[name] = value if isinstance(value, int) else float(f"{value:.7g}")
    return {name: value for name, value in generation.items() if value is not None}


def _model_type(file: GgufFile, decoder: DecoderConfig) -> str:
    """Return the family of the model: "mixtral", "mistral" or "llama".

    A Mistral without a window computes the same as a Llama; only the model's name distinguishes them. The family
    chooses the chat format of a model that has no template and no control tokens.
    """
    if decoder.experts:
        return "mixtral"
    named = "mistral" in (file.text("general.name") or "").lower()
    return "mistral" if decoder.window or named else "llama"


def _values(file: GgufFile, prefix: str) -> dict[str, Any]:
    """Return the metadata whose keys begin with ``prefix``, by the rest of the key.

    An array with the same number for each layer becomes one number. An array with different numbers raises ConfigError.
    """
    values: dict[str, Any] = {}
    for key, value in file.metadata.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            if isinstance(value, Array):
                # Some writers repeat a number for each layer.
                numbers = set(file.numbers(key, MAX_LAYERS))
                if len(numbers) != 1:
                    raise ConfigError(file.path, f"{key} differs between layers, which is not supported")
                (value,) = numbers
            values[name] = (file.text(key) or "")[:MAX_NAME] if isinstance(value, Text) else value
    return values


def _decoder(fields: Fields, vocab: int) -> tuple[DecoderConfig, float | None]:
    """Return the sizes of the model, and the factor of a linear rope scaling (None if there is none)."""
    experts, used = _count(fields, "expert_count"), _count(fields, "expert_used_count")
    heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    fields.allow("attention.value_length", head_dim)
    fields.allow("rope.dimension_count", head_dim)
    fields.allow("attention.causal", True)
    first_mixtral, its_theta = FIRST_MIXTRAL
    intermediate = fields.integer("feed_forward_length")
    if experts:
        intermediate = fields.integer("expert_feed_forward_length", intermediate)
    decoder = DecoderConfig(
        hidden=hidden,
        intermediate=intermediate,
        layers=fields.integer("block_count"),
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=vocab,
        max_length=fields.integer("context_length"),
        eps=fields.number("attention.layer_norm_rms_epsilon"),
        theta=fields.number("rope.freq_base", its_theta if experts == first_mixtral else 1e4),
        window=_count(fields, "attention.sliding_window"),
        experts=experts,
        experts_per_token=used if experts else None,
    )
    if (decoder.experts is None) != (decoder.experts_per_token is None):
        raise fields.error("must contain both expert_count and expert_used_count, or neither")
    fields.allow("expert_gating_func", 0, 1)  # 1 is softmax
    fields.allow("expert_weights_norm", True)
    fields.allow("expert_weights_scale", 0.0, 1.0)
    linear = _linear(fields)
    fields.finish(IGNORED_KEYS)
    return decoder, linear


def _count(fields: Fields, name: str) -> int | None:
    """Remove the key ``name`` and return its value, a count; None for zero, which means that the model has none."""
    value = fields.take(name, 0)
    if type(value) is not int or value < 0:
        raise fields.error(f"{name} is {value!r}, expected a whole number")
    return value or None


def _linear(fields: Fields) -> float | None:
    """Remove the keys of rope scaling from ``fields``; return the factor of a linear scaling, or None."""
    kind = fields.take("rope.scaling.type", "none")
    old = fields.number("rope.scale_linear", 1.0)
    factor = fields.number("rope.scaling.factor", old)
    fields.take("rope.scaling.original_context_length", None)
    if kind == "none" or factor == 1.0:
        return None if old == 1.0 else float(old)
    if kind != "linear":
        raise fields.error(f"has rope scaling of type {kind!r}, which is not supported; only linear is")
    return float(factor)


def _scaling(factors: Tensor, decoder: DecoderConfig, file: GgufFile) -> RopeScaling | None:
    """Return the scaling of Llama 3.1 that gives these factors of the wavelengths; None if all factors are 1.

    The file does not contain the parameters of the scaling. The largest factor, that of long wavelengths, is
    ``factor``. A factor between 1 and the largest shows ``original_length``, because the two other parameters are the
    same in all models.
    """
    if tuple(factors.shape) != (decoder.head_dim // 2,):
        raise ConfigError(file.path, f"rope_freqs.weight has shape {list(factors.shape)}")
    wanted = factors.double()
    factor = float(wanted.max())
    if bool((wanted == 1).all()):
        return None
    inverse = decoder.theta ** -(torch.arange(0, decoder.head_dim, 2, dtype=torch.float64) / decoder.head_dim)
    low, high = LLAMA3_BAND
    keep = (1 / wanted - 1 / factor) / (1 - 1 / factor) if factor > 1 else torch.zeros_like(wanted)
    band = ((keep > 1e-3) & (keep < 1 - 1e-3)).nonzero().flatten().tolist()
    lengths: Iterable[int] = (DEFAULT_ORIGINAL_LENGTH, *(1 << bits for bits in range(5, 21)))
    if band:
        length = float(2 * math.pi * (low + (high - low) * keep[band[0]]) / inverse[band[0]])
        lengths = (round(min(length, MAX_ORIGINAL_LENGTH)),)
    for length in lengths:
        turns = length * inverse / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        if torch.allclose(1 / (kept + (1 - kept) / factor), wanted, rtol=1e-5, atol=0.0):
            return RopeScaling(factor, low, high, length)
    raise ConfigError(file.path, "rope_freqs.weight holds factors that do not come from Llama 3.1's rope scaling")
