"""Meta's layout: params.json beside consolidated.NN.pth, one file per model-parallel rank.

Knows how each weight is cut over the ranks (Shoeybi et al., Megatron-LM, arXiv:1909.08053, as fairscale
does it): projections into the heads and the feed-forward layer along their output, those back along
their input, norms and routers whole in every file; the embedding along its width up to Llama 2 and along
the vocabulary since, which its shape tells. ``merged.{N}GPUs.NN.pth``, as AIME's converter calls the same
weights for N ranks, is read too. Knows params.json: what Meta writes there, and in files of ours also
``moe``, ``head_dim`` and ``sliding_window`` in Mistral's words, so that every family has this layout.

Meta's files do not say by how much rotary wavelengths are stretched (``use_scaled_rope``). It is 8 since
Llama 3.1, but 32 in the published config.json of Llama 3.2 1B and 3B, which are told by their size. Files
of ours say it, in the words of Llama 4's params.json (``rope_scaling_factor``, ``rope_high_freq_factor``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._json import read_json, read_json_if_there
from moesaic.checkpoints._numbers import Numbers, Scaling, common_dtype, from_config
from moesaic.checkpoints._original import to_classic, to_original
from moesaic.checkpoints._torchfile import TorchFile, TorchFiles
from moesaic.checkpoints._views import Joined, Part, Replicated, Stored, View
from moesaic.checkpoints._write import Wrote, generation, target, untied, write_json
from moesaic.errors import CheckpointError, ConfigError, InvalidParameter

LOOKS_FOR = "params.json without 'hidden_dim', and consolidated.NN.pth or merged.{N}GPUs.NN.pth"

EMBEDDING = "tok_embeddings.weight"
UNSAID = -1  # the vocab_size of Llama 1 and 2, who leave it to their tokenizer
LLAMA2_VOCAB = 32_000
SMALL = {(2048, 16), (3072, 28)}  # (dim, n_layers) of Llama 3.2 1B and 3B
_FILE = re.compile(r"(consolidated|merged\.(\d+)GPUs)\.(\d\d)\.pth")
_OUTPUT = re.compile(r"output\.weight|.*\.attention\.w[qkv]\.weight|.*\.feed_forward\.(experts\.\d+\.)?w[13]\.weight")
_INPUT = re.compile(r".*\.attention\.wo\.weight|.*\.feed_forward\.(experts\.\d+\.)?w2\.weight")
_HARMLESS = ("max_batch_size", "model_parallel_size")
_RELEASED = ((256, None), (256, 1.5), (1024, 1.3), (4096, 1.3), (4096, 1.2))


def detect(path: Path) -> bool:
    """Return whether the folder holds params.json and weights as Meta distributes them."""
    if not _files(path):
        return False
    try:
        params = read_json(path / "params.json")
    except CheckpointError:
        return True  # let ``open`` say what is wrong with it
    return "hidden_dim" not in params and "intermediate_size" not in params


def open(path: Path) -> Checkpoint:
    """Open the checkpoint in the folder ``path``, whatever number of files it is cut into.

    Raises:
        ConfigError: params.json is missing, or says what is not understood.
        CheckpointError: a file is missing or damaged, or the files are not of one checkpoint.
    """
    params = Fields(read_json(path / "params.json"), path / "params.json")
    generation_config = read_json_if_there(path / "generation_config.json")
    numbers = _numbers(params)
    files = _files(path)
    _whole(files, path)
    store = TorchFiles(files)
    try:
        joined = _join(store.files, numbers.hidden)
        if numbers.vocab == UNSAID and EMBEDDING in joined:
            numbers = replace(numbers, vocab=joined[EMBEDDING].info.shape[0])
        found = to_classic(joined, numbers, path)
    except CheckpointError:
        store.close()
        raise
    kind = "mixtral" if numbers.experts else "mistral" if numbers.window else "llama"
    config = numbers.config(kind, common_dtype(view.info for view in found.values()))
    return Checkpoint("meta", path, config, generation_config, found, store.close)


def write(source: Checkpoint, path: Path, shards: int = 1, wrote: Wrote | None = None) -> None:
    """Write ``source`` in this layout, cut for ``shards`` model-parallel ranks, one rank in memory at a time.

    Raises:
        InvalidParameter: ``path`` holds something, or the model cannot be cut so; the message says how it can.
        ConfigError: the configuration asks for what params.json cannot say.
        CheckpointError: the source cannot be read, or the target cannot be written.
    """
    numbers = from_config(source.config, source.path)
    params = _params(numbers, source.path)
    legal = _legal(numbers)
    if shards not in legal:
        raise InvalidParameter(
            "shards", f"is {shards}, but heads, feed-forward size and vocabulary divide by {', '.join(map(str, legal))}"
        )
    found = to_original(untied(source), numbers, source.path)
    with target(path, source) as folder:
        for rank in range(shards):
            state = {}
            for name, view in found.items():
                # A clone, because what is read may be a window on a file, and torch.save would save all of it.
                state[name] = (
                    _cut(name, view, rank, shards, numbers).read().clone(memory_format=torch.contiguous_format)
                )
                if wrote is not None and (rank == 0 or _axis(name, numbers, shards) is not None):
                    wrote(state[name].nbytes)
            torch.save(state, folder / f"consolidated.{rank:02d}.pth")
        if ids := generation(source):
            write_json(folder / "generation_config.json", ids)
        write_json(folder / "params.json", params)


def _files(path: Path) -> list[Path]:
    """Return the files of one set, in the order of ranks: Meta's own, or else the set of fewest files."""
    sets: dict[int, list[Path]] = {}
    for file in sorted(path.glob("*.pth")):
        if found := _FILE.fullmatch(file.name):
            sets.setdefault(int(found[2] or 0), []).append(file)
    return sets[min(sets)] if sets else []


def _whole(files: Sequence[Path], path: Path) -> None:
    """Raise CheckpointError if a file in the row of ranks is not there."""
    found = _FILE.fullmatch(files[0].name)
    assert found is not None
    names = {file.name for file in files}
    for rank in range(max(int(found[2] or 0), len(files))):
        name = f"{found[1]}.{rank:02d}.pth"
        if name not in names:
            raise CheckpointError(path / name, f"is missing, though there is {files[-1].name}")


def _join(files: Sequence[TorchFile], hidden: int) -> dict[str, View]:
    """Return every tensor put together over the files."""
    first = files[0]
    for file in files[1:]:
        if odd := sorted(file.tensors.keys() ^ first.tensors.keys()):
            has, lacks = (file, first) if odd[0] in file.tensors else (first, file)
            raise CheckpointError(lacks.path, f"{odd[0]} is missing, though it is in {has.path.name}")
        for name, info in file.tensors.items():
            expected = first.tensors[name]
            if (info.shape, info.dtype) != (expected.shape, expected.dtype):
                raise CheckpointError(
                    file.path,
                    f"{name} has the wrong shape: expected {list(expected.shape)} as in {first.path.name}, "
                    f"found {list(info.shape)}",
                )
    found: dict[str, View] = {}
    for name, info in first.tensors.items():
        copies = [Stored(file, name) for file in files]
        axis = _split_axis(name, info.shape[-1] == hidden)
        whole = axis is None or len(info.shape) != 2
        found[name] = (
            copies[0] if len(copies) == 1 else Replicated(name, copies) if whole else Joined(copies, axis or 0)
        )
    return found


def _split_axis(name: str, wide: bool) -> int | None:
    """Return the axis along which a tensor is cut, or None; ``wide``: an embedding has its full width."""
    if name == EMBEDDING:
        return 0 if wide else 1
    return 0 if _OUTPUT.fullmatch(name) else 1 if _INPUT.fullmatch(name) else None


def _axis(name: str, numbers: Numbers, shards: int) -> int | None:
    """Return the axis along which to cut a tensor; Llama 2's reader wants its embedding cut along the width."""
    return _split_axis(name, numbers.vocab != LLAMA2_VOCAB or numbers.hidden % shards != 0)


def _cut(name: str, view: View, rank: int, shards: int, numbers: Numbers) -> View:
    """Return what rank ``rank`` of ``shards`` holds of a tensor."""
    axis = _axis(name, numbers, shards)
    if axis is None:
        return view
    share = view.info.shape[axis] // shards
    return Part(view, (slice(None),) * axis + (slice(rank * share, (rank + 1) * share),))


def _legal(numbers: Numbers) -> list[int]:
    """Return the numbers of ranks that a model can be cut for; file names have two digits."""
    common = math.gcd(numbers.heads, numbers.kv_heads, numbers.inner, numbers.vocab)
    return [count for count in range(1, min(common, 99) + 1) if common % count == 0]


def _numbers(params: Fields) -> Numbers:
    """Return what a params.json says, ``vocab`` perhaps UNSAID."""
    hidden, heads, layers = params.integer("dim"), params.integer("n_heads"), params.integer("n_layers")
    vocab = params.take("vocab_size", UNSAID)
    if type(vocab) is not int or (vocab < 1 and vocab != UNSAID):
        raise params.fail(f"vocab_size is {vocab!r}, expected a positive whole number")
    theta = params.number("rope_theta", 10_000.0)
    scaling = _scaling(params, (hidden, layers) in SMALL)
    moe = params.nested("moe")
    numbers = Numbers(
        hidden=hidden,
        inner=_inner(hidden, params.integer("multiple_of", 256), params.number("ffn_dim_multiplier", None)),
        layers=layers,
        heads=heads,
        kv_heads=params.integer("n_kv_heads", heads),
        head_dim=params.integer("head_dim", hidden // heads),
        vocab=vocab,
        length=params.integer("max_seq_len", 131_072 if scaling else 8192 if theta > 10_000 else 4096),
        eps=params.number("norm_eps"),
        theta=theta,
        window=params.integer("sliding_window", None),
        scaling=scaling,
        experts=moe.integer("num_experts") if moe else None,
        chosen=moe.integer("num_experts_per_tok") if moe else None,
    )
    if moe:
        moe.finish()
    params.finish(_HARMLESS)
    return numbers


def _scaling(params: Fields, small: bool) -> Scaling | None:
    """Take the rotary scaling, which Meta's own files switch on without saying how much."""
    scaled = params.take("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise params.fail(f"use_scaled_rope is {scaled!r}, expected true or false")
    factor = params.number("rope_scaling_factor", 32.0 if small else 8.0)
    high = params.number("rope_high_freq_factor", 4.0)
    return Scaling(factor, 1.0, high, 8192) if scaled else None


def _inner(hidden: int, multiple: int, factor: float | None) -> int:
    """Return the feed-forward size that Meta's three numbers stand for."""
    size = int(8 * hidden / 3)
    if factor is not None:
        size = int(factor * size)
    return multiple * -(-size // multiple)


def _outer(hidden: int, inner: int) -> dict[str, Any]:
    """Return the keys of params.json that stand for a feed-forward size: a released model's, or any that fit."""
    size = int(8 * hidden / 3)
    free = (inner, None if size <= inner else inner / size)
    multiple, factor = next(pair for pair in (*_RELEASED, free) if _inner(hidden, *pair) == inner)
    return {"multiple_of": multiple} | ({} if factor is None else {"ffn_dim_multiplier": factor})


def _params(numbers: Numbers, path: Path) -> dict[str, Any]:
    """Return the params.json that says these numbers."""
    params: dict[str, Any] = {
        "dim": numbers.hidden,
        "n_layers": numbers.layers,
        "n_heads": numbers.heads,
        "n_kv_heads": numbers.kv_heads,
        "vocab_size": numbers.vocab,
        **_outer(numbers.hidden, numbers.inner),
        "norm_eps": numbers.eps,
        "rope_theta": numbers.theta,
        "max_seq_len": numbers.length,
    }
    if (scaling := numbers.scaling) is not None:
        if (scaling.low, scaling.length) != (1.0, 8192):
            raise ConfigError(path, "rope scaling with these numbers has no expression in the meta layout; use hf")
        params |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": scaling.factor,
            "rope_high_freq_factor": scaling.high,
        }
    if numbers.head_dim * numbers.heads != numbers.hidden:
        params["head_dim"] = numbers.head_dim
    if numbers.window is not None:
        params["sliding_window"] = numbers.window
    if numbers.experts:
        params["moe"] = {"num_experts": numbers.experts, "num_experts_per_tok": numbers.chosen}
    return params
