"""Runs a Step: the model, the check for NaN and infinity, and the sampler.

This module owns the memory of the cache. It does not decide what runs, and does not depend on streams.

Legend: T tokens of the step, R rows whose logits are wanted, d hidden size, V vocabulary, G key/value
heads, D head size, B block size.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor

from moesaic.engine import grammar_masks, sampler
from moesaic.engine.batch import assemble
from moesaic.engine.decode_graphs import Computed, DecodeGraphs, compute
from moesaic.engine.request import Sequence, Token
from moesaic.engine.scheduler import Outcome, Run, Step
from moesaic.ops import Batch, Cache

SCORED_ROWS = 64
"""Rows of a prompt whose logits are in memory at a time; those of a whole long prompt would take gigabytes."""

UNWRITTEN = -128
"""Value of unwritten entries in an int8 cache that ``poison`` filled; keys and values are never rounded to it."""


class Model(Protocol):
    """The interface of a model. ``moesaic.models`` implements it; any object with these members works.

    A model whose attribute ``recordable`` is true calls only ``moesaic.ops`` and makes views. Its decode steps are
    then recorded and replayed.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int:
        """Maximum number of tokens in a sequence, prompt and answer together."""

    @property
    def window(self) -> int | None:
        """Largest attention window of any layer, the token itself included; None if a layer has no window."""

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """(G, D) of each layer: its number of key/value heads and their size."""

    def __call__(self, batch: Batch) -> Tensor:
        """Return the hidden states [T, d] of the tokens of ``batch``; store their keys and values in its cache."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [R, V] of hidden states [R, d]."""


class Runner:
    """Runs the scheduler's steps on a model, and owns its key/value cache of ``blocks`` blocks.

    A block holds ``block_size`` tokens; ``dtype`` is that of the cache. ``lazy`` is as for ``Cache.zeros``. With
    ``poison``, the cache is filled with NaN first, so that tests detect reads of unwritten memory.
    """

    def __init__(
        self,
        model: Model,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        lazy: bool = False,
        poison: bool = False,
    ) -> None:
        self.model, self.device = model, device
        self.cache = Cache.zeros(model.cache_shapes, blocks, block_size, dtype, device, lazy=lazy)
        self._graphs = DecodeGraphs(model, self.cache, device)
        if poison:
            for part in self.cache.tensors():
                part.fill_(UNWRITTEN if part.dtype == torch.int8 else torch.nan)

    @torch.inference_mode()
    def run(self, step: Step) -> Outcome:
        """Run the model on ``step`` and sample the next tokens; return tokens, log-probabilities and failures."""
        rows = [run.sequence for run in step.runs if run.samples]
        starts = (0, *itertools.accumulate(run.count for run in step.runs))
        found = self._graphs.run(step) or self._compute(step)
        # Compute the masks before reading results, so that they overlap with the work of an accelerator.
        allowed, refused = grammar_masks.allowed(rows, self.model.vocab_size)
        failed = _broken(found.finite.tolist(), starts, step)
        failed |= {sequence for sequence, good in zip(rows, found.finite_logits.tolist(), strict=True) if not good}
        tokens: dict[Sequence, list[Token]] = {}
        good = [row for row, sequence in enumerate(rows) if sequence not in failed and sequence not in refused]
        if good:
            chosen = found.logits if len(good) == len(rows) else found.logits[good]
            tokens = sampler.sample(chosen, [rows[row] for row in good], allowed)
        scores = {
            run.sequence: self._scores(found.hidden[begin:], run)
            for run, begin in zip(step.runs, starts, strict=False)
            if run.sequence.scores_prompt and not run.sequence.generated and run.sequence not in failed
        }
        refused = {sequence: error for sequence, error in refused.items() if sequence not in failed}
        return Outcome(tokens, scores, frozenset(failed), refused)

    def _compute(self, step: Step) -> Computed:
        batch = assemble(step, self.cache, self.device)
        return compute(self.model, batch, batch.outputs)

    def _scores(self, hidden: Tensor, run: Run) -> list[Token]:
        """Return each prompt token that follows a token of ``run``, with its log-probability.

        Tokens before ``first_scored`` are left out. ``hidden`` begins with the rows of the run.
        """
        sequence, out = run.sequence, list[Token]()
        top = sequence.request.sampling.prompt_logprobs or 0
        stop = min(sequence.cached + run.count, sequence.prompt - 1)
        for begin in range(max(sequence.cached, sequence.first_scored - 1), stop, SCORED_ROWS):
            end = min(begin + SCORED_ROWS, stop)
            logits = self.model.logits(hidden[begin - sequence.cached : end - sequence.cached])
            out += sampler.report(logits, sequence.request.ids[begin + 1 : end + 1], top)
        return out

    def wipe(self, blocks: list[int]) -> None:
        """Overwrite these blocks of the cache with zeros, so that no other sequence reads NaN or infinity from them."""
        for part in self.cache.tensors():
            part[blocks] = 0


def _broken(finite: list[bool], starts: tuple[int, ...], step: Step) -> set[Sequence]:
    """Return the sequences with a hidden state that is not ``finite``.

    All rows are checked, not only the sampled ones. A key or value that is not finite makes the hidden state at its
    own position not finite, so a block whose tokens pass this check is safe to share.
    """
    if all(finite):
        return set()
    spans = zip(step.runs, starts, starts[1:], strict=False)
    return {run.sequence for run, begin, end in spans if not all(finite[begin:end])}
