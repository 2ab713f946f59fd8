"""How fast the CPU kernels are, op by op, beside what the machine can do.

Knows the shapes of a Mixtral layer and what an op reads and computes. Weights are random and
larger than the caches together, and each call uses others than the one before, as in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from moesaic import formats
from moesaic.bench import geometry
from moesaic.bench.limits import Limits, median_of
from moesaic.formats import Packed
from moesaic.ops import native

TOKENS = (1, 2, 4, 8, 16, 64, 512)
SIZE, INNER, EXPERTS, CHOICES = 4096, 14336, 8, 2


@dataclass(frozen=True)
class Row:
    """One op in one format: the median time, and what came of it."""

    op: str
    format: str
    tokens: int
    milliseconds: float
    gb_s: float
    """Bytes of weights read, each once, in a second."""
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
            yield _row("linear", name, count, each, operations, limits, _linears(x, square), seconds)
            ids = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(count)])
            used = len(ids.unique())
            each = used * 3 * format.nbytes((INNER, SIZE))
            operations = 2 * count * CHOICES * 3 * INNER * SIZE

            yield _row("experts", name, count, each, operations, limits, _experts(x, stacks, ids), seconds)


def _random(format: type[Packed], shape: tuple[int, ...]) -> Packed:
    weight = format.empty(shape)
    geometry.fill(weight, geometry.sample(format, shape[-1]))
    return weight


def _linears(x: torch.Tensor, weights: list[Packed]) -> Callable[[], None]:
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        native.linear(x, weights[turn % len(weights)])

    return call


def _experts(x: torch.Tensor, stacks: list[Packed], ids: torch.Tensor) -> Callable[[], None]:
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
    size: int,
    operations: int,
    limits: Limits,
    call: Callable[[], None],
    seconds: float,
) -> Row:
    taken = median_of(call, seconds)
    gb_s, gop_s = size / taken / 1e9, operations / taken / 1e9
    return Row(op, format, tokens, taken * 1e3, gb_s, gop_s, gb_s / limits.read_gb_s, gop_s / limits.gop_s(format))


def line(row: Row) -> str:
    """Return a row as people read it."""
    return (
        f"{row.op:<8}{row.format:<8}{row.tokens:>5} tokens{row.milliseconds:>10.3f} ms"
        f"{row.gb_s:>8.1f} GB/s ({row.read_share:>4.0%}){row.gop_s:>9.0f} GOP/s ({row.peak_share:>4.0%})"
    )


def figures(limits: Limits, rows: list[Row]) -> dict[str, object]:
    """Return everything for docs/results."""
    return {"limits": asdict(limits), "isa": native.instruction_set(), "rows": [asdict(row) for row in rows]}
