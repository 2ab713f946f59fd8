"""Models that ``benchmarks.quantization`` quantizes, made from a dense Llama: moved, padded and upcycled.

All of them are folders in the layout hf with float32 weights. A padded or an upcycled model computes the same function
as its source, in exact arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from moesaic import checkpoints
from moesaic.checkpoints import _write

WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
SUPER = 256
"""Columns of a superblock of llama.cpp's K and IQ types."""

Weights = Mapping[str, Tensor]


def move(src: Path, quantized: Path, dst: Path, seed: int) -> None:
    """Write ``src`` with each weight moved at random by at most half a step of the grid that it was rounded to.

    The moved weights lie on no grid, as those of a model before it is quantized.

    Args:
        src: folder with the decoded weights of ``quantized``.
        quantized: checkpoint with codes and scales.
        dst: a new folder.
        seed: seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(weights: Weights) -> Iterator[tuple[str, Tensor]]:
        with checkpoints.open_checkpoint(quantized) as checkpoint:
            for name, weight in sorted(weights.items()):
                if name not in checkpoint.quantized or name == checkpoints.EMBEDDING:
                    yield name, weight
                    continue
                scale = checkpoint.quantized[name].codes((slice(None), slice(None))).scale.float()
                step = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
                yield name, weight + step * (torch.rand(weight.shape, generator=generator) - 0.5)

    _rewrite(src, dst, moved, {})


def pad(src: Path, dst: Path) -> None:
    """Write ``src`` with a hidden size, and as many heads, that fill whole superblocks of llama.cpp.

    The new channels are 0. The mean square over all channels is smaller therefore, and so are epsilon and the weights
    of the norms.
    """
    config = _config(src)
    hidden, heads, groups = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    size, wide = hidden // heads, -(-hidden // SUPER) * SUPER
    shared, new_heads = heads // groups, wide // size
    if new_heads % shared or wide % size:
        raise ValueError(f"{wide} channels are not whole groups of {shared} heads of size {size}")
    keys = {
        "hidden_size": wide,
        "num_attention_heads": new_heads,
        "num_key_value_heads": new_heads // shared,
        "head_dim": size,
        "rms_norm_eps": config["rms_norm_eps"] * hidden / wide,
    }
    rows = {"q_proj": wide, "k_proj": wide // shared, "v_proj": wide // shared, "o_proj": wide, "down_proj": wide}
    columns = {"down_proj": config["intermediate_size"]}

    def padded(weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            part = name.split(".")[-2]
            if weight.dim() == 1:
                yield name, F.pad(weight * (hidden / wide) ** 0.5, (0, wide - hidden))
            else:
                out, inp = rows.get(part, len(weight)), columns.get(part, wide)
                yield name, F.pad(weight, (0, inp - weight.shape[1], 0, out - len(weight)))

    _rewrite(src, dst, padded, keys)


def upcycle(src: Path, dst: Path, experts: int, chosen: int, seed: int) -> None:
    """Write a Mixtral whose experts are all the feed-forward network of the dense model ``src``.

    Routing probabilities add up to 1, so the function does not depend on the router, which is random (sparse
    upcycling, arXiv:2212.05055).

    Args:
        src: folder of a dense model.
        dst: a new folder.
        experts: number of experts of a layer.
        chosen: experts that compute each token.
        seed: seed of the routers.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def upcycled(weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            layer, found, part = name.partition(".mlp.")
            if not found:
                yield name, weight
                continue
            mixture, stack = f"{layer}.block_sparse_moe", parts[part.partition(".")[0]]
            for expert in range(experts):
                yield f"{mixture}.experts.{expert}.{stack}.weight", weight.clone()
            if stack == "w1":
                yield f"{mixture}.gate.weight", torch.randn(experts, weight.shape[1], generator=generator)

    keys = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    _rewrite(src, dst, upcycled, {**keys, "num_local_experts": experts, "num_experts_per_tok": chosen})


def _rewrite(
    src: Path, dst: Path, change: Callable[[Weights], Iterator[tuple[str, Tensor]]], keys: Mapping[str, Any]
) -> None:
    """Write the folder ``dst``: the weights of ``src`` changed, and its configuration with new keys."""
    with checkpoints.open_checkpoint(src) as checkpoint, _write.new_folder(dst, checkpoint) as folder:
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(src / WEIGHTS))}, folder / WEIGHTS)
        (folder / "config.json").write_text(json.dumps({**_config(src), **keys}))
        (folder / GENERATION).write_bytes((src / GENERATION).read_bytes())


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_bytes()))
