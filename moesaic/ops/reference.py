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

NEVER = float("-inf")


def why_not(op: str, device: str, format: str | None) -> str | None:
    """Never declines."""
    return None


def linear(x: Tensor, weight: Packed) -> Tensor:
    return F.linear(x, weight.dequantize(x.dtype))


def experts(x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor) -> Tensor:
    order = ids.flatten().argsort(stable=True)  # choices in the order of their experts
    token = order // ids.shape[1]
    counts = torch.bincount(ids.flatten(), minlength=gate.shape[0]).tolist()
    chosen = [expert for expert, count in enumerate(counts) if count]
    weights = zip(*(_entries(stack, chosen, x.dtype) for stack in (gate, up, down)), strict=True)
    rows = x.index_select(0, token).split([counts[expert] for expert in chosen])
    parts = [
        F.linear(F.silu(F.linear(part, g)) * F.linear(part, u), d)
        for part, (g, u, d) in zip(rows, weights, strict=True)
    ]
    answers = torch.cat(parts).float() * scores.flatten()[order, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, answers).to(x.dtype)


def _entries(stack: Packed, chosen: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Return the plain weights of the chosen entries.

    Where gradients are wanted all are unpacked at once: the gradient of picking one entry is a
    whole stack of zeros, that of taking all apart is one stack.
    """
    if torch.is_grad_enabled() and any(part.requires_grad for part in stack.parts().values()):
        entries = stack.dequantize(dtype).unbind(0)
        return [entries[index] for index in chosen]
    return [stack.dequantize(dtype, index) for index in chosen]


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, window: int | None) -> Tensor:
    if batch.cache is not None:
        k, v = _write(batch.cache, layer, batch.slots, k, v)
    counts = [end - begin for begin, end in itertools.pairwise(batch.starts)]
    parts = zip(q.split(counts), k.split(counts), v.split(counts), batch.positions.split(counts), strict=True)
    return torch.cat([_sequence(batch, layer, s, *part, window) for s, part in enumerate(parts)])


def _sequence(
    batch: Batch, layer: int, s: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
) -> Tensor:
    """Return the attention of sequence ``s``: its new tokens' q, k, v, and what the cache holds of it."""
    length = batch.lengths[s]
    if length == len(q) and (window is None or length <= window):
        return _attend(q, k, v, None)  # the whole sequence is in this step: plain causal attention
    if batch.cache is None:
        keys, values, first = k, v, 0
    else:
        keys, values, first = _read(batch.cache, layer, batch.tables[s], length)
    return _attend(q, keys, values, _seen(positions, first + torch.arange(len(keys), device=q.device), window))


def _write(cache: Cache, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Store k and v; return them as they are read again, so that who is in the cache already makes no difference."""
    stored = []
    for x, memory, scales in ((k, cache.keys, cache.key_scales), (v, cache.values, cache.value_scales)):
        if scales:
            q, scale = round_heads(x)
            scales[layer].flatten(0, 1)[slots] = scale
            stored.append(_scaled(q, scale))
        else:
            q = x.to(memory[layer].dtype)
            stored.append(q)
        memory[layer].flatten(0, 1)[slots] = q
    return stored[0], stored[1]


def round_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [..., D] as an int8 cache holds it: q [..., D] int8 and scale [...] float32; see ``Cache``."""
    x = x.float()
    most = x.abs().amax(-1)
    # Not 127 / most, which torch computes as 127 * (1 / most): that rounds twice.
    factor = torch.where(most > 2.0**-100, torch.full_like(most, 127.0) / most, 0.0)
    finite = most.isfinite()
    q = torch.where(finite[..., None], (x * factor[..., None]).round(), 0.0)
    return q.to(torch.int8), torch.where(finite, most / 127, torch.nan)


def _scaled(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale[..., None]


def _read(cache: Cache, layer: int, table: Tensor, length: int) -> tuple[Tensor, Tensor, int]:
    """Return keys and values [n, G, D] of a sequence, and the position of the first.

    Blocks that slid out of the window were given back (-1); they are always the leading ones.
    """
    table = table[: -(-length // cache.block_size)]
    lost = int((table < 0).sum())
    first = lost * cache.block_size

    def rows(memory: Tensor) -> Tensor:
        return memory[table[lost:]].flatten(0, 1)[: length - first]

    keys, values = rows(cache.keys[layer]), rows(cache.values[layer])
    if cache.key_scales:
        keys = _scaled(keys, rows(cache.key_scales[layer]))
        values = _scaled(values, rows(cache.value_scales[layer]))
    return keys, values, first


def _seen(positions: Tensor, places: Tensor, window: int | None) -> Tensor:
    """Return which keys at ``places`` each query at ``positions`` sees: [queries, keys] bool."""
    seen = places[None, :] <= positions[:, None]
    if window is not None:
        seen &= places[None, :] > positions[:, None] - window
    return seen


def _attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Return softmax(q k / sqrt(D)) v for one sequence; ``seen`` None: causal, query i at key i."""
    q, keys, values = (each.to(q.dtype).transpose(0, 1)[None] for each in (q, keys, values))  # [1, heads, n, D]
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, is_causal=seen is None, enable_gqa=True)
    return out[0].transpose(0, 1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def truncate(logits: Tensor, settings: Tensor) -> Tensor:
    x = logits.float().clone()
    for column, (change, off) in enumerate(TRUNCATIONS):
        rows = (settings[:, column] != off).nonzero()[:, 0]
        if len(rows):
            x[rows] = change(x[rows], settings[rows, column : column + 1])
    return x


def temper(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide by the temperature, the largest logit at 0 so that a small temperature overflows to -inf only."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k largest, and what equals the last of them."""
    k = k.long().clamp(max=logits.shape[-1])
    least = logits.sort(descending=True).values.gather(-1, k - 1)
    return logits.masked_fill(logits < least, NEVER)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches p, and what equals the last of them."""
    probabilities = logits.softmax(-1)
    ordered = probabilities.sort(descending=True).values
    place = (ordered.cumsum(-1, dtype=torch.float64) < p).sum(-1, keepdim=True)
    least = ordered.gather(-1, place.clamp(max=logits.shape[-1] - 1))
    return logits.masked_fill(probabilities < least, NEVER)


def min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), NEVER)


def typical_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the expected one, up to mass p."""
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    expected = -(probabilities * logprobs).nansum(-1, keepdim=True)
    order = (-logprobs - expected).abs().sort(dim=-1, stable=True).indices
    ordered = probabilities.gather(-1, order)
    before = F.pad(ordered.cumsum(-1, dtype=torch.float64)[:, :-1], (1, 0))  # the first is always kept
    return logits.masked_fill(~torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before < p), NEVER)


TRUNCATIONS = ((temper, float("nan")), (top_k, 0.0), (top_p, 1.0), (min_p, 0.0), (typical_p, 1.0))
"""What is done to a row, in order, and the setting that leaves it as it is; of temperature, none does."""


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    mass = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)  # a float32 sum would lose a vocabulary's tail
    return torch.searchsorted(mass, numbers[:, None] * mass[:, -1:], right=True)[:, 0]
