"""Every op in plain PyTorch: slow, simple and differentiable. Tests compare the other backends with this one.

It runs on any device and reads any format. Without a cache (training, scoring) it writes nothing in place, so
gradients flow.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.errors import InvalidParameter
from moesaic.formats import Codes, Packed, _feedback, grouped
from moesaic.formats._tiles import Tiled
from moesaic.ops import Batch, Cache, FormatName
from moesaic.ops._by_expert import weighted_sum

REMOVED = float("-inf")


def why_not(op: str, device: str, weight_format: FormatName) -> str | None:
    """Return None: this backend runs every op."""
    return None


def record(device: torch.device, compute: Callable[[], object]) -> None:
    """Return None: this backend records nothing."""


def linear(x: Tensor, weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    return F.linear(x, weight.dequantize(x.dtype)).to(dtype or x.dtype)


def embedding(ids: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= weight.shape[0]):
        raise InvalidParameter("ids", f"an id is out of range: there are {weight.shape[0]} rows")
    return weight.rows(ids, dtype)


def route(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, ids = F.linear(x.float(), weight).topk(k, dim=-1)
    return ids, best.softmax(dim=-1)


def experts(x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor) -> Tensor:
    gates, ups, downs = (_entries(stack, x.dtype) for stack in (gate, up, down))

    def expert(number: int, inputs: Tensor) -> Tensor:
        inner = F.silu(F.linear(inputs, gates(number))) * F.linear(inputs, ups(number))
        return F.linear(inner, downs(number))

    return weighted_sum(x, ids, scores, gate.shape[0], expert)


def _entries(stack: Packed, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """Return a function that returns the dequantized weight of an entry of a stack of experts, in ``dtype``.

    If a gradient is needed, the whole stack is dequantized once. The gradient of indexing one entry is a full stack
    of zeros; the gradient of ``unbind`` is a single stack for all entries.
    """
    if torch.is_grad_enabled() and any(part.requires_grad for part in stack.parts().values()):
        return stack.dequantize(dtype).unbind(0).__getitem__
    return functools.partial(stack.dequantize, dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, window: int | None) -> Tensor:
    if batch.cache is not None:
        k, v = _write(batch.cache, layer, batch.slots, k, v)
    counts = [end - begin for begin, end in itertools.pairwise(batch.starts)]
    parts = zip(q.split(counts), k.split(counts), v.split(counts), batch.positions.split(counts), strict=True)
    return torch.cat([_sequence(batch, layer, s, *part, window) for s, part in enumerate(parts)])


def _sequence(
    batch: Batch, layer: int, s: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
) -> Tensor:
    """Return the attention of the new tokens of sequence ``s`` (q, k, v) over its cached and its new tokens."""
    length = batch.lengths[s]
    if length == len(q) and (window is None or length <= window):
        return _attend(q, k, v, None)  # the whole sequence is in this step: plain causal attention
    if batch.cache is None:
        keys, values, first = k, v, 0
    else:
        keys, values, first = _read(batch.cache, layer, batch.tables[s], length)
    return _attend(q, keys, values, _visible(positions, first + torch.arange(len(keys), device=q.device), window))


def _write(cache: Cache, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Store k and v in the cache of ``layer``; return both as a later read returns them, rounded to its dtype."""
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
    """Return x [..., D] rounded as in an int8 ``Cache``: q [..., D] int8 and scale [...] float32."""
    x = x.float()
    most = x.abs().amax(-1)
    # torch computes 127 / most as 127 * (1 / most), which rounds twice.
    factor = torch.where(most > 2.0**-100, torch.full_like(most, 127.0) / most, 0.0)
    finite = most.isfinite()
    q = torch.where(finite[..., None], (x * factor[..., None]).round(), 0.0)
    return q.to(torch.int8), torch.where(finite, most / 127, torch.nan)


def _scaled(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale[..., None]


def _read(cache: Cache, layer: int, table: Tensor, length: int) -> tuple[Tensor, Tensor, int]:
    """Return the cached keys and values [n, G, D] of a sequence, and the position of the first of them.

    ``table`` has the sequence's cache blocks. Leading blocks (-1) that left the attention window were freed.
    """
    table = table[: -(-length // cache.block_size)]
    freed = int((table < 0).sum())
    first = freed * cache.block_size

    def rows(memory: Tensor) -> Tensor:
        return memory[table[freed:]].flatten(0, 1)[: length - first]

    keys, values = rows(cache.keys[layer]), rows(cache.values[layer])
    if cache.key_scales:
        keys = _scaled(keys, rows(cache.key_scales[layer]))
        values = _scaled(values, rows(cache.value_scales[layer]))
    return keys, values, first


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return the attention mask [queries, keys] from their positions: True where the query sees the key."""
    visible = keys[None, :] <= queries[:, None]
    if window is not None:
        visible &= keys[None, :] > queries[:, None] - window
    return visible


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(q k / sqrt(D)) v for one sequence; without a mask, query i sees keys 0 .. i."""
    q, keys, values = (x.to(q.dtype).transpose(0, 1)[None] for x in (q, keys, values))  # [1, heads, n, D]
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def rotary(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[:, None].float() * frequencies[None, :].float()
    return angles.cos(), angles.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def finite(x: Tensor) -> Tensor:
    return x.isfinite().all(-1)


def argmax(x: Tensor) -> Tensor:
    return x.argmax(-1)


def truncate(logits: Tensor, settings: Tensor) -> Tensor:
    x = logits.float().clone()
    for column, (change, off) in enumerate(TRUNCATIONS):
        rows = (settings[:, column] != off).nonzero()[:, 0]
        if len(rows):
            x[rows] = change(x[rows], settings[rows, column : column + 1])
    return x


def temper(logits: Tensor, temperature: Tensor) -> Tensor:
    """Shift the largest logit to 0 and divide by the temperature, so that a low temperature overflows only to -inf."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Return logits with -inf for all but the k largest and those that equal the smallest of these."""
    k = k.long().clamp(max=logits.shape[-1])
    least = logits.sort(descending=True).values.gather(-1, k - 1)
    return logits.masked_fill(logits < least, REMOVED)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Return logits with -inf outside the smallest set of likeliest tokens whose total probability reaches p.

    Tokens as likely as the last one of the set are kept too.
    """
    probabilities = logits.softmax(-1)
    ordered = probabilities.sort(descending=True).values
    index = (ordered.cumsum(-1, dtype=torch.float64) < p).sum(-1, keepdim=True)
    least = ordered.gather(-1, index.clamp(max=logits.shape[-1] - 1))
    return logits.masked_fill(probabilities < least, REMOVED)


def min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Return logits with -inf for tokens less than p times as likely as the likeliest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), REMOVED)


def typical_p(logits: Tensor, p: Tensor) -> Tensor:
    """Return logits with -inf for all but the tokens whose -log probability is nearest to the entropy.

    Tokens are kept, the nearest first, until their total probability reaches p.
    """
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    expected = -(probabilities * logprobs).nansum(-1, keepdim=True)
    order = (-logprobs - expected).abs().sort(dim=-1, stable=True).indices
    ordered = probabilities.gather(-1, order)
    before = F.pad(ordered.cumsum(-1, dtype=torch.float64)[:, :-1], (1, 0))  # the first token is always kept
    return logits.masked_fill(~torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before < p), REMOVED)


TRUNCATIONS = ((temper, float("nan")), (top_k, 0.0), (top_p, 1.0), (min_p, 0.0), (typical_p, 1.0))
"""The steps of ``truncate`` in order, each with the setting that switches it off; temperature is always applied."""


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    mass = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)  # float32 would lose the tail
    return torch.searchsorted(mass, numbers[:, None] * mass[:, -1:], right=True)[:, 0]


def quantize(weight: Packed, plain: Tensor, index: int | None = None) -> None:
    weight.store(plain, index)


def quantize_with_feedback(weight: Packed, plain: Tensor, factor: Tensor, index: int | None = None) -> None:
    assert isinstance(weight.format, Tiled)
    weight.overwrite(_feedback.quantize(weight.format, plain.to(weight.device), factor), index)


def store_codes(weight: Packed, codes: Codes, index: int | None = None) -> None:
    assert isinstance(weight.format, grouped.Format)
    weight.overwrite(weight.format.adopt(codes), index)
