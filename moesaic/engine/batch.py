"""A scheduler's Step as the tensors of a Batch.

Knows how sequences' blocks become cache slots. Does not know models or sampling.

Legend: T tokens of the step, S sequences, B block size.
"""

from __future__ import annotations

import torch

from moesaic.engine.scheduler import Run, Step
from moesaic.ops import Batch, Cache


def assemble(step: Step, cache: Cache, device: torch.device) -> Batch:
    """Return the Batch that runs ``step`` on ``cache``; its outputs are the rows that give a next token."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, lengths, outputs = [0], [], []
    for run in step.runs:
        places = range(run.sequence.cached, run.sequence.cached + run.count)
        tokens += run.sequence.ids[places.start : places.stop]
        positions += places
        slots += _slots(run, places, cache.block_size)
        starts.append(len(tokens))
        lengths.append(places.stop)
        if run.samples:
            outputs.append(len(tokens) - 1)
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


def _slots(run: Run, places: range, size: int) -> list[int]:
    """Return the cache slot of each place: its block's first slot plus its place in the block."""
    table = run.sequence.table
    return [table[place // size] * size + place % size for place in places]
