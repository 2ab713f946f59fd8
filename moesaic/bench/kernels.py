"""How fast the CPU kernels are, op by op, beside what the machine can do.

Knows the shapes of a Mixtral layer and what an op reads and computes. Weights, keys and values are
random and larger than the caches together, and each call uses others than the one before, as in a model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from moesaic import formats, ops
from moesaic.bench import geometry
from moesaic.bench.limits import Limits, median_of
from moesaic.formats import Packed
from moesaic.ops import native

TOKENS = (1, 2, 4, 8, 16, 64, 512)
SIZE, INNER, EXPERTS, CHOICES = 4096, 14336, 8, 2
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
CACHES = (torch.bfloat16, torch.int8)
DECODED = tuple((sequences, context) for context in (2048, 8192) for sequences in (1, 4, 16))
PROMPTS = (512, 2048)
BLOCK = 16
VOCABULARY = 32000
STREAMED = 256 << 20
"""Bytes of keys and values that calls take turns with."""


@dataclass(frozen=True)
class Row:
    """One op in one format: the median time, and what came of it."""

    op: str
    format: str
    """Of the weights, of the cache, or of the activations, whichever the op reads most of."""
    tokens: int
    context: int
    """Places of the cache that each token's sequence has; 0: the op has to do with none."""
    milliseconds: float
    gb_s: float
    """Bytes of weights, of the cache or of activations read, each once, in a second."""
    gop_s: float
    read_share: float
    """Of the best read bandwidth measured."""
    peak_share: float
    """Of the fastest multiplication measured, of bytes or of bfloat16."""


def measure(limits: Limits, names: list[str], tokens: tuple[int, ...] = TOKENS, seconds: float = 1.0) -> Iterator[Row]:
    """Yield a row for each op, format and number of tokens."""
    for name in names:
        format = formats.load(name)
        square = [_random(format, (SIZE, SIZE)) for _ in range(16)]
        stacks = [_random(format, (EXPERTS, *shape)) for shape in ((INNER, SIZE), (INNER, SIZE), (SIZE, INNER))]
        for count in tokens:
            x = torch.randn(count, SIZE, dtype=torch.bfloat16)
            each = format.nbytes((SIZE, SIZE))
            operations = 2 * count * SIZE * SIZE
            yield _row("linear", name, count, 0, each, operations, limits, _linears(x, square), seconds)
            ids = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(count)])
            used = len(ids.unique())
            each = used * 3 * format.nbytes((INNER, SIZE))
            operations = 2 * count * CHOICES * 3 * INNER * SIZE

            yield _row("experts", name, count, 0, each, operations, limits, _experts(x, stacks, ids), seconds)


def measure_others(limits: Limits, seconds: float = 1.0) -> Iterator[Row]:
    """Yield a row for each op without weights, cache dtype and size."""
    for count in (1, 16, 512):
        x, each = torch.randn(count, SIZE, dtype=torch.bfloat16), 2 * count * SIZE
        norm = functools.partial(native.rms_norm, x, torch.ones(SIZE), 1e-5)
        yield _row("rms_norm", "bfloat16", count, 0, each, 4 * count * SIZE, limits, norm, seconds)
        heads, angles = x.view(count, HEADS, HEAD_SIZE), torch.randn(count, HEAD_SIZE // 2)
        turn = functools.partial(native.rope, heads, angles.cos(), angles.sin())
        yield _row("rope", "bfloat16", count, 0, each, 3 * count * SIZE, limits, turn, seconds)
    for count in (1, 16):
        logits, each = 3 * torch.randn(count, VOCABULARY), 4 * count * VOCABULARY
        cut = functools.partial(native.truncate, logits, torch.tensor([[0.7, 40, 0.9, 0.0, 1.0]] * count))
        yield _row("truncate", "float32", count, 0, each, 2 * count * VOCABULARY, limits, cut, seconds)
        pick = functools.partial(native.draw, logits, torch.rand(count, dtype=torch.float64))
        yield _row("draw", "float32", count, 0, each, 2 * count * VOCABULARY, limits, pick, seconds)
    for dtype in CACHES:
        place = ops.Cache.bytes_per_token([(KV_HEADS, HEAD_SIZE)], dtype)
        for sequences, context in DECODED:
            each, operations = sequences * context * place, 4 * sequences * context * SIZE
            call = _attention([context] * sequences, 1, dtype)
            yield _row("attention", _name(dtype), sequences, context, each, operations, limits, call, seconds)
        for length in PROMPTS:
            operations = 2 * length * (length + 1) * SIZE
            call = _attention([length], length, dtype)
            yield _row("attention", _name(dtype), length, length, length * place, operations, limits, call, seconds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(lengths: list[int], last: int, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call for the ``last`` tokens of sequences of these lengths, in scattered blocks of a full cache."""
    needed = [-(-length // BLOCK) for length in lengths]
    shape = (KV_HEADS, HEAD_SIZE)
    layers = max(2, STREAMED // (sum(lengths) * ops.Cache.bytes_per_token([shape], dtype)))
    cache = ops.Cache.zeros([shape] * layers, sum(needed), BLOCK, dtype)
    for part in cache.tensors():
        if part.dtype == torch.int8:
            part.random_(-127, 128)
        else:
            part.normal_()
    tables = torch.full((len(lengths), max(needed)), -1)
    for table, blocks in zip(tables, torch.randperm(sum(needed)).split(needed), strict=True):
        table[: len(blocks)] = blocks
    places = [torch.arange(length - last, length) for length in lengths]
    batch = ops.Batch(
        tokens=torch.zeros(len(lengths) * last, dtype=torch.int64),
        positions=torch.cat(places),
        starts=tuple(range(0, len(lengths) * last + 1, last)),
        lengths=tuple(lengths),
        slots=torch.cat([table[at // BLOCK] * BLOCK + at % BLOCK for table, at in zip(tables, places, strict=True)]),
        tables=tables,
        outputs=torch.arange(0),
        cache=cache,
    )
    q, k, v = (torch.randn(len(lengths) * last, n, HEAD_SIZE).bfloat16() for n in (HEADS, KV_HEADS, KV_HEADS))
    turns = itertools.cycle(range(layers))

    def call() -> None:
        native.attention(q, k, v, batch, next(turns), None)

    return call


def _random(format: type[Packed], shape: tuple[int, ...]) -> Packed:
    weight = format.empty(shape)
    geometry.fill(weight, geometry.sample(format, shape[-1]))
    return weight


def _linears(x: torch.Tensor, weights: list[Packed]) -> Callable[[], object]:
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        native.linear(x, weights[turn % len(weights)])

    return call


def _experts(x: torch.Tensor, stacks: list[Packed], ids: torch.Tensor) -> Callable[[], object]:
    scores = torch.rand(ids.shape)
    gate, up, down = stacks

    def call() -> None:
        # Other experts each time, so that none is in a cache from the call before.
        native.experts(x, gate, up, down, (ids + int(torch.randint(EXPERTS, ()))) % EXPERTS, scores)

    return call


def _row(
    op: str,
    format: str,
    tokens: int,
    context: int,
    size: int,
    operations: int,
    limits: Limits,
    call: Callable[[], object],
    seconds: float,
) -> Row:
    taken = median_of(call, seconds)
    gb_s, gop_s = size / taken / 1e9, operations / taken / 1e9
    return Row(
        op, format, tokens, context, taken * 1e3, gb_s, gop_s, gb_s / limits.read_gb_s, gop_s / limits.gop_s(format)
    )


def line(row: Row) -> str:
    """Return a row as people read it."""
    context = f" at {row.context}" if row.context else ""
    return (
        f"{row.op:<10}{row.format:<9}{row.tokens:>5} tokens{context:<8}{row.milliseconds:>10.3f} ms"
        f"{row.gb_s:>8.1f} GB/s ({row.read_share:>4.0%}){row.gop_s:>9.0f} GOP/s ({row.peak_share:>4.0%})"
    )


def figures(limits: Limits, rows: list[Row]) -> dict[str, object]:
    """Return everything for docs/results."""
    return {"limits": asdict(limits), "isa": native.instruction_set(), "rows": [asdict(row) for row in rows]}
