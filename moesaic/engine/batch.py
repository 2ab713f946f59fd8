"""Converts a Step of the scheduler to the tensors of a Batch, new ones or those of an earlier step.

This module computes cache slots from the block tables of sequences. A cache slot is the index of a token's key and
value in the cache. The module does not depend on models or sampling.

Legend: T tokens of the step, S sequences, B block size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.engine.step import Run, Step
from moesaic.ops import Batch, Cache


@dataclass
class _Lists:
    """The numbers of a batch: lists with the names of the tensors of ``Batch``."""

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    tables: list[list[int]]
    outputs: list[int]


def assemble(step: Step, cache: Cache, device: torch.device) -> Batch:
    """Return the input of the model for ``step`` on ``cache``, with its tensors on ``device``.

    ``outputs`` of the result has the rows of the last token of each run that samples a token, and of its proposals.
    """
    lengths = tuple(run.sequence.cached + run.count for run in step.runs)
    lists = {name: _tensor(values, device) for name, values in vars(_flatten(step, cache.block_size)).items()}
    return Batch(starts=step.starts, lengths=lengths, cache=cache, **lists)


class FixedBatch:
    """A batch for steps of one shape, whose tensors keep their place in memory.

    Each run has one token of its sequence, and proposals; a token is sampled after each of them. The tensors are on the
    CPU.
    """

    def __init__(self, counts: Sequence[int], blocks: int, cache: Cache) -> None:
        """``counts`` has the tokens of each run; ``blocks`` is the maximum number of cache blocks of a sequence."""
        self._block_size = cache.block_size
        starts = (0, *itertools.accumulate(counts))
        rows = torch.zeros(3, starts[-1], dtype=torch.int64)
        tables = torch.full((len(counts), blocks), -1, dtype=torch.int64)
        tokens, positions, slots = rows
        self.batch = Batch(
            tokens=tokens,
            positions=positions,
            starts=starts,
            lengths=(0,) * len(counts),  # ops that read it cannot be recorded
            slots=slots,
            tables=tables,
            outputs=torch.arange(starts[-1]),
            cache=cache,
        )
        _ = self.batch.offsets  # makes the tensor now
        # Numpy writes a few numbers ten times as fast as torch makes a tensor of them.
        self._rows, self._tables = rows.numpy(), tables.numpy()

    def fill(self, step: Step) -> None:
        """Overwrite the tensors with those of ``step``."""
        lists = _flatten(step, self._block_size)
        self._rows[:] = lists.tokens, lists.positions, lists.slots
        self._tables[:, : len(lists.tables[0])] = lists.tables


def _flatten(step: Step, block_size: int) -> _Lists:
    lists = _Lists([], [], [], [], [])
    width = max(len(run.sequence.table) for run in step.runs)
    for run in step.runs:
        positions = range(run.sequence.cached, run.sequence.cached + run.count)
        lists.tokens += run.sequence.ids[positions.start : positions.stop]
        lists.tokens += run.proposals
        lists.positions += positions
        lists.slots += _slots(run, positions, block_size)
        lists.tables.append(run.sequence.table + [-1] * (width - len(run.sequence.table)))
        if run.samples:
            lists.outputs += range(len(lists.tokens) - 1 - len(run.proposals), len(lists.tokens))
    return lists


def _tensor(values: list[int] | list[list[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _slots(run: Run, positions: range, size: int) -> list[int]:
    """Return the cache slot of each of ``positions`` of the run's sequence; a block has ``size`` slots."""
    table = run.sequence.table
    return [table[position // size] * size + position % size for position in positions]
