"""Names of tensors in GGUF files, and the classic names of Hugging Face's layout.

Legend: L layer, E expert.
"""

from __future__ import annotations

import re

from moesaic.checkpoints import EMBEDDING, HEAD

TOP = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
    **{f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in _LINEAR.items() for part in ("weight", "bias")},
}
"""Names after ``blk.L.`` and after ``model.layers.L.``."""
ROPE_FACTORS = "rope_freqs.weight"
NUMBERS = {"gate": "w1", "down": "w2", "up": "w3"}
ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(weight|bias)")

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_TOP_NAMES, _LAYER_NAMES, _KINDS = ({v: k for k, v in table.items()} for table in (TOP, LAYER, NUMBERS))


def gguf_name(name: str) -> tuple[str, int | None] | None:
    """Return the name in GGUF files of the tensor with the classic ``name``, and its place in a stack of experts.

    The place is None for a tensor that is not in a stack. Return None if GGUF files have no such tensor.
    """
    if name in _TOP_NAMES:
        return _TOP_NAMES[name], None
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return None
    if expert := _EXPERT.fullmatch(match[2]):
        return f"blk.{match[1]}.ffn_{_KINDS[expert[2]]}_exps.weight", int(expert[1])
    return (f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}", None) if match[2] in _LAYER_NAMES else None
