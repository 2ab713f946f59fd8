"""Meta's layout: params.json and consolidated.NN.pth, with one file for each model-parallel rank.

Weights are split over ranks as in Megatron-LM (Shoeybi et al., arXiv:1909.08053) by fairscale. Projections into heads
and into the feed-forward layer are split along their output, the projections back along their input. Every file holds
all norms and routers. The embedding is split along its width up to Llama 2 and along the vocabulary since Llama 3; its
shape shows which. Files named ``merged.{N}GPUs.NN.pth``, which a converter of the company AIME writes for N ranks, are
read as well.

params.json is read as Meta writes it. Files written by this module may also contain ``moe``, ``head_dim`` and
``sliding_window`` as in Mistral's params.json, so that every model family can be stored in this layout.

Meta's params.json does not contain the factor by which rotary wavelengths are scaled (``use_scaled_rope``). It is 8
since Llama 3.1, and 32 in the published config.json of Llama 3.2 1B and 3B, which are recognized by their size. Files
written by this module contain the factor under the names of Llama 4's params.json (``rope_scaling_factor``,
``rope_high_freq_factor``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoints import PLAIN_DTYPES, Checkpoint
from moesaic.checkpoints._decoder import DecoderConfig, RopeScaling, common_dtype, parse_config
from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._json import read_json, read_json_if_there
from moesaic.checkpoints._original import to_classic, to_original
from moesaic.checkpoints._torchfile import TorchFile, TorchFiles
from moesaic.checkpoints._views import Joined, Part, Replicated, Stored, View
from moesaic.checkpoints._write import WriteOptions, generation_config, new_folder, views_with_head, write_json
from moesaic.errors import CheckpointError, ConfigError, InvalidParameter

LOOKS_FOR = "params.json without 'hidden_dim', and consolidated.NN.pth or merged.{N}GPUs.NN.pth"
PRIORITY = 2

EMBEDDING = "tok_embeddings.weight"
UNKNOWN_VOCAB = -1
"""``vocab_size`` in params.json of Llama 1 and 2, which means that the tokenizer determines it."""
LLAMA_2_VOCAB = 32_000
LLAMA_3_2_SIZES = {(2048, 16), (3072, 28)}
"""``dim`` and ``n_layers`` of Llama 3.2 1B and 3B."""
_FILE = re.compile(r"(consolidated|merged\.(\d+)GPUs)\.(\d\d)\.pth")
_OUTPUT = re.compile(r"output\.weight|.*\.attention\.w[qkv]\.weight|.*\.feed_forward\.(experts\.\d+\.)?w[13]\.weight")
_INPUT = re.compile(r".*\.attention\.wo\.weight|.*\.feed_forward\.(experts\.\d+\.)?w2\.weight")
_IGNORED_KEYS = ("max_batch_size", "model_parallel_size")
_RELEASED_SIZES = ((256, None), (256, 1.5), (1024, 1.3), (4096, 1.3), (4096, 1.2))
"""Pairs of ``multiple_of`` and ``ffn_dim_multiplier`` in params.json of the models that Meta released."""


def detect(path: Path) -> bool:
    """Return whether the folder holds params.json and weight files in Meta's layout."""
    if not _files(path):
        return False
    try:
        params = read_json(path / "params.json")
    except CheckpointError:
        return True  # open_checkpoint reports the problem
    return "hidden_dim" not in params and "intermediate_size" not in params


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in the folder ``path``, with any number of model-parallel files.

    Raises:
        ConfigError: params.json is missing, or has a key or value that is not supported.
        CheckpointError: a file is missing or damaged, or the files do not belong to the same checkpoint.
    """
    params = Fields(read_json(path / "params.json"), path / "params.json")
    generation = read_json_if_there(path / "generation_config.json")
    decoder = _decoder_config(params)
    files = _files(path)
    _check_ranks(files, path)
    store = TorchFiles(files)
    try:
        joined = _join(store.files, decoder.hidden)
        if decoder.vocab == UNKNOWN_VOCAB and EMBEDDING in joined:
            decoder = replace(decoder, vocab=joined[EMBEDDING].info.shape[0])
        views = to_classic(joined, decoder, path)
    except CheckpointError:
        store.close()
        raise
    model_type = "mixtral" if decoder.experts else "mistral" if decoder.window else "llama"
    config = decoder.to_config(model_type, common_dtype(view.info for view in views.values()))
    return Checkpoint("meta", path, config, generation, views, store.close)


def write(source: Checkpoint, path: Path, options: WriteOptions) -> None:
    """Write ``source`` in this layout for ``options.shards`` model-parallel ranks, with one rank in memory at a time.

    ``options.on_write`` is called once for a tensor that all ranks hold.

    Raises:
        InvalidParameter: ``path`` is not empty, or the model cannot be split over that many ranks; the message lists
            the possible numbers.
        ConfigError: the configuration cannot be expressed in params.json.
        CheckpointError: the source cannot be read, or the target cannot be written.
    """
    decoder, shards, on_write = parse_config(source.config, source.path), options.shards, options.on_write
    params = _params(decoder, source.path)
    possible = _possible_ranks(decoder)
    if shards not in possible:
        divisors = ", ".join(map(str, possible))
        raise InvalidParameter(
            "shards", f"is {shards}, but heads, feed-forward size and vocabulary divide by {divisors}"
        )
    views = to_original(views_with_head(source), decoder, source.path)
    for name, view in views.items():
        if view.info.dtype not in PLAIN_DTYPES:  # the reader of these files refuses other types
            problem = f"{name} is stored as {view.info.dtype}, which cannot be written in the meta layout; use hf"
            raise CheckpointError(view.info.file, problem)
    with new_folder(path, source) as folder:
        for rank in range(shards):
            state = {}
            for name, view in views.items():
                # The tensor may be a view of a mapped file, of which torch.save would write all; so it is cloned.
                state[name] = (
                    _rank_part(name, view, rank, shards, decoder).read().clone(memory_format=torch.contiguous_format)
                )
                if on_write is not None and (rank == 0 or _axis(name, decoder, shards) is not None):
                    on_write(state[name].nbytes)
            _save(state, folder / f"consolidated.{rank:02d}.pth")
        if generation := generation_config(source):
            write_json(folder / "generation_config.json", generation)
        write_json(folder / "params.json", params)


def _save(state: dict[str, torch.Tensor], file: Path) -> None:
    """Write the tensors of one rank to ``file``; torch reports a full disk as a RuntimeError."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise CheckpointError(file, f"could not be written: {str(error).splitlines()[0]}") from error


def _files(path: Path) -> list[Path]:
    """Return the weight files of one set in the order of ranks; empty if there are none.

    If the folder holds several sets, Meta's own is chosen, or else the one for the fewest ranks.
    """
    sets: dict[int, list[Path]] = {}
    for file in sorted(path.glob("*.pth")):
        if match := _FILE.fullmatch(file.name):
            sets.setdefault(int(match[2] or 0), []).append(file)
    return sets[min(sets)] if sets else []


def _check_ranks(files: Sequence[Path], path: Path) -> None:
    """Raise CheckpointError if the file of a rank is missing."""
    match = _FILE.fullmatch(files[0].name)
    assert match is not None
    names = {file.name for file in files}
    for rank in range(max(int(match[2] or 0), len(files))):
        name = f"{match[1]}.{rank:02d}.pth"
        if name not in names:
            raise CheckpointError(path / name, f"is missing, although {files[-1].name} exists")


def _join(files: Sequence[TorchFile], hidden: int) -> dict[str, View]:
    """Return views of the complete tensors, joined from the files of all ranks.

    ``hidden`` is the length of an embedding vector; it shows how the embedding is split.
    """
    first = files[0]
    for file in files[1:]:
        if differing := sorted(file.tensors.keys() ^ first.tensors.keys()):
            complete, incomplete = (file, first) if differing[0] in file.tensors else (first, file)
            raise CheckpointError(incomplete.path, f"{differing[0]} is missing, although it is in {complete.path.name}")
        for name, info in file.tensors.items():
            expected = first.tensors[name]
            if (info.shape, info.dtype) != (expected.shape, expected.dtype):
                raise CheckpointError(
                    file.path,
                    f"{name} has the wrong shape: expected {list(expected.shape)} as in {first.path.name}, "
                    f"found {list(info.shape)}",
                )
    views: dict[str, View] = {}
    for name, info in first.tensors.items():
        parts = [Stored(file, name) for file in files]
        axis = _split_axis(name, full_width=info.shape[-1] == hidden)
        if len(parts) == 1:
            views[name] = parts[0]
        elif axis is None or len(info.shape) != 2:
            views[name] = Replicated(name, parts)
        else:
            views[name] = Joined(parts, axis)
    return views


def _split_axis(name: str, full_width: bool) -> int | None:
    """Return the axis along which a tensor is split over ranks, or None if each rank holds all of it.

    ``full_width`` says whether each rank holds whole embedding vectors, of a part of the vocabulary.
    """
    if name == EMBEDDING:
        return 0 if full_width else 1
    return 0 if _OUTPUT.fullmatch(name) else 1 if _INPUT.fullmatch(name) else None


def _axis(name: str, decoder: DecoderConfig, shards: int) -> int | None:
    """Return the axis along which ``write`` splits a tensor over ranks; None if each rank gets all of it.

    Embedding vectors are split only for Llama 2's vocabulary, because Llama 2's code expects it.
    """
    full_width = decoder.vocab != LLAMA_2_VOCAB or decoder.hidden % shards != 0
    return _split_axis(name, full_width)


def _rank_part(name: str, view: View, rank: int, shards: int, decoder: DecoderConfig) -> View:
    """Return the part of a tensor that rank ``rank`` of ``shards`` holds."""
    axis = _axis(name, decoder, shards)
    if axis is None:
        return view
    share = view.info.shape[axis] // shards
    return Part(view, (slice(None),) * axis + (slice(rank * share, (rank + 1) * share),))


def _possible_ranks(decoder: DecoderConfig) -> list[int]:
    """Return the numbers of ranks over which the model can be split; at most 99, since file names have two digits."""
    common = math.gcd(decoder.heads, decoder.kv_heads, decoder.intermediate, decoder.vocab)
    return [count for count in range(1, min(common, 99) + 1) if common % count == 0]


def _decoder_config(params: Fields) -> DecoderConfig:
    """Parse params.json; the vocabulary size of the result may be ``UNKNOWN_VOCAB``."""
    hidden, heads, layers = params.integer("dim"), params.integer("n_heads"), params.integer("n_layers")
    vocab = params.take("vocab_size", UNKNOWN_VOCAB)
    if type(vocab) is not int or (vocab < 1 and vocab != UNKNOWN_VOCAB):
        raise params.error(f"vocab_size is {vocab!r}, expected a positive integer")
    theta = params.number("rope_theta", 10_000.0)
    scaling = _scaling(params, (hidden, layers) in LLAMA_3_2_SIZES)
    multiple, multiplier = params.integer("multiple_of", 256), params.number("ffn_dim_multiplier", None)
    intermediate = _feed_forward_size(hidden, multiple, multiplier)
    moe = params.nested("moe")
    decoder = DecoderConfig(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=params.integer("n_kv_heads", heads),
        head_dim=params.integer("head_dim", hidden // heads),
        vocab=vocab,
        max_length=params.integer("max_seq_len", 131_072 if scaling else 8192 if theta > 10_000 else 4096),
        eps=params.number("norm_eps"),
        theta=theta,
        window=params.integer("sliding_window", None),
        scaling=scaling,
        experts=moe.integer("num_experts") if moe else None,
        experts_per_token=moe.integer("num_experts_per_tok") if moe else None,
    )
    if moe:
        moe.finish()
    params.finish(_IGNORED_KEYS)
    return decoder


def _scaling(params: Fields, small: bool) -> RopeScaling | None:
    """Remove the keys of rotary scaling from ``params``; return the scaling, or None if it is off.

    Meta's files do not contain the factor. ``small`` says whether the model is Llama 3.2 1B or 3B, whose factor is 32.
    """
    scaled = params.take("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise params.error(f"use_scaled_rope is {scaled!r}, expected true or false")
    factor = params.number("rope_scaling_factor", 32.0 if small else 8.0)
    high = params.number("rope_high_freq_factor", 4.0)
    return RopeScaling(factor, 1.0, high, 8192) if scaled else None


def _feed_forward_size(hidden: int, multiple: int, factor: float | None) -> int:
    """Return the feed-forward size, which Meta computes from ``dim``, ``multiple_of`` and ``ffn_dim_multiplier``."""
    size = int(8 * hidden / 3)
    if factor is not None:
        size = int(factor * size)
    return multiple * -(-size // multiple)


def _feed_forward_keys(hidden: int, intermediate: int) -> dict[str, Any]:
    """Return ``multiple_of`` and ``ffn_dim_multiplier`` of params.json that give the feed-forward size.

    If the values of a model that Meta released give it, these are used.
    """
    size = int(8 * hidden / 3)
    fallback = (intermediate, None if size <= intermediate else intermediate / size)
    multiple, factor = next(
        pair for pair in (*_RELEASED_SIZES, fallback) if _feed_forward_size(hidden, *pair) == intermediate
    )
    return {"multiple_of": multiple} | ({} if factor is None else {"ffn_dim_multiplier": factor})


def _params(decoder: DecoderConfig, path: Path) -> dict[str, Any]:
    """Return the content of params.json for this configuration; ``path`` is the source that an error names."""
    params: dict[str, Any] = {
        "dim": decoder.hidden,
        "n_layers": decoder.layers,
        "n_heads": decoder.heads,
        "n_kv_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab,
        **_feed_forward_keys(decoder.hidden, decoder.intermediate),
        "norm_eps": decoder.eps,
        "rope_theta": decoder.theta,
        "max_seq_len": decoder.max_length,
    }
    if (scaling := decoder.scaling) is not None:
        if (scaling.low_freq_factor, scaling.original_length) != (1.0, 8192):
            raise ConfigError(path, "this rope scaling cannot be written in the meta layout; use hf")
        params |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": scaling.factor,
            "rope_high_freq_factor": scaling.high_freq_factor,
        }
    if decoder.head_dim * decoder.heads != decoder.hidden:
        params["head_dim"] = decoder.head_dim
    if decoder.window is not None:
        params["sliding_window"] = decoder.window
    if decoder.experts:
        params["moe"] = {"num_experts": decoder.experts, "num_experts_per_tok": decoder.experts_per_token}
    return params
