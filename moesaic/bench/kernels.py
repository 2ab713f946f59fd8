"""Speed of the CPU kernels, op by op, compared with the limits of the machine.

The shapes are those of a Mixtral layer. Weights, keys and values are random and together larger than the CPU's caches,
and successive calls use different ones, as in a model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from moesaic import formats, ops
from moesaic.bench import geometry
from moesaic.formats import Packed, WeightFormat
from moesaic.formats._tiles import Tiled
from moesaic.hardware.limits import Limits, median_of
from moesaic.ops import native

TOKEN_COUNTS = (1, 2, 4, 8, 16, 64, 512)
HIDDEN, INNER, EXPERTS, EXPERTS_PER_TOKEN = 4096, 14336, 8, 2
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
CACHE_DTYPES = (torch.bfloat16, torch.int8)
DECODE_CASES = tuple((sequences, context) for context in (2048, 8192) for sequences in (1, 4, 16))
PROMPT_LENGTHS = (512, 2048)
BLOCK_SIZE = 16
VOCABULARY = 32000
CACHE_BYTES = 256 << 20
"""Bytes of the caches that successive calls of attention use in turn; more than the CPU's caches hold."""


@dataclass(frozen=True)
class Row:
    """Median time of one op in one format, and the speeds that follow from it."""

    op: str
    format: str
    """Format of the weights, the cache or the activations, whichever the op reads most."""
    tokens: int
    """Number of tokens; 0 for ops that quantize weights."""
    context: int
    """Length of each token's sequence in the cache; 0 for ops that do not read the cache."""
    milliseconds: float
    gb_s: float
    """Bytes of weights, cache or activations that are read, each counted once, per nanosecond."""
    gop_s: float
    read_share: float
    """``gb_s`` as a fraction of the measured memory bandwidth."""
    peak_share: float
    """``gop_s`` as a fraction of the fastest measured multiplication, of bytes or of bfloat16."""


def measure(
    limits: Limits, names: list[str], tokens: tuple[int, ...] = TOKEN_COUNTS, seconds: float = 1.0
) -> Iterator[Row]:
    """Yield a row for each op with weights, each format and each number of tokens.

    Args:
        limits: limits of the machine, to compare with.
        names: weight formats.
        tokens: numbers of tokens.
        seconds: duration of the measurement of a row.
    """
    for name in names:
        weight_format = formats.load(name)
        square = [_random(weight_format, (HIDDEN, HIDDEN)) for _ in range(16)]
        stacks = [
            _random(weight_format, (EXPERTS, *shape)) for shape in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        ]
        for count in tokens:
            x = torch.randn(count, HIDDEN, dtype=torch.bfloat16)
            size = weight_format.nbytes((HIDDEN, HIDDEN))
            operations = 2 * count * HIDDEN * HIDDEN
            yield _row("linear", name, count, 0, size, operations, limits, _linears(x, square), seconds)
            ids = torch.stack([torch.randperm(EXPERTS)[:EXPERTS_PER_TOKEN] for _ in range(count)])
            used = len(ids.unique())
            size = used * 3 * weight_format.nbytes((INNER, HIDDEN))
            operations = 2 * count * EXPERTS_PER_TOKEN * 3 * INNER * HIDDEN
            yield _row("experts", name, count, 0, size, operations, limits, _experts(x, stacks, ids), seconds)
        if isinstance(weight_format, Tiled):
            yield from _quantizing(limits, weight_format, seconds)


def _quantizing(limits: Limits, weight_format: Tiled, seconds: float) -> Iterator[Row]:
    """Yield a row for rounding a matrix to nearest, and one for error feedback; an operation is one weight."""
    name, plain = weight_format.name, torch.randn(HIDDEN, HIDDEN)
    weight = weight_format.empty((HIDDEN, HIDDEN))
    nearest = functools.partial(native.quantize, weight, plain)
    yield _row("quantize", name, 0, 0, plain.nbytes, plain.numel(), limits, nearest, seconds)
    if ops.is_fed_back(weight_format):
        call = functools.partial(native.quantize_with_feedback, weight, plain, torch.eye(HIDDEN))
        yield _row("feedback", name, 0, 0, plain.nbytes, plain.numel(), limits, call, seconds)


def measure_others(limits: Limits, seconds: float = 1.0) -> Iterator[Row]:
    """Yield a row for each op without weights, at several sizes and cache data types; arguments as for ``measure``."""
    for count in (1, 16, 512):
        x, size = torch.randn(count, HIDDEN, dtype=torch.bfloat16), 2 * count * HIDDEN
        norm = functools.partial(native.rms_norm, x, torch.ones(HIDDEN), 1e-5)
        yield _row("rms_norm", "bfloat16", count, 0, size, 4 * count * HIDDEN, limits, norm, seconds)
        heads, angles = x.view(count, HEADS, HEAD_SIZE), torch.randn(count, HEAD_SIZE // 2)
        rotate = functools.partial(native.rope, heads, angles.cos(), angles.sin())
        yield _row("rope", "bfloat16", count, 0, size, 3 * count * HIDDEN, limits, rotate, seconds)
    for count in (1, 16):
        logits, size = 3 * torch.randn(count, VOCABULARY), 4 * count * VOCABULARY
        truncate = functools.partial(native.truncate, logits, torch.tensor([[0.7, 40, 0.9, 0.0, 1.0]] * count))
        yield _row("truncate", "float32", count, 0, size, 2 * count * VOCABULARY, limits, truncate, seconds)
        draw = functools.partial(native.draw, logits, torch.rand(count, dtype=torch.float64))
        yield _row("draw", "float32", count, 0, size, 2 * count * VOCABULARY, limits, draw, seconds)
    for dtype in CACHE_DTYPES:
        token_bytes = ops.Cache.bytes_per_token([(KV_HEADS, HEAD_SIZE)], dtype)
        for sequences, context in DECODE_CASES:
            size, operations = sequences * context * token_bytes, 4 * sequences * context * HIDDEN
            call = _attention([context] * sequences, 1, dtype)
            yield _row("attention", _name(dtype), sequences, context, size, operations, limits, call, seconds)
        for length in PROMPT_LENGTHS:
            operations = 2 * length * (length + 1) * HIDDEN
            call = _attention([length], length, dtype)
            yield _row(
                "attention", _name(dtype), length, length, length * token_bytes, operations, limits, call, seconds
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(lengths: list[int], last: int, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that computes attention for the ``last`` tokens of each sequence of these ``lengths``.

    The blocks of a sequence are scattered over the cache. Each call uses another layer's cache.
    """
    needed = [-(-length // BLOCK_SIZE) for length in lengths]
    shape = (KV_HEADS, HEAD_SIZE)
    layers = max(2, CACHE_BYTES // (sum(lengths) * ops.Cache.bytes_per_token([shape], dtype)))
    cache = ops.Cache.zeros([shape] * layers, sum(needed), BLOCK_SIZE, dtype)
    for part in cache.tensors():
        if part.dtype == torch.int8:
            part.random_(-127, 128)
        else:
            part.normal_()
    tables = torch.full((len(lengths), max(needed)), -1)
    for table, blocks in zip(tables, torch.randperm(sum(needed)).split(needed), strict=True):
        table[: len(blocks)] = blocks
    positions = [torch.arange(length - last, length) for length in lengths]
    batch = ops.Batch(
        tokens=torch.zeros(len(lengths) * last, dtype=torch.int64),
        positions=torch.cat(positions),
        starts=tuple(range(0, len(lengths) * last + 1, last)),
        lengths=tuple(lengths),
        slots=torch.cat(
            [
                table[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE
                for table, index in zip(tables, positions, strict=True)
            ]
        ),
        tables=tables,
        outputs=torch.arange(0),
        cache=cache,
    )
    q, k, v = (torch.randn(len(lengths) * last, n, HEAD_SIZE).bfloat16() for n in (HEADS, KV_HEADS, KV_HEADS))
    layer_numbers = itertools.cycle(range(layers))

    def call() -> None:
        native.attention(q, k, v, batch, next(layer_numbers), None)

    return call


def _random(weight_format: WeightFormat, shape: tuple[int, ...]) -> Packed:
    weight = weight_format.empty(shape)
    geometry.fill(weight, geometry.sample(weight_format, shape[-1]))
    return weight


def _linears(x: torch.Tensor, weights: list[Packed]) -> Callable[[], object]:
    number = 0

    def call() -> None:
        nonlocal number
        number += 1
        native.linear(x, weights[number % len(weights)])

    return call


def _experts(x: torch.Tensor, stacks: list[Packed], ids: torch.Tensor) -> Callable[[], object]:
    scores = torch.rand(ids.shape)
    gate, up, down = stacks

    def call() -> None:
        # Each call uses other experts, so that none is in a CPU cache from the previous call.
        native.experts(x, gate, up, down, (ids + int(torch.randint(EXPERTS, ()))) % EXPERTS, scores)

    return call


def _row(
    op: str,
    format_name: str,
    tokens: int,
    context: int,
    size: int,
    operations: int,
    limits: Limits,
    call: Callable[[], object],
    seconds: float,
) -> Row:
    median = median_of(call, seconds)
    gb_s, gop_s = size / median / 1e9, operations / median / 1e9
    read_share, peak_share = gb_s / limits.read_gb_s, gop_s / limits.gop_s(format_name)
    return Row(op, format_name, tokens, context, median * 1e3, gb_s, gop_s, read_share, peak_share)


def line(row: Row) -> str:
    """Return a row as a line of text."""
    context = f" at {row.context}" if row.context else ""
    if not row.tokens:
        return f"{row.op:<10}{row.format:<9}{row.milliseconds:>30.3f} ms{1000 * row.gop_s:>8.0f} million weights/s"
    return (
        f"{row.op:<10}{row.format:<9} {row.tokens:>5} tokens{context:<8}{row.milliseconds:>10.3f} ms"
        f"{row.gb_s:>8.1f} GB/s ({row.read_share:>4.0%}){row.gop_s:>9.0f} GOP/s ({row.peak_share:>4.0%})"
    )


def figures(limits: Limits, rows: list[Row]) -> dict[str, object]:
    """Return the limits and all rows as a dictionary for a results file."""
    return {"limits": asdict(limits), "isa": native.instruction_set(), "rows": [asdict(row) for row in rows]}
