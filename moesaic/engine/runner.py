"""Runs a Step: the model, the check of its numbers, the sampler.

Owns the memory of the cache. Does not decide what runs, and knows no streams.

Legend: T tokens of the step, R rows whose logits are wanted, d hidden size, V vocabulary, G key/value
heads, D head size, B block size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moesaic.engine import masks, sampler
from moesaic.engine.batch import assemble
from moesaic.engine.request import Sequence, Token
from moesaic.engine.scheduler import Outcome, Run, Step
from moesaic.ops import Batch, Cache

SCORED_AT_ONCE = 64
"""Prompt rows whose logits are in memory at a time: all of a long prompt's would take gigabytes."""

UNWRITTEN = -128
"""What a poisoned int8 cache holds under scales of NaN; no key or value is ever rounded to it."""


class Model(Protocol):
    """What the engine asks of a model. ``moesaic.models`` has them; any module with these will do."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int:
        """The most positions."""

    @property
    def window(self) -> int | None:
        """How far back any layer looks, itself included; None if some layer looks back to the start."""

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """(G, D) of each layer."""

    def __call__(self, batch: Batch) -> Tensor:
        """Return hidden states [T, d]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [R, V] of hidden states [R, d]."""


class Runner:
    """A model and its cache of ``blocks`` blocks of ``block_size`` tokens."""

    def __init__(
        self,
        model: Model,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        poison: bool = False,
    ) -> None:
        self.model, self.device = model, device
        self.cache = Cache.zeros(model.cache_shapes, blocks, block_size, dtype, device)
        if poison:
            for part in self.cache.tensors():
                part.fill_(UNWRITTEN if part.dtype == torch.int8 else torch.nan)

    @torch.inference_mode()
    def run(self, step: Step) -> Outcome:
        """Run the model on ``step`` and choose the next tokens."""
        batch = assemble(step, self.cache, self.device)
        hidden = self.model(batch)
        rows = [run.sequence for run in step.runs if run.samples]
        # Between starting the model and looking at what it gave: an accelerator is at work meanwhile.
        allowed, refused = masks.allowed(rows, self.model.vocab_size)
        failed = _broken(hidden, batch.starts, step)
        tokens: dict[Sequence, list[Token]] = {}
        if rows:
            logits = self.model.logits(hidden[batch.outputs])
            failed |= {sequence for sequence, good in zip(rows, _finite(logits).tolist(), strict=True) if not good}
            good = [row for row, sequence in enumerate(rows) if sequence not in failed and sequence not in refused]
            if good:
                chosen = logits if len(good) == len(rows) else logits[good]
                tokens = sampler.sample(chosen, [rows[row] for row in good], allowed)
        scores = {
            run.sequence: self._scores(hidden[begin:], run)
            for run, begin in zip(step.runs, batch.starts, strict=False)
            if run.sequence.scores_prompt and not run.sequence.generated and run.sequence not in failed
        }
        refused = {sequence: error for sequence, error in refused.items() if sequence not in failed}
        return Outcome(tokens, scores, frozenset(failed), refused)

    def _scores(self, hidden: Tensor, run: Run) -> list[Token]:
        """Return the log-probabilities of the prompt's tokens that follow those of this run."""
        sequence, out = run.sequence, list[Token]()
        top = sequence.request.sampling.prompt_logprobs or 0
        stop = min(sequence.cached + run.count, sequence.prompt - 1)
        for begin in range(sequence.cached, stop, SCORED_AT_ONCE):
            end = min(begin + SCORED_AT_ONCE, stop)
            logits = self.model.logits(hidden[begin - sequence.cached : end - sequence.cached])
            out += sampler.report(logits, sequence.request.ids[begin + 1 : end + 1], top)
        return out

    def wipe(self, blocks: list[int]) -> None:
        """Overwrite blocks, so that what a broken sequence left in them can reach nobody."""
        for part in self.cache.tensors():
            part[blocks] = 0


def _finite(x: Tensor) -> Tensor:
    """Return which rows [R] of x [R, n] are finite throughout."""
    # A sum is not, if any of its terms is not; the terms themselves are looked at only where it is not.
    sound = torch.isfinite(x.sum(-1))
    return sound if bool(sound.all()) else torch.isfinite(x).all(-1)


def _broken(hidden: Tensor, starts: tuple[int, ...], step: Step) -> set[Sequence]:
    """Return the sequences with NaN or infinity in their rows of ``hidden`` [T, d].

    Every row is looked at, not only those that are sampled from: a key or value that is not finite
    makes the hidden state at its own place so, hence a block that passed here is safe to share.
    """
    sound = _finite(hidden)
    if bool(sound.all()):
        return set()
    spans = zip(step.runs, starts, starts[1:], strict=False)
    return {run.sequence for run, begin, end in spans if not bool(sound[begin:end].all())}
