"""Mistral's own layout: params.json beside consolidated.* files.

Knows the three shapes in which Mistral distributed weights: ``consolidated*.safetensors``,
``consolidated.NN.pth`` or ``.pt`` that each hold some whole tensors, and the first Mixtral torrent,
whose experts are fused (``block_sparse_moe.w1`` [E * f, d], and w2 with each expert transposed) and
whose params.json already speaks config.json's language. Also knows which keys of params.json matter.

A folder with .pth files is Mistral's if params.json gives the feed-forward size (``hidden_dim``), and
Meta's if it leaves it to be computed.

Legend: E experts, f intermediate size, d hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._json import read_json, read_json_if_there
from moesaic.checkpoints._numbers import Numbers, common_dtype, from_config
from moesaic.checkpoints._original import to_classic, to_original
from moesaic.checkpoints._union import union
from moesaic.checkpoints._views import Part, Transposed, View
from moesaic.checkpoints._write import Wrote, generation, safetensors, target, untied, write_json
from moesaic.errors import CheckpointError, ConfigError

LOOKS_FOR = "params.json with 'hidden_dim', and consolidated*.safetensors, consolidated.NN.pth or consolidated.NN.pt"

LENGTH = 32_768  # what Mistral's models were trained for, where params.json is silent
_SAFE = re.compile(r"consolidated([.-].+)?\.safetensors")
_TORCH = re.compile(r"consolidated\.\d\d\.(pt|pth)")
_FUSED = re.compile(r"(layers\.\d+)\.block_sparse_moe\.w([123])")

# The first Mixtral's params.json, in config.json's words, and what later ones call the same.
_FIRST = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
}
# What the keys of later and larger models mean where they ask for nothing.
_NEUTRAL = {"use_biases": False, "causal": True, "ffn_type": "gated", "norm_type": "rms", "model_type": "transformer"}
_HARMLESS = ("max_batch_size", "architectures", "torch_dtype", "router_aux_loss_coef")


def detect(path: Path) -> bool:
    """Return whether the folder holds params.json and weights as Mistral distributes them."""
    files = _files(path)
    if not files:
        return False
    try:
        return "hidden_dim" in (params := read_json(path / "params.json")) or "intermediate_size" in params
    except CheckpointError:
        return files[0].suffix != ".pth"  # let ``open`` say what is wrong with it


def open(path: Path) -> Checkpoint:
    """Open the checkpoint in the folder ``path``.

    Raises:
        ConfigError: params.json is missing, or says what is not understood.
        CheckpointError: a file is damaged, or a tensor that params.json calls for is missing.
    """
    numbers = _numbers(read_json(path / "params.json"), path / "params.json")
    generation_config = read_json_if_there(path / "generation_config.json")
    stored, close = union(_files(path))
    try:
        found = to_classic(_split(stored, numbers), numbers, path)
    except CheckpointError:
        close()
        raise
    dtype = common_dtype(view.info for view in found.values())
    config = numbers.config("mixtral" if numbers.experts else "mistral", dtype)
    return Checkpoint("mistral", path, config, generation_config, found, close)


def write(source: Checkpoint, path: Path, shards: int = 1, wrote: Wrote | None = None) -> None:
    """Write ``source`` in this layout, into ``shards`` safetensors files of whole tensors.

    Raises:
        InvalidParameter: ``path`` holds something, or there are more shards than tensors.
        ConfigError: the configuration asks for what params.json cannot say: rope scaling, an unknown key.
        CheckpointError: the source cannot be read, or the target cannot be written.
    """
    numbers = from_config(source.config, source.path)
    if numbers.scaling:
        raise ConfigError(source.path, "rope scaling has no expression in the mistral layout; use hf or meta")
    found = to_original(untied(source), numbers, source.path)
    files = ["consolidated.safetensors"]
    if shards != 1:
        files = [f"consolidated-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    with target(path, source) as folder:
        safetensors(folder, found, files, wrote)
        if ids := generation(source):
            write_json(folder / "generation_config.json", ids)
        write_json(folder / "params.json", _params(numbers))


def _files(path: Path) -> list[Path]:
    """Return the weight files: safetensors if there are any, otherwise those of torch."""
    for pattern in (_SAFE, _TORCH):
        if files := sorted(file for file in path.glob("consolidated*") if pattern.fullmatch(file.name)):
            return files
    return []


def _split(stored: Mapping[str, View], numbers: Numbers) -> dict[str, View]:
    """Return ``stored`` with the first torrent's fused experts taken apart, under the later names."""
    found: dict[str, View] = {}
    for name, view in stored.items():
        fused = _FUSED.fullmatch(name)
        if fused and numbers.experts:
            expected = [numbers.experts * numbers.inner, numbers.hidden]
            if list(view.info.shape) != expected:
                raise CheckpointError(
                    view.info.file, f"{name} has the wrong shape: expected {expected}, found {list(view.info.shape)}"
                )
            for expert in range(numbers.experts):
                part = Part(view, (slice(expert * numbers.inner, (expert + 1) * numbers.inner),))
                found[f"{fused[1]}.feed_forward.experts.{expert}.w{fused[2]}.weight"] = (
                    Transposed(part) if fused[2] == "2" else part
                )
        else:
            found[name.replace(".block_sparse_moe.", ".feed_forward.")] = view
    return found


def _numbers(raw: Mapping[str, Any], path: Path) -> Numbers:
    """Return what a params.json says."""
    params = Fields({_FIRST.get(key, key): value for key, value in raw.items()}, path)
    for key, neutral in _NEUTRAL.items():
        params.only(key, neutral)
    moe = params.nested("moe") or params
    window = params.integer("sliding_window", None)
    # Mistral's own reference code infers the base so where params.json is silent.
    theta = params.number("rope_theta", 1e6 if window is None else 1e4)
    heads, hidden = params.integer("n_heads"), params.integer("dim")
    length = params.integer("max_seq_len", None)
    numbers = Numbers(
        hidden=hidden,
        inner=params.integer("hidden_dim"),
        layers=params.integer("n_layers"),
        heads=heads,
        kv_heads=params.integer("n_kv_heads", heads),
        head_dim=params.integer("head_dim", hidden // heads),
        vocab=params.integer("vocab_size"),
        length=params.integer("max_position_embeddings", length or LENGTH),
        eps=params.number("norm_eps"),
        theta=theta,
        window=window,
        experts=moe.integer("num_experts", moe.integer("num_local_experts", None)),
        chosen=moe.integer("num_experts_per_tok", None),
    )
    if (numbers.experts is None) != (numbers.chosen is None):
        raise params.fail("must say both num_experts and num_experts_per_tok, or neither")
    moe.finish()
    params.finish(_HARMLESS)
    return numbers


def _params(numbers: Numbers) -> dict[str, Any]:
    """Return the params.json that says these numbers."""
    params: dict[str, Any] = {
        "dim": numbers.hidden,
        "n_layers": numbers.layers,
        "head_dim": numbers.head_dim,
        "hidden_dim": numbers.inner,
        "n_heads": numbers.heads,
        "n_kv_heads": numbers.kv_heads,
        "norm_eps": numbers.eps,
        "vocab_size": numbers.vocab,
        "rope_theta": numbers.theta,
        "max_position_embeddings": numbers.length,
    }
    if numbers.window is not None:
        params["sliding_window"] = numbers.window
    if numbers.experts:
        params["moe"] = {"num_experts": numbers.experts, "num_experts_per_tok": numbers.chosen}
    return params
