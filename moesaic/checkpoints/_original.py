"""Translation between the tensor names of Meta and Mistral ("original") and of Hugging Face ("classic").

Query and key rows are reordered as well, since the two conventions order rotary pairs differently. This module does
not depend on files or sharding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from moesaic.checkpoints._decoder import DecoderConfig
from moesaic.checkpoints._foreign import refuse_wrapped
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


def tensor_names(decoder: DecoderConfig) -> Iterator[tuple[str, str]]:
    """Yield (Meta's and Mistral's name, Hugging Face's name) for every tensor of a model with this configuration."""
    for layer in range(decoder.layers):
        for original, classic in (_LAYER | (_experts(decoder.experts) if decoder.experts else _DENSE)).items():
            yield f"layers.{layer}.{original}", f"model.layers.{layer}.{classic}"
    yield from _TOP.items()


def _experts(count: int) -> dict[str, str]:
    """Return {Meta's and Mistral's name: Hugging Face's name} of a layer's router and experts, without the layer."""
    names = {"feed_forward.gate.weight": "block_sparse_moe.gate.weight"}
    for expert in range(count):
        for number in ("w1", "w2", "w3"):
            stem = f"experts.{expert}.{number}.weight"
            names[f"feed_forward.{stem}"] = f"block_sparse_moe.{stem}"
    return names


def to_classic(views: Mapping[str, View], decoder: DecoderConfig, path: Path) -> dict[str, View]:
    """Return ``views`` under Hugging Face's names, in the same order, with query and key rows in half-split order.

    A tensor that has no such name keeps its own name. ``load_weights`` refuses it later.

    Raises:
        CheckpointError: a tensor that the configuration requires is missing, or query or key rows have the wrong shape.
    """
    table = dict(tensor_names(decoder))
    missing = [name for name in table if name not in views]
    if missing:
        refuse_wrapped(views, path)
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(path, f"{missing[0]} is missing{more}: params.json requires it")
    return {table.get(name, name): _reordered(name, view, decoder, half_split=True) for name, view in views.items()}


def to_original(views: Mapping[str, View], decoder: DecoderConfig, path: Path) -> dict[str, View]:
    """Return ``views`` under the names of Meta and Mistral, layer by layer, with query and key rows interleaved.

    Raises:
        CheckpointError: a tensor is missing, or has no original name.
    """
    table = dict(tensor_names(decoder))
    missing = sorted(set(table.values()) - views.keys())
    unexpected = sorted(views.keys() - set(table.values()))
    if missing or unexpected:
        problem = f"{missing[0]} is missing" if missing else f"{unexpected[0]} has no name in this layout"
        raise CheckpointError(path, f"{problem}; the configuration and the tensors disagree")
    return {name: _reordered(name, views[classic], decoder, half_split=False) for name, classic in table.items()}


def _reordered(name: str, view: View, decoder: DecoderConfig, *, half_split: bool) -> View:
    """Return ``view`` with its rows in another rotary order if it holds query or key rows, otherwise unchanged.

    The new order is half-split if ``half_split``, and interleaved if not.
    """
    if not _ROTARY.fullmatch(name):
        return view
    heads = decoder.heads if ".wq." in name else decoder.kv_heads
    expected = [heads * decoder.head_dim, decoder.hidden]
    if list(view.info.shape) != expected:
        raise CheckpointError(
            view.info.file, f"{name} has the wrong shape: expected {expected}, found {list(view.info.shape)}"
        )
    return Rotary(view, decoder.head_dim, half_split=half_split)
