"""Records decode steps, whose shapes repeat, and replays each in one call.

In a decode step, every sequence computes its newest token and its proposals, and samples a token after each of them.
Calling the ops one by one from Python takes longer than the ops of a small model.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesaic import ops
from moesaic.engine.batch import FixedBatch
from moesaic.engine.step import Step
from moesaic.ops import Batch, Cache, Graph

MAX_TOKENS = 64
"""Tokens of a step above which Python's share of the time is small."""
MAX_BYTES = 64 << 20
"""Memory of all graphs together; the ones that were not used for longest are dropped."""
MAX_SEEN = 256
"""Shapes of steps that are remembered, to record those that come again."""


@dataclass(frozen=True)
class Computed:
    """What the model computes in a step of T tokens, of which R have logits."""

    hidden: Tensor  # [T, d]
    finite: Tensor  # [T] bool, whether all values of the hidden state are finite
    logits: Tensor  # [R, V] float32
    finite_logits: Tensor  # [R] bool


class Model(Protocol):
    """The members of ``engine.runner.Model`` that a recording needs."""

    @property
    def max_length(self) -> int: ...

    def __call__(self, batch: Batch) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


def compute(model: Model, batch: Batch, rows: Tensor | None = None) -> Computed:
    """Run the model on ``batch``; ``rows`` are those whose logits are needed, all if it is None."""
    hidden = model(batch)
    if rows is not None and not len(rows):  # a part of a prompt
        logits = hidden.new_empty(0, 0, dtype=torch.float32)
    else:
        logits = model.logits(hidden if rows is None else hidden[rows])
    return Computed(hidden, ops.finite(hidden), logits, ops.finite(logits))


class DecodeGraphs:
    """The graphs of a model's decode steps, one for each list of the numbers of tokens of the runs."""

    def __init__(self, model: Model, cache: Cache, device: torch.device) -> None:
        self._model, self._cache, self._device = model, cache, device
        self._graphs: OrderedDict[tuple[int, ...], tuple[FixedBatch, Graph[Computed]]] = OrderedDict()
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._recordable = device.type == "cpu"

    def run(self, step: Step) -> Computed | None:
        """Return what a decode step computes, which the next step overwrites.

        Return None if ``step`` is no decode step, no step had its shape lately, or the model cannot be recorded.
        """
        counts = tuple(run.count for run in step.runs)
        allowed = self._recordable and getattr(self._model, "recordable", False)
        if not allowed or not step.decodes or sum(counts) > MAX_TOKENS:
            return None
        if counts not in self._graphs:
            return self._record(counts, step) if self._comes_again(counts) else None
        batch, graph = self._graphs[counts]
        self._graphs.move_to_end(counts)
        batch.fill(step)
        graph.replay()
        return graph.result

    def _comes_again(self, counts: tuple[int, ...]) -> bool:
        """Return whether a step had this shape lately. Recording takes longer than running the ops once."""
        known = counts in self._seen
        self._seen[counts] = None
        self._seen.move_to_end(counts)
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return known

    def _record(self, counts: tuple[int, ...], step: Step) -> Computed | None:
        block_size, blocks = self._cache.block_size, len(self._cache.keys[0])
        width = min(blocks, -(-self._model.max_length // block_size))
        fixed = FixedBatch(counts, width, self._cache)
        fixed.fill(step)

        graph = ops.record(self._device, lambda: compute(self._model, fixed.batch))
        if graph is None:
            self._recordable = False
            return None
        self._graphs[counts] = fixed, graph
        while sum(each.nbytes for _, each in self._graphs.values()) > MAX_BYTES and len(self._graphs) > 1:
            self._graphs.popitem(last=False)
        return graph.result
