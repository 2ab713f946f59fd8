"""Mistral's own layout: params.json and consolidated.* files.

Mistral distributed weights in three forms: ``consolidated*.safetensors``; several ``consolidated.NN.pth`` or ``.pt``
files, each with some of the tensors; and the first Mixtral torrent. The torrent's experts are fused
(``block_sparse_moe.w1`` [E * f, d], and w2 with each expert transposed), and its params.json uses the vocabulary of
config.json.

A folder with .pth files is in this layout if params.json contains the feed-forward size (``hidden_dim``). In Meta's
layout, that size is computed from other keys.

Legend: E experts, f intermediate size, d hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._decoder import DecoderConfig, common_dtype, parse_config
from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._json import read_json, read_json_if_there
from moesaic.checkpoints._original import to_classic, to_original
from moesaic.checkpoints._views import Part, Transposed, View
from moesaic.checkpoints._weight_files import open_weight_files
from moesaic.checkpoints._write import (
    WriteOptions,
    generation_config,
    new_folder,
    views_with_head,
    write_json,
    write_shards,
)
from moesaic.errors import CheckpointError, ConfigError

LOOKS_FOR = "params.json with 'hidden_dim', and consolidated*.safetensors, consolidated.NN.pth or consolidated.NN.pt"
PRIORITY = 3

DEFAULT_MAX_LENGTH = 32_768
"""Context length of Mistral's models, used if params.json does not contain it."""
_SAFE = re.compile(r"consolidated([.-].+)?\.safetensors")
_TORCH = re.compile(r"consolidated\.\d\d\.(pt|pth)")
_FUSED = re.compile(r"(layers\.\d+)\.block_sparse_moe\.w([123])")

# Keys in params.json of the first Mixtral, which are those of config.json, and their names in later files.
_RENAMED_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
}
# Keys of later models, with the values that do not change the computation.
_NEUTRAL = {"use_biases": False, "causal": True, "ffn_type": "gated", "norm_type": "rms", "model_type": "transformer"}
_IGNORED_KEYS = ("max_batch_size", "architectures", "torch_dtype", "router_aux_loss_coef")


def detect(path: Path) -> bool:
    """Return whether the folder holds params.json and weight files in Mistral's layout."""
    files = _files(path)
    if not files:
        return False
    try:
        return "hidden_dim" in (params := read_json(path / "params.json")) or "intermediate_size" in params
    except CheckpointError:
        return files[0].suffix != ".pth"  # open_checkpoint reports the problem


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in the folder ``path``.

    Raises:
        ConfigError: params.json is missing, or has a key or value that is not supported.
        CheckpointError: a file is damaged, or a tensor is missing.
    """
    decoder = _decoder_config(read_json(path / "params.json"), path / "params.json")
    generation = read_json_if_there(path / "generation_config.json")
    stored, close = open_weight_files(_files(path))
    try:
        views = to_classic(_split_experts(stored, decoder), decoder, path)
    except CheckpointError:
        close()
        raise
    dtype = common_dtype(view.info for view in views.values())
    config = decoder.to_config("mixtral" if decoder.experts else "mistral", dtype)
    return Checkpoint("mistral", path, config, generation, views, close)


def write(source: Checkpoint, path: Path, options: WriteOptions) -> None:
    """Write ``source`` in this layout, into ``options.shards`` safetensors files of whole tensors.

    Raises:
        InvalidParameter: ``path`` is not empty, or there are more shards than tensors.
        ConfigError: params.json cannot express the configuration: it has rope scaling or an unknown key.
        CheckpointError: the source cannot be read, or the target cannot be written.
    """
    decoder = parse_config(source.config, source.path)
    if decoder.scaling:
        raise ConfigError(source.path, "rope scaling cannot be written in the mistral layout; use hf or meta")
    views = to_original(views_with_head(source), decoder, source.path)
    files = ["consolidated.safetensors"]
    if (shards := options.shards) != 1:
        files = [f"consolidated-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    with new_folder(path, source) as folder:
        write_shards(folder, views, files, options.on_write)
        if generation := generation_config(source):
            write_json(folder / "generation_config.json", generation)
        write_json(folder / "params.json", _params(decoder))


def _files(path: Path) -> list[Path]:
    """Return the weight files: safetensors files if there are any, otherwise torch files."""
    for pattern in (_SAFE, _TORCH):
        if files := sorted(file for file in path.glob("consolidated*") if pattern.fullmatch(file.name)):
            return files
    return []


def _split_experts(stored: Mapping[str, View], decoder: DecoderConfig) -> dict[str, View]:
    """Return ``stored`` under the names that Mistral uses today.

    The first Mixtral torrent has one tensor for all experts of a layer; it is split into one for each expert.
    """
    views: dict[str, View] = {}
    for name, view in stored.items():
        fused = _FUSED.fullmatch(name)
        if fused and decoder.experts:
            expected = [decoder.experts * decoder.intermediate, decoder.hidden]
            if list(view.info.shape) != expected:
                raise CheckpointError(
                    view.info.file, f"{name} has the wrong shape: expected {expected}, found {list(view.info.shape)}"
                )
            for expert in range(decoder.experts):
                part = Part(view, (slice(expert * decoder.intermediate, (expert + 1) * decoder.intermediate),))
                views[f"{fused[1]}.feed_forward.experts.{expert}.w{fused[2]}.weight"] = (
                    Transposed(part) if fused[2] == "2" else part
                )
        else:
            views[name.replace(".block_sparse_moe.", ".feed_forward.")] = view
    return views


def _decoder_config(raw: Mapping[str, Any], path: Path) -> DecoderConfig:
    """Return the configuration in params.json, whose content is ``raw``."""
    params = Fields({_RENAMED_KEYS.get(key, key): value for key, value in raw.items()}, path)
    for key, neutral in _NEUTRAL.items():
        params.allow(key, neutral)
    moe = params.nested("moe") or params
    window = params.integer("sliding_window", None)
    # Mistral's reference code uses these bases if params.json does not contain one.
    theta = params.number("rope_theta", 1e6 if window is None else 1e4)
    heads, hidden = params.integer("n_heads"), params.integer("dim")
    length = params.integer("max_seq_len", None)
    decoder = DecoderConfig(
        hidden=hidden,
        intermediate=params.integer("hidden_dim"),
        layers=params.integer("n_layers"),
        heads=heads,
        kv_heads=params.integer("n_kv_heads", heads),
        head_dim=params.integer("head_dim", hidden // heads),
        vocab=params.integer("vocab_size"),
        max_length=params.integer("max_position_embeddings", length or DEFAULT_MAX_LENGTH),
        eps=params.number("norm_eps"),
        theta=theta,
        window=window,
        experts=moe.integer("num_experts", moe.integer("num_local_experts", None)),
        experts_per_token=moe.integer("num_experts_per_tok", None),
    )
    if (decoder.experts is None) != (decoder.experts_per_token is None):
        raise params.error("must contain both num_experts and num_experts_per_tok, or neither")
    moe.finish()
    params.finish(_IGNORED_KEYS)
    return decoder


def _params(decoder: DecoderConfig) -> dict[str, Any]:
    """Return the content of params.json for this configuration."""
    params: dict[str, Any] = {
        "dim": decoder.hidden,
        "n_layers": decoder.layers,
        "head_dim": decoder.head_dim,
        "hidden_dim": decoder.intermediate,
        "n_heads": decoder.heads,
        "n_kv_heads": decoder.kv_heads,
        "norm_eps": decoder.eps,
        "vocab_size": decoder.vocab,
        "rope_theta": decoder.theta,
        "max_position_embeddings": decoder.max_length,
    }
    if decoder.window is not None:
        params["sliding_window"] = decoder.window
    if decoder.experts:
        params["moe"] = {"num_experts": decoder.experts, "num_experts_per_tok": decoder.experts_per_token}
    return params
