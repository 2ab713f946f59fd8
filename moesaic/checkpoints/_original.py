"""The tensor names that Meta gave with Llama, and Mistral kept: both ways, with rotary rows turned.

Knows the names and which of them hold query and key rows. Does not know files or sharding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from moesaic.checkpoints._numbers import Numbers
from moesaic.checkpoints._views import Rotary, View
from moesaic.errors import CheckpointError

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_DENSE = {
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_ROTARY = re.compile(r"layers\.\d+\.attention\.w[qk]\.weight")


def names(numbers: Numbers) -> Iterator[tuple[str, str]]:
    """Yield (original, classic) for every tensor that a model of these numbers has."""
    for layer in range(numbers.layers):
        for original, classic in (_LAYER | (_experts(numbers.experts) if numbers.experts else _DENSE)).items():
            yield f"layers.{layer}.{original}", f"model.layers.{layer}.{classic}"
    yield from _TOP.items()


def _experts(count: int) -> dict[str, str]:
    """Return the names of a layer's router and experts."""
    found = {"feed_forward.gate.weight": "block_sparse_moe.gate.weight"}
    for expert in range(count):
        for number in ("w1", "w2", "w3"):
            stem = f"experts.{expert}.{number}.weight"
            found[f"feed_forward.{stem}"] = f"block_sparse_moe.{stem}"
    return found


def to_classic(views: Mapping[str, View], numbers: Numbers, path: Path) -> dict[str, View]:
    """Return ``views`` under classic names and in half-split order, in their own order.

    A tensor without a classic name keeps its own, for whoever fills a model to refuse.

    Raises:
        CheckpointError: a tensor that the numbers call for is missing, or its rows are no whole heads.
    """
    table = dict(names(numbers))
    missing = [name for name in table if name not in views]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(path, f"{missing[0]} is missing{more}: params.json calls for it, found no such tensor")
    return {table.get(name, name): _turned(name, view, numbers, halves=True) for name, view in views.items()}


def to_original(views: Mapping[str, View], numbers: Numbers, path: Path) -> dict[str, View]:
    """Return ``views`` under original names and in interleaved order, layer by layer.

    Raises:
        CheckpointError: a tensor is missing, or has no name in this scheme.
    """
    table = dict(names(numbers))
    missing = sorted(set(table.values()) - views.keys())
    surplus = sorted(views.keys() - set(table.values()))
    if missing or surplus:
        fault = f"{missing[0]} is missing" if missing else f"{surplus[0]} has no name in this layout"
        raise CheckpointError(path, f"{fault}; the configuration and the tensors disagree")
    return {name: _turned(name, views[classic], numbers, halves=False) for name, classic in table.items()}


def _turned(name: str, view: View, numbers: Numbers, *, halves: bool) -> View:
    """Return ``view`` with its rows in the other rotary order if it has any."""
    if not _ROTARY.fullmatch(name):
        return view
    heads = numbers.heads if ".wq." in name else numbers.kv_heads
    expected = [heads * numbers.head_dim, numbers.hidden]
    if list(view.info.shape) != expected:
        raise CheckpointError(
            view.info.file, f"{name} has the wrong shape: expected {expected}, found {list(view.info.shape)}"
        )
    return Rotary(view, numbers.head_dim, halves=halves)
