"""What a model and the sampler may call: the ops, the Batch they work on, and the Group they are split over.

Knows the signature, the shapes and the meaning of every op, and chooses the backend that runs
it: one file = one backend, ``reference`` always the last resort. Does not know any model.

A backend file defines any subset of ``OPS`` and

    why_not(op, device, format) -> str | None      None: I run this; else why I do not

Legend: T tokens of this step, S sequences, R rows of logits, V vocabulary, d hidden size, f intermediate size,
E experts, k experts per token, H query heads, G key/value heads, D head size, B block size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor

from moesaic import registry
from moesaic.errors import InvalidParameter
from moesaic.formats import Packed

OPS = ("linear", "experts", "attention", "rms_norm", "rope", "truncate", "draw")


@dataclass(frozen=True)
class Cache:
    """The paged key/value cache: block b of layer l is ``keys[l][b]``.

    Memory is handed out in blocks of B token places; place i of block b is slot b * B + i.

    An int8 cache holds what each token's key and value are rounded to, head by head: x = scale * q with
    q = round(x * 127 / max |x|), to nearest, ties to even, and scale = max |x| / 127 in float32. Where max |x|
    is at most 2^-100, q is 0. Where something is not finite, q is 0 and the scale NaN: all of it is NaN
    when it is read again. float32 takes two bytes a head more than bfloat16 would, 1.5 % at D = 128,
    but its rounding cannot push q beyond 127, nor its range end before that of x.
    """

    keys: Sequence[Tensor]  # per layer [blocks, B, G, D]
    values: Sequence[Tensor]  # per layer [blocks, B, G, D]
    key_scales: Sequence[Tensor] = ()  # of an int8 cache, per layer [blocks, B, G] float32
    value_scales: Sequence[Tensor] = ()  # likewise

    @classmethod
    def zeros(
        cls,
        shapes: Sequence[tuple[int, int]],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Cache:
        """Return a cache of zeros for layers of these (G, D); ``dtype`` is a float dtype or int8."""

        def memory(*sizes: tuple[int, ...], dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            return tuple(torch.zeros((blocks, block_size, *size), dtype=dtype, device=device) for size in sizes)

        if dtype != torch.int8:
            return cls(memory(*shapes), memory(*shapes))
        heads = [(count,) for count, _ in shapes]
        scales = [memory(*heads, dtype=torch.float32) for _ in range(2)]
        return cls(memory(*shapes), memory(*shapes), *scales)

    @staticmethod
    def bytes_per_token(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
        """Return what a token's keys and values take in a cache of ``zeros``."""
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        return sum(2 * heads * (size * dtype.itemsize + scale) for heads, size in shapes)

    def tensors(self) -> Sequence[Tensor]:
        """Return all that the cache consists of; the first axis of each counts blocks."""
        return (*self.keys, *self.values, *self.key_scales, *self.value_scales)

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]


@dataclass(frozen=True)
class Batch:
    """One step of the engine as flat tensors: "run tokens [cached : cached + n] of these sequences".

    Tokens of one sequence are consecutive, sequences follow one another, nothing is padded.
    With ``cache`` None the step stands alone: every sequence is whole and starts at position 0
    (training, scoring), and slots and tables are empty.
    """

    tokens: Tensor  # [T] int64, token ids
    positions: Tensor  # [T] int64, place of each token in its sequence
    starts: tuple[int, ...]  # [S + 1], sequence s owns tokens starts[s] : starts[s + 1]
    lengths: tuple[int, ...]  # [S], tokens of each sequence after this step, cached ones included
    slots: Tensor  # [T] int64, cache slot that each token's key and value go to
    tables: Tensor  # [S, blocks] int64, cache blocks of each sequence in order; -1: given back or unused
    outputs: Tensor  # [R] int64, the rows whose logits are wanted
    cache: Cache | None

    @functools.cached_property
    def offsets(self) -> Tensor:
        """``starts`` as a tensor [S + 1] int64, which every layer's kernel reads."""
        return torch.tensor(self.starts, dtype=torch.int64, device=self.tokens.device)

    @classmethod
    def whole(cls, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
        """Return a batch of whole sequences without a cache, every row wanted."""
        lengths = tuple(len(ids) for ids in sequences)
        starts = (0, *(sum(lengths[: i + 1]) for i in range(len(lengths))))
        positions = [place for length in lengths for place in range(length)]
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        return cls(
            tokens=torch.tensor([id for ids in sequences for id in ids], dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            starts=starts,
            lengths=lengths,
            slots=nothing,
            tables=nothing.reshape(0, 0),
            outputs=torch.arange(starts[-1], device=device),
            cache=None,
        )


@dataclass(frozen=True)
class Group:
    """The ranks that hold one model together; a group of one by default.

    A layer holds shard ``rank`` of ``size`` and calls ``sum`` or ``gather`` where the parts meet
    (Megatron-LM, arXiv:1909.08053 §3). ``handle`` is the torch process group, None for all ranks.
    """

    rank: int = 0
    size: int = 1
    handle: Any = None

    def share(self, total: int, what: str) -> slice:
        """Return this rank's part of ``total`` things.

        Raises:
            InvalidParameter: the group's size does not divide ``total``.
        """
        if total % self.size:
            raise InvalidParameter("group size", f"{self.size} ranks do not divide {total} {what}")
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's ``x``."""
        if self.size > 1:
            torch.distributed.all_reduce(x, group=self.handle)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's ``x`` side by side along the last axis."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.handle)
        return torch.cat(parts, dim=-1)


def linear(x: Tensor, weight: Packed) -> Tensor:
    """Return x [T, in] times weight [out, in] transposed: [T, out], in x's dtype."""
    return cast(Tensor, _pick("linear", x.device, weight.name, _trained(x, weight))(x, weight))


def experts(x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor) -> Tensor:
    """Return the score-weighted sum of the chosen experts' SwiGLU for each token: [T, d].

    y[t] = sum over j of scores[t, j] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])), e = ids[t, j]

    Args:
        x: [T, d].
        gate, up: [E, f, d]; Mixtral's w1 and w3.
        down: [E, d, f]; Mixtral's w2.
        ids: [T, k] int64, the chosen experts, distinct within a row.
        scores: [T, k] float32, their weights; routing itself is the model's affair.
    """
    op = _pick("experts", x.device, gate.name, _trained(x, gate, up, down, scores))
    return cast(Tensor, op(x, gate, up, down, ids, scores))


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, window: int | None) -> Tensor:
    """Store k and v in the cache, then let each query see its own sequence up to itself: [T, H, D].

    Scores are scaled by 1 / sqrt(D). A token at position p sees positions max(0, p - window + 1) .. p;
    without a window, 0 .. p. Cache places outside a sequence may hold anything, NaN included.

    Args:
        q: [T, H, D].
        k, v: [T, G, D] with G dividing H; query head h reads key head h // (H / G)
            (GQA, arXiv:2305.13245).
        layer: which layer's cache.
        window: how many positions a token sees, itself included; None: all.
    """
    return cast(Tensor, _pick("attention", q.device, None, _trained(q, k, v))(q, k, v, batch, layer, window))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, in x's dtype.

    RMSNorm, arXiv:1910.07467.
    """
    return cast(Tensor, _pick("rms_norm", x.device, None, _trained(x, weight))(x, weight, eps))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x[i], x[i + D/2]) of x [T, heads, D] by the angles whose cos and sin are [T, D/2].

    RoPE, arXiv:2104.09864, in Hugging Face's half-split order; computed in float32, in x's dtype.
    """
    return cast(Tensor, _pick("rope", x.device, None, _trained(x))(x, cos, sin))


def truncate(logits: Tensor, settings: Tensor) -> Tensor:
    """Return logits [R, V] after temperature and truncations: float32, -inf where nothing is left.

    x = (logits - max) / temperature; then, each by the softmax of what the one before it has left: the k
    largest and what equals the last of them; the smallest set of likeliest tokens whose mass reaches p, and what
    equals the last of them (nucleus sampling, arXiv:1904.09751); tokens at least min-p times as likely
    as the likeliest (arXiv:2407.01082); the tokens whose surprise is nearest to the expected one, up to
    mass typical-p (arXiv:2202.00666).

    Args:
        logits: [R, V] float32; -inf where a token is forbidden, at least one of each row finite.
        settings: [R, 5] float32: temperature > 0, k (0: all), p, min-p (0: off), typical-p; p and typical-p
            of 1 are off.
    """
    return cast(Tensor, _pick("truncate", logits.device, None, False)(logits, settings))


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Return one id for each row of logits [R, V] float32: [R] int64.

    The tokens of a row share out [0, 1) in the order of their ids, each as much as softmax gives it; the
    answer is the one that numbers [R], float64 in [0, 1), falls on.
    """
    return cast(Tensor, _pick("draw", logits.device, None, False)(logits, numbers))


@functools.cache
def backends() -> tuple[str, ...]:
    """Return the backends in the order they are asked: ``reference`` last, the rest by name."""
    return tuple(sorted(registry.names("ops"), key=lambda name: (name == "reference", name)))


def explain(op: str, device: str, format: str | None) -> dict[str, str | None]:
    """Return, for each backend in order, None if it can run this and else why it does not."""
    return {name: registry.load("ops", name).why_not(op, device, format) for name in backends()}


def chosen(op: str, device: str, format: str | None) -> str:
    """Return the name of the backend that runs this, where no gradient is wanted."""
    return next(name for name, why in explain(op, device, format).items() if why is None)


def _trained(*inputs: Tensor | Packed) -> bool:
    """Return whether a gradient is wanted for any of the inputs."""
    if not torch.is_grad_enabled():
        return False
    parts = [part for x in inputs for part in (x.parts().values() if isinstance(x, Packed) else (x,))]
    return any(part.requires_grad for part in parts)


@functools.cache
def _pick(op: str, device: torch.device, format: str | None, trained: bool) -> Callable[..., Any]:
    """Return the first willing backend's function; a pure function of its arguments, hence cached."""
    if trained:  # only the reference is differentiable
        return cast(Callable[..., Any], getattr(registry.load("ops", "reference"), op))
    return cast(Callable[..., Any], getattr(registry.load("ops", chosen(op, device.type, format)), op))
