"""The ops that models and the sampler call, the Batch that they work on, and the Group of ranks that shares a model.

This module defines the signature, the shapes and the meaning of every op. It checks the arguments of each call and
chooses the backend that runs it: one file is one backend, and ``reference`` is the last one tried. It does not
depend on any model.

A backend file defines any subset of ``OPS`` and

    why_not(op, device, weight_format) -> str | None      None: it can run this; otherwise the reason why not
    record(device, compute) -> Graph | None               a graph of the ops that ``compute`` calls; None: it cannot

``weight_format`` is the name of the weight's format; None for an op without a weight; for ``experts`` whose stacks
have different formats, the names of those of gate, up and down. A backend may trust the shapes, dtypes and devices.
Only the ids of ``experts`` are its own to check, since reading them here would cost a synchronization.

Legend: T tokens of this step, S sequences, R rows of logits, V vocabulary, d hidden size, f intermediate size,
E experts, k experts per token, H query heads, G key/value heads, D head size, B block size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from moesaic import registry
from moesaic.errors import InvalidParameter
from moesaic.formats import Codes, Packed, Shape, grouped
from moesaic.formats._feedback import feedback_factor as feedback_factor
from moesaic.formats._feedback import is_fed_back as is_fed_back
from moesaic.formats._feedback import padded_columns
from moesaic.ops import _frozen
from moesaic.ops._batch import Batch as Batch
from moesaic.ops._batch import Cache as Cache
from moesaic.ops._batch import Group as Group
from moesaic.ops._dispatch import OPS as OPS
from moesaic.ops._dispatch import FormatName as FormatName
from moesaic.ops._dispatch import backends as backends
from moesaic.ops._dispatch import chosen as chosen
from moesaic.ops._dispatch import explain as explain
from moesaic.ops._dispatch import pick, pick_checked, pick_experts
from moesaic.ops._frozen import Delta as Delta
from moesaic.ops._graph import Graph as Graph

T = TypeVar("T")

# The checks run for every op of every step. Those of devices and dtypes therefore share a cached function with the
# choice of the backend; only shapes are compared in every call. ``Packed`` has checked the parts of a weight.


def linear(x: Tensor, weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """Return x [T, in] times weight [out, in] transposed: [T, out], in ``dtype``, or in x's if that is None."""
    trained = _needs_gradient(x, weight)
    op = pick_checked("linear", weight.name, trained, x.dtype, x.device, weight.device)
    if x.shape[1:] != weight.shape[1:] or len(weight.shape) != 2:
        raise _mismatch("x", x.shape, f"[T, in] for a weight of shape {weight.shape}")
    if trained and not _needs_gradient(weight):
        return _frozen.linear(x, weight, dtype)
    return cast(Tensor, op(x, weight, dtype))


def embedding(ids: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    """Return rows ``ids`` [T] int64 of weight [rows, d], dequantized to ``dtype``: [T, d].

    Raises:
        InvalidParameter: an id is not in 0 .. rows - 1. A backend of GPUs may return a row of NaN for it instead,
            since a check would wait for the device.
    """
    if ids.dim() != 1 or ids.dtype != torch.int64 or len(weight.shape) != 2:
        raise _mismatch("ids", ids.shape, f"[T] int64 for a weight of shape {weight.shape}, not {ids.dtype}")
    if ids.device != weight.device:
        raise InvalidParameter("weight", f"is on {weight.device}, but ids is on {ids.device}")
    return cast(Tensor, pick("embedding", ids.device, weight.name, _needs_gradient(weight))(ids, weight, dtype))


def route(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k experts of each token with the largest router logits, the largest first, and their scores.

    The logits are x times weight transposed, computed in float32. The scores are the softmax over the k logits
    (arXiv:2401.04088 §2.1). Of equal logits, backends may take either.

    Args:
        x: [T, d].
        weight: [E, d] float32.
        k: number of experts for each token, at most E.

    Returns:
        ids [T, k] int64 and scores [T, k] float32.
    """
    op = pick_checked("route", None, _needs_gradient(x, weight), x.dtype, x.device, weight.device)
    if weight.dim() != 2 or x.shape[1:] != weight.shape[1:] or weight.dtype != torch.float32:
        raise _mismatch("x", x.shape, f"[T, d] for a float32 weight [E, d], not {weight.dtype} {tuple(weight.shape)}")
    if not 1 <= k <= len(weight):
        raise InvalidParameter("k", f"is {k}, expected 1 to {len(weight)} experts")
    return cast(tuple[Tensor, Tensor], op(x, weight, k))


def experts(
    x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor, delta: Delta | None = None
) -> Tensor:
    """Return the score-weighted sum of the chosen experts' SwiGLU for each token: [T, d].

    y[t] = sum over j of scores[t, j] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])), e = ids[t, j]

    Args:
        x: [T, d].
        gate, up: [E, f, d]; Mixtral's w1 and w3.
        down: [E, d, f]; Mixtral's w2. The three stacks may have different formats.
        ids: [T, k] int64, the chosen experts, distinct within a row.
        scores: [T, k] float32, their weights; the model computes the routing.
        delta: adds something to the product of each matrix, such as a low-rank adapter in training.

    Raises:
        InvalidParameter: an expert id is not in 0 .. E - 1. A backend whose check would wait for the device gives
            NaN for the token instead.
    """
    names = (gate.name, up.name, down.name)
    mixed = names[0] != names[1] or names[0] != names[2]
    trained = _needs_gradient(x, gate, up, down, scores)
    op = pick_experts(
        *(names if mixed else names[0], trained, x.device, x.dtype, scores.dtype, ids.dtype),
        *(gate.device, up.device, down.device, ids.device, scores.device),
    )
    if ids.shape != scores.shape or ids.shape[:1] != x.shape[:1] or x.shape[1:] != gate.shape[2:]:
        raise _mismatch(
            "x, ids, scores", (tuple(x.shape), tuple(ids.shape), tuple(scores.shape)), "[T, d], [T, k], [T, k]"
        )
    _check_stacks(gate.shape, up.shape, down.shape)
    if delta is not None or (trained and not _needs_gradient(gate, up, down)):
        return _frozen.experts(x, gate, up, down, ids, scores, delta)
    return cast(Tensor, op(x, gate, up, down, ids, scores))


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, window: int | None) -> Tensor:
    """Store k and v in the cache, then return the causal attention of q over each token's own sequence: [T, H, D].

    Scores are scaled by 1 / sqrt(D). A token at position p sees positions max(0, p - window + 1) .. p;
    without a window, 0 .. p. Cache slots outside a sequence may hold any value, NaN included.

    Args:
        q: [T, H, D].
        k, v: [T, G, D] with G dividing H; query head h reads key head h // (H / G)
            (GQA, arXiv:2305.13245). The same dtype as q.
        batch: the sequences and their cache.
        layer: index of the layer in the cache.
        window: number of positions that a token sees, itself included; None: all.
    """
    op = pick_checked(
        *("attention", None, _needs_gradient(q, k, v), q.dtype),
        *(q.device, k.device, v.device, batch.positions.device),
    )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise InvalidParameter("k, v", f"are {k.dtype} and {v.dtype}, but q is {q.dtype}")
    if q.shape[0] != k.shape[0] or k.shape != v.shape or q.shape[0] != batch.starts[-1]:
        shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
        raise _mismatch("q, k, v", shapes, f"[T, H, D], [T, G, D], [T, G, D] with T = {batch.starts[-1]}")
    memory = None if batch.cache is None else batch.cache.keys[layer].shape[2:]
    _check_heads(q.shape[1:], k.shape[1:], memory)
    return cast(Tensor, op(q, k, v, batch, layer, window))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, in x's dtype.

    RMSNorm, arXiv:1910.07467.
    """
    trained = _needs_gradient(x, weight)
    op = pick_checked("rms_norm", None, trained, x.dtype, x.device, weight.device)
    if x.shape[-1:] != weight.shape:
        raise _mismatch("x", x.shape, f"[..., n] for a weight of shape {tuple(weight.shape)}")
    return cast(Tensor, op(x, weight, eps))


def rotary(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the angles positions[t] * frequencies[i]: each [T, n] float32.

    Args:
        frequencies: angles per position, in radians: [n] float32.
        positions: [T] int64.
    """
    op = pick_checked("rotary", None, False, frequencies.dtype, frequencies.device, positions.device)
    if frequencies.dim() != 1 or positions.dim() != 1 or positions.dtype != torch.int64:
        raise _mismatch("positions", positions.shape, f"[T] int64, not {positions.dtype}")
    return cast(tuple[Tensor, Tensor], op(frequencies, positions))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x[i], x[i + D/2]) of x [T, heads, D] by the angles whose cos and sin are [T, D/2].

    RoPE, arXiv:2104.09864, in Hugging Face's half-split order; computed in float32, in x's dtype.
    """
    trained = _needs_gradient(x)
    op = pick_checked("rope", None, trained, x.dtype, x.device, cos.device, sin.device)
    tokens, _, size = x.shape
    if cos.shape != (tokens, size // 2) or sin.shape != cos.shape or size % 2:
        raise _mismatch("cos, sin", (tuple(cos.shape), tuple(sin.shape)), f"[T, D/2] for x of shape {tuple(x.shape)}")
    return cast(Tensor, op(x, cos, sin))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, two tensors of one shape and dtype, computed in float32 (arXiv:2002.05202)."""
    op = pick_checked("swiglu", None, _needs_gradient(gate, up), gate.dtype, gate.device, up.device)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise _mismatch("up", up.shape, f"{tuple(gate.shape)} of {gate.dtype}, not {up.dtype}")
    return cast(Tensor, op(gate, up))


def add(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y, two tensors of one shape and dtype."""
    op = pick_checked("add", None, _needs_gradient(x, y), x.dtype, x.device, y.device)
    if x.shape != y.shape or x.dtype != y.dtype:
        raise _mismatch("y", y.shape, f"{tuple(x.shape)} of {x.dtype}, not {y.dtype}")
    return cast(Tensor, op(x, y))


def finite(x: Tensor) -> Tensor:
    """Return, as bool [R], whether all values of each row of x [R, n] are finite."""
    op = pick_checked("finite", None, False, x.dtype, x.device)
    if x.dim() != 2:
        raise _mismatch("x", x.shape, "[R, n]")
    return cast(Tensor, op(x))


def argmax(x: Tensor) -> Tensor:
    """Return the index of the largest value of each row of x [R, n]: [R] int64. No value is NaN, and n is at least 1.

    Of equal values, backends may take any.
    """
    op = pick_checked("argmax", None, False, x.dtype, x.device)
    if x.dim() != 2 or not x.shape[1]:
        raise _mismatch("x", x.shape, "[R, n] with n >= 1")
    return cast(Tensor, op(x))


def truncate(logits: Tensor, settings: Tensor) -> Tensor:
    """Return logits [R, V] after temperature and truncations: float32, -inf for removed tokens.

    x = (logits - max) / temperature. The truncations follow in this order; each uses the softmax of the tokens that
    the previous one kept. Top-k keeps the k largest. Nucleus sampling (arXiv:1904.09751) keeps the smallest set of
    likeliest tokens whose total probability reaches p. Both keep tokens that equal the last kept one. Min-p
    (arXiv:2407.01082) keeps tokens at least min-p times as likely as the likeliest. Typical sampling (arXiv:2202.00666)
    keeps the tokens whose -log probability is nearest to the entropy, up to a total probability of typical-p.

    Args:
        logits: [R, V] float32; -inf for forbidden tokens. At least one value of each row is finite.
        settings: [R, 5] float32: temperature > 0, k (0: off), p (1: off), min-p (0: off), typical-p (1: off).
    """
    op = pick_checked("truncate", None, False, logits.dtype, logits.device, settings.device)
    if settings.shape != (logits.shape[0], 5) or logits.dim() != 2:
        raise _mismatch("settings", settings.shape, f"[R, 5] for logits [R, V] of shape {tuple(logits.shape)}")
    return cast(Tensor, op(logits, settings))


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw one token id for each row of logits [R, V] float32: [R] int64.

    The softmax of a row divides [0, 1) among the tokens in the order of their ids. The result is the token whose
    interval contains numbers[r]; numbers [R] is float64 in [0, 1).
    """
    op = pick_checked("draw", None, False, logits.dtype, logits.device, numbers.device)
    if numbers.shape != logits.shape[:1] or logits.dim() != 2:
        raise _mismatch("numbers", numbers.shape, f"[R] for logits [R, V] of shape {tuple(logits.shape)}")
    return cast(Tensor, op(logits, numbers))


@torch.no_grad()
def quantize(weight: Packed, plain: Tensor, index: int | None = None) -> None:
    """Overwrite ``weight`` [out, in], or entry ``index`` of a stack [E, out, in], with a plain weight, quantized.

    Args:
        weight: a weight in any format.
        plain: the floats [out, in], or [E, out, in] for all entries.
        index: number of the entry.

    Raises:
        InvalidParameter: the shapes differ.
    """
    expected = weight.shape if index is None else weight.shape[1:]
    if tuple(plain.shape) != expected:
        raise _mismatch("plain", plain.shape, f"{expected}")
    pick("quantize", weight.device, weight.name, trained=False)(weight, plain, index)


@torch.no_grad()
def quantize_with_feedback(weight: Packed, plain: Tensor, factor: Tensor, index: int | None = None) -> None:
    """Overwrite ``weight``, or entry ``index`` of a stack, with a plain weight, quantized with error feedback.

    Args:
        weight: a weight [out, in], or a stack [E, out, in], in int4, int3 or int2.
        plain: the floats [out, in].
        factor: what ``feedback_factor`` returns for the inputs of the weight.
        index: number of the entry of a stack.

    Raises:
        InvalidParameter: the shapes differ, or the weight has another format.
    """
    if not is_fed_back(weight.format):
        raise InvalidParameter("weight", f"has format {weight.name}, which is quantized without error feedback")
    if len(weight.shape) != (2 if index is None else 3) or tuple(plain.shape) != weight.shape[-2:]:
        raise _mismatch("plain", plain.shape, f"{weight.shape[-2:]}")
    columns = padded_columns(plain.shape[1])
    if tuple(factor.shape) != (columns, columns):
        raise _mismatch("factor", factor.shape, f"{(columns, columns)}")
    op = pick("quantize_with_feedback", weight.device, weight.name, trained=False)
    op(weight, plain, factor.float().contiguous(), index)


@torch.no_grad()
def store_codes(weight: Packed, codes: Codes, index: int | None = None) -> None:
    """Overwrite ``weight`` [out, in], or entry ``index`` of a stack [E, out, in], with codes of a file, unchanged.

    Args:
        weight: a weight in the format ``grouped``.
        codes: the codes [out, in], with their scales and offsets as the weight's format describes them.
        index: number of the entry.

    Raises:
        InvalidParameter: the weight has another format, or the codes do not fit it.
    """
    if not isinstance(weight.format, grouped.Format):
        raise InvalidParameter("weight", f"has format {weight.name}, which cannot store the codes of a file")
    if len(weight.shape) != (2 if index is None else 3):
        raise _mismatch("weight", weight.shape, "[out, in] without an index, or [E, out, in] with one")
    fitted = weight.format.fitted(codes, weight.shape[-2:])
    pick("store_codes", weight.device, weight.name, trained=False)(weight, fitted, index)


def record(device: torch.device, compute: Callable[[], T]) -> Graph[T] | None:
    """Run ``compute`` on ``device`` and record the ops that it calls, so that they run again in one call.

    Everything that ``compute`` does with tensors must be an op of this module, or a view; what it reads must stay at
    its place. Then its ops can be repeated on what these tensors hold later.

    Returns:
        The graph, with the result of ``compute``; None if no backend can record it.
    """
    found = (registry.load("ops", name).record(device, compute) for name in backends())
    return next((graph for graph in found if graph is not None), None)


def _needs_gradient(*inputs: Tensor | Packed) -> bool:
    """Return whether any of the inputs requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    parts = [part for x in inputs for part in (x.parts().values() if isinstance(x, Packed) else (x,))]
    return any(part.requires_grad for part in parts)


@functools.cache
def _check_stacks(gate: Shape, up: Shape, down: Shape) -> None:
    if len(gate) != 3 or up != gate or down != (gate[0], gate[2], gate[1]):
        raise _mismatch("gate, up, down", (gate, up, down), "[E, f, d], [E, f, d], [E, d, f]")


@functools.cache
def _check_heads(queries: Shape, keys: Shape, memory: Shape | None) -> None:
    if len(queries) != 2 or len(keys) != 2 or queries[1] != keys[1] or queries[0] % keys[0]:
        raise _mismatch("q, k", (queries, keys), "[H, D] and [G, D] with G dividing H")
    if memory is not None and tuple(memory) != keys:
        raise InvalidParameter("k", f"has heads of shape {keys}, but the cache holds {tuple(memory)}")


def _mismatch(name: str, shape: object, expected: str) -> InvalidParameter:
    shape = tuple(shape) if isinstance(shape, torch.Size) else shape
    return InvalidParameter(name, f"has shape {shape}, expected {expected}")
