"""What of a model fits on a machine, how fast it will be, and what to change: before anything is loaded.

    sizes = ModelSizes.count(published_spec("mixtral-8x7b"))
    report = plan_model(sizes, parse("2xH100-80GB"), Wish(context=32768))
    print("\n".join(text.lines(report)))

The counts come from the real module on the meta device (``model_sizes``), the speeds from ``speed``. A report has only
plain values, so that it can be written as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moesaic import models
from moesaic.errors import InvalidParameter
from moesaic.hardware import Machine
from moesaic.load_options import CACHE_DTYPES
from moesaic.model_sizes import ModelSizes, Weights
from moesaic.model_spec import PACKED, ModelSpec
from moesaic.planner.speed import Speed, estimate
from moesaic.published import configuration

CONTEXTS = (8192, 32768, 65536)
"""Contexts for which the largest batch is counted."""
DEFAULT_CONTEXT = 8192
MANY = 64
"""Answers at the same time beyond which the speed of all together is not estimated: the engine's default limit."""
STORED = "as stored"
"""Name of the row of the checkpoint's own formats."""

LEAST_BITS, SLOW_BITS = 3.0, 4.0
"""Bits of a weight below which no format is recommended for its speed, and on machines slower than reading."""

PROCESS_BYTES = 245_000_000
"""Main memory of the interpreter with its libraries."""
CARD_PROCESS_BYTES = 700_000_000
"""Memory of a card that CUDA, its libraries and fragmentation take."""


@dataclass(frozen=True)
class Wish:
    """What the model is wanted for.

    Attributes:
        context: tokens of a prompt and its answer; None: 8,192, or the model's maximum if that is less.
        batch: answers at the same time, each of which has a whole context in the cache.
        formats: formats to compare, as ``models.named`` reads them; empty: the checkpoint's own and all presets.
        cache_dtype: dtype of the key/value cache; auto is that of the activations.

    Raises:
        InvalidParameter: a value is unknown or out of range.
    """

    context: int | None = None
    batch: int = 1
    formats: tuple[str, ...] = ()
    cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InvalidParameter("batch", f"is {self.batch}, expected at least 1")
        if self.cache_dtype not in CACHE_DTYPES:
            raise InvalidParameter("kv_cache_dtype", f"is {self.cache_dtype!r}, expected {', '.join(CACHE_DTYPES)}")
        for text in self.formats:
            if text != STORED:
                models.named(text)


@dataclass(frozen=True)
class Row:
    """One format on the machine.

    Attributes:
        format: name of the format, or ``STORED``.
        bits: mean bits of a weight, scales included.
        weight_bytes: bytes of the weights.
        cache_bytes: bytes of the key/value cache of ``batch`` contexts.
        workspace_bytes: bytes of the process and of a step.
        cards: cards that the model is divided over; 0: the processor computes.
        experts_on_host: whether the experts stay in main memory and the processor computes them.
        mapped: whether the weights stay in their file and are mapped.
        fits: whether all of it fits.
        batches: answers of a whole context that fit at the same time, by context.
        one: speed of one answer.
        together: speed of the asked batch, or of as many answers as fit, at most ``MANY``; None if nothing fits.
    """

    format: str
    bits: float
    weight_bytes: int
    cache_bytes: int
    workspace_bytes: int
    cards: int
    experts_on_host: bool
    mapped: bool
    fits: bool
    batches: dict[int, int]
    one: Speed
    together: Speed | None

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return self.weight_bytes + self.cache_bytes + self.workspace_bytes


@dataclass(frozen=True)
class Report:
    """The plan of a model for a machine.

    Attributes:
        model: name of the model.
        parameters: parameters of all experts together.
        active_parameters: parameters that one token is multiplied by.
        max_length: maximum tokens of a sequence.
        machine: the machine; ``measured`` says whether its speeds were measured.
        memory_bytes: bytes of the memory that the model is computed from.
        context: tokens of a prompt and its answer.
        batch: answers at the same time.
        cache_dtype: dtype of the key/value cache.
        shards: numbers of cards that the model can be divided over.
        rows: one for each format.
        advice: sentences on what to change.
        chosen: format of the row that is recommended; None if none fits.
    """

    model: str
    parameters: int
    active_parameters: int
    max_length: int
    machine: Machine
    memory_bytes: int
    context: int
    batch: int
    cache_dtype: str
    shards: tuple[int, ...]
    rows: tuple[Row, ...]
    advice: tuple[str, ...] = field(default=())
    chosen: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as values that JSON has."""
        return asdict(self)


def published_spec(name: str) -> ModelSpec:
    """Return the description of a published model in bfloat16.

    Raises:
        InvalidParameter: there is no such model.
    """
    plain = models.choose("bfloat16", "bfloat16")
    return ModelSpec(Path(name), "published", configuration(name), {}, torch.bfloat16, plain)


def plan_model(sizes: ModelSizes, machine: Machine, wish: Wish) -> Report:
    """Return what of a model fits on a machine, and how fast it will be.

    Raises:
        InvalidParameter: the context is longer than the model supports.
    """
    spec = sizes.spec
    longest = sizes.shape.max_length
    context = wish.context or min(DEFAULT_CONTEXT, longest)
    if not 1 < context <= longest:
        raise InvalidParameter("context", f"is {context}, but the model supports 2 to {longest} tokens")
    rows = tuple(_row(sizes, machine, replace(wish, context=context), name) for name in _names(spec, wish))
    return Report(
        model=spec.path.name,
        parameters=sizes.parameters,
        active_parameters=sizes.active_parameters,
        max_length=longest,
        machine=machine,
        memory_bytes=machine.memory_bytes,
        context=context,
        batch=wish.batch,
        cache_dtype=wish.cache_dtype,
        shards=sizes.shards(),
        rows=rows,
        advice=tuple(_advice(sizes, machine, replace(wish, context=context), rows)),
        chosen=_recommended([row for row in rows if row.fits]),
    )


def _recommended(fitting: Sequence[Row]) -> str | None:
    """Return the format to recommend among rows that fit, those with most bits first; None if there are none.

    It is the first that answers as fast as people read and keeps at least ``LEAST_BITS``. If none does both, it is the
    smallest of those with ``SLOW_BITS``, or else the one with most bits.
    """
    readable = [row for row in fitting if row.one.reading != "slower" and row.bits >= LEAST_BITS]
    dense = [row for row in fitting if row.bits >= SLOW_BITS]
    found = readable[:1] or dense[-1:] or fitting[:1]
    return found[0].format if found else None


def _names(spec: ModelSpec, wish: Wish) -> Sequence[str]:
    if wish.formats:
        return wish.formats
    return (STORED,) if spec.quantized else (STORED, *models.PRESETS)


def _row(sizes: ModelSizes, machine: Machine, wish: Wish, name: str) -> Row:
    """Return the row of the format ``name``, with the placement that fits, if one does."""
    weights = sizes.weights(None if name == STORED else name)
    found = [Placement(sizes, weights, machine, wish, experts_on_host=False)]
    if machine.card is not None and machine.host is not None and sizes.experts:
        found.append(Placement(sizes, weights, machine, wish, experts_on_host=True))
    placed = next((placement for placement in found if placement.fits), found[0])
    together = min(MANY, placed.largest_batch(placed.context)) if wish.batch == 1 else wish.batch
    return Row(
        format=name,
        bits=weights.bits,
        weight_bytes=weights.nbytes,
        cache_bytes=placed.cache_bytes(wish.batch, placed.context),
        workspace_bytes=placed.workspace_bytes,
        cards=placed.cards,
        experts_on_host=placed.experts_on_host,
        mapped=placed.mapped,
        fits=placed.fits,
        batches={length: placed.largest_batch(length) for length in CONTEXTS if length <= sizes.shape.max_length},
        one=placed.speed(1),
        together=placed.speed(together) if placed.fits and together > 1 else None,
    )


@dataclass(frozen=True)
class Placement:
    """Weights of a model on a machine, and the memory that is left for the cache.

    Attributes:
        sizes: sizes of the model.
        weights: its weights in the formats that are used.
        machine: the machine.
        wish: what the model is wanted for.
        experts_on_host: whether the experts stay in main memory.
    """

    sizes: ModelSizes
    weights: Weights
    machine: Machine
    wish: Wish
    experts_on_host: bool

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer."""
        assert self.wish.context is not None
        return self.wish.context

    @property
    def cards(self) -> int:
        """The largest number of the machine's cards that the model can be divided over; 0: the processor computes."""
        return max((count for count in self.sizes.shards() if count <= self.machine.cards), default=0)

    @property
    def mapped(self) -> bool:
        """Whether the weights stay in their file."""
        return self.sizes.spec.layout == PACKED and self.machine.card is None

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the process and of a step, on all cards together."""
        if self.cards:
            return self.cards * (CARD_PROCESS_BYTES + self.sizes.workspace_bytes())
        return PROCESS_BYTES + self.sizes.workspace_bytes()

    @property
    def _host_bytes(self) -> int:
        """Bytes of the experts that stay in main memory beside cards."""
        return sum(group.nbytes for group in self.weights.of("experts")) if self.experts_on_host else 0

    @property
    def room(self) -> int:
        """Bytes that are left for the cache; negative if the weights do not fit."""
        card, host = self.machine.card, self.machine.host
        weights = 0 if self.mapped else self.weights.nbytes - self._host_bytes
        if card is None:
            return (host.memory_bytes if host else 0) - weights - self.workspace_bytes
        if self._host_bytes and (host is None or host.memory_bytes < self._host_bytes + PROCESS_BYTES):
            return -1
        return self.cards * card.memory_bytes - weights - self.workspace_bytes

    def cache_bytes(self, batch: int, context: int) -> int:
        """Return the bytes of the cache of ``batch`` sequences of ``context`` tokens."""
        return batch * self.sizes.cache_length(context) * self.sizes.cache_bytes_per_token(self.wish.cache_dtype)

    @property
    def fits(self) -> bool:
        """Whether the weights and the cache of the wish fit."""
        return self.room >= self.cache_bytes(self.wish.batch, self.context)

    def largest_batch(self, context: int) -> int:
        """Return how many sequences of ``context`` tokens fit at the same time."""
        return max(0, self.room // self.cache_bytes(1, context))

    def largest_context(self) -> int:
        """Return the longest context of which the batch of the wish fits."""
        tokens = max(0, self.room // (self.wish.batch * self.cache_bytes(1, 1)))
        longest = self.sizes.shape.max_length
        return longest if self.sizes.cache_length(longest) <= tokens else min(tokens, longest)

    def speed(self, batch: int) -> Speed:
        """Return the speed to expect with ``batch`` answers at the same time."""
        machine = replace(self.machine, cards=self.cards)
        dtype, on_host = self.wish.cache_dtype, self.experts_on_host
        return estimate(
            self.sizes, self.weights, machine, batch, self.context, cache_dtype=dtype, experts_on_host=on_host
        )


def _advice(sizes: ModelSizes, machine: Machine, wish: Wish, rows: Sequence[Row]) -> Iterator[str]:
    """Yield what to change if the model does not fit, or what would make it better."""
    if machine.card is not None and (used := rows[0].cards) < machine.cards:
        legal = ", ".join(map(str, sizes.shards()))
        yield f"{used} of the {machine.cards} cards are used: the model can be divided over {legal}."
    if any(row.experts_on_host for row in rows):
        yield "Experts in main memory beside a card are counted, but this build does not place them there yet."
    if any(row.fits for row in rows):
        return
    weights = min((sizes.weights(None if row.format == STORED else row.format) for row in rows), key=_nbytes)
    smallest = Placement(sizes, weights, machine, wish, experts_on_host=False)
    if (shorter := smallest.largest_context()) >= 512:
        yield f"A context of {shorter:,} tokens fits."
    if wish.cache_dtype != "int8" and replace(smallest, wish=replace(wish, cache_dtype="int8")).fits:
        yield "An int8 key/value cache fits: --kv-cache-dtype int8."
    if wish.batch > 1 and (batch := smallest.largest_batch(smallest.context)):
        yield f"{batch} answers of this context fit at the same time."
    yield from _larger(smallest)
    if machine.card is None and sizes.spec.layout != PACKED:
        yield "A folder made by `moesaic pack` is mapped: it works with less memory, at the speed of the disk."


def _larger(placement: Placement) -> Iterator[str]:
    """Yield how many cards of the same kind, or how much main memory, the model needs."""
    machine = placement.machine
    if machine.card is None:
        needed = placement.weights.nbytes + placement.workspace_bytes
        needed += placement.cache_bytes(placement.wish.batch, placement.context)
        yield f"{needed / 1e9:.0f} GB of free memory are needed."
        return
    for count in placement.sizes.shards():
        if count > machine.cards and replace(placement, machine=replace(machine, cards=count)).fits:
            yield f"{count} cards of this kind fit."
            return


def _nbytes(weights: Weights) -> int:
    return weights.nbytes
