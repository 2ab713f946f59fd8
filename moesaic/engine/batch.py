"""Converts a Step of the scheduler to the tensors of a Batch.

This module computes cache slots from the block tables of sequences. A cache slot is the index of a token's key and
value in the cache. The module does not depend on models or sampling.

Legend: T tokens of the step, S sequences, B block size.
"""

from __future__ import annotations

import torch

from moesaic.engine.step import Run, Step
from moesaic.ops import Batch, Cache


def assemble(step: Step, cache: Cache, device: torch.device) -> Batch:
    """Return the input of the model for ``step`` on ``cache``, with its tensors on ``device``.

    ``outputs`` of the result has the rows of the last token of each run that samples a token, and of its proposals.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    outputs: list[int] = []
    starts, lengths = [0], []
    for run in step.runs:
        run_positions = range(run.sequence.cached, run.sequence.cached + run.count)
        tokens += run.sequence.ids[run_positions.start : run_positions.stop]
        tokens += run.proposals
        positions += run_positions
        slots += _slots(run, run_positions, cache.block_size)
        starts.append(len(tokens))
        lengths.append(run_positions.stop)
        if run.samples:
            outputs += range(len(tokens) - 1 - len(run.proposals), len(tokens))
    width = max(len(run.sequence.table) for run in step.runs)
    tables = [run.sequence.table + [-1] * (width - len(run.sequence.table)) for run in step.runs]

    def tensor(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        tokens=tensor(tokens),
        positions=tensor(positions),
        starts=tuple(starts),
        lengths=tuple(lengths),
        slots=tensor(slots),
        tables=tensor(tables),
        outputs=tensor(outputs),
        cache=cache,
    )


def _slots(run: Run, positions: range, size: int) -> list[int]:
    """Return the cache slot of each of ``positions`` of the run's sequence; a block has ``size`` slots."""
    table = run.sequence.table
    return [table[position // size] * size + position % size for position in positions]
