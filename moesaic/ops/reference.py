"""Every op in plain PyTorch: slow, differentiable, never clever. What the others are measured against.

Runs on any device and any format. Where there is no cache (training, scoring) nothing is
written in place, so gradients flow.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.formats import Packed
from moesaic.ops import Batch, Cache


def why_not(op: str, device: str, format: str | None) -> str | None:
    """Never declines."""
    return None


def linear(x: Tensor, weight: Packed) -> Tensor:
    return F.linear(x, weight.dequantize(x.dtype))


def experts(x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in ids.unique().tolist():
        token, choice = torch.where(ids == expert)
        rows = x.index_select(0, token)  # its gradient is index_add, many times faster than indexing's
        hidden = F.silu(F.linear(rows, gate.dequantize(x.dtype, expert))) * F.linear(
            rows, up.dequantize(x.dtype, expert)
        )
        answer = F.linear(hidden, down.dequantize(x.dtype, expert))
        out = out.index_add(0, token, answer.float() * scores[token, choice, None])
    return out.to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, window: int | None) -> Tensor:
    if batch.cache is not None:
        _write(batch.cache, layer, batch.slots, k, v)
    out = []
    for s, (begin, end) in enumerate(itertools.pairwise(batch.starts)):
        if batch.cache is None:
            keys, values, first = k[begin:end], v[begin:end], 0
        else:
            keys, values, first = _read(batch.cache, layer, batch.tables[s], batch.lengths[s])
        places = first + torch.arange(len(keys), device=q.device)
        out.append(_attend(q[begin:end], keys, values, batch.positions[begin:end], places, window))
    return torch.cat(out)


def _write(cache: Cache, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
    cache.keys[layer].flatten(0, 1)[slots] = k.to(cache.keys[layer].dtype)
    cache.values[layer].flatten(0, 1)[slots] = v.to(cache.values[layer].dtype)


def _read(cache: Cache, layer: int, table: Tensor, length: int) -> tuple[Tensor, Tensor, int]:
    """Return keys and values [n, G, D] of a sequence, and the position of the first.

    Blocks that slid out of the window were given back (-1); they are always the leading ones.
    """
    table = table[: -(-length // cache.block_size)]
    lost = int((table < 0).sum())
    first = lost * cache.block_size
    keys = cache.keys[layer][table[lost:]].flatten(0, 1)[: length - first]
    values = cache.values[layer][table[lost:]].flatten(0, 1)[: length - first]
    return keys, values, first


def _attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, places: Tensor, window: int | None) -> Tensor:
    """Return softmax(q k / sqrt(D)) v with queries at ``positions`` and keys at ``places``."""
    seen = places[None, :] <= positions[:, None]
    if window is not None:
        seen &= places[None, :] > positions[:, None] - window
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.to(q.dtype).transpose(0, 1)[None],
        values.to(q.dtype).transpose(0, 1)[None],
        attn_mask=seen,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
