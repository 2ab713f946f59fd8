"""Runs a Step: the model, the check for NaN and infinity, and the sampler.

This module owns the memory of the cache. It does not decide what runs, and does not depend on streams.

Legend: T tokens of the step, R rows whose logits are wanted, d hidden size, V vocabulary, G key/value
heads, D head size, B block size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from moesaic.engine import grammar_masks, sampler
from moesaic.engine.batch import assemble
from moesaic.engine.decode_graphs import Computed, DecodeGraphs, compute
from moesaic.engine.request import Sequence, Token
from moesaic.engine.step import Ahead, Outcome, Row, Run, Step
from moesaic.errors import GrammarError
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
        rows_of = {run.sequence: _rows(run) for run in step.runs if run.samples}
        rows = [row for rows in rows_of.values() for row in rows]
        starts = step.starts
        found = self._graphs.run(step) or self._compute(step)
        # Compute the masks before reading results, so that they overlap with the work of an accelerator.
        allowed, refused = grammar_masks.allowed(rows, self.model.vocab_size)
        broken = _broken(found.finite.tolist(), starts, step, rows_of)
        broken |= {row for row, good in zip(rows, found.finite_logits.tolist(), strict=True) if not good}
        good = [index for index, row in enumerate(rows) if row not in broken and row not in refused]
        drawn: dict[Row, list[Token]] = {}
        if good:
            chosen = found.logits if len(good) == len(rows) else found.logits[good]
            drawn = sampler.sample(chosen, [rows[index] for index in good], allowed)
        scores = {
            run.sequence: self._scores(found.hidden[begin:], run)
            for run, begin in zip(step.runs, starts, strict=False)
            if run.sequence.scores_prompt and not run.sequence.generated and run.sequence not in broken
        }
        return _outcome(step, rows_of, drawn, scores, broken, refused)

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


def _rows(run: Run) -> list[Row]:
    """Return the states of the run's sequence for which a token is sampled: now, and after each of its proposals."""
    return [run.sequence, *(Ahead(run.sequence, run.proposals[:count]) for count in range(1, len(run.proposals) + 1))]


def _outcome(
    step: Step,
    rows_of: Mapping[Sequence, list[Row]],
    drawn: Mapping[Row, list[Token]],
    scores: Mapping[Sequence, list[Token]],
    broken: set[Row],
    refused: Mapping[Row, GrammarError],
) -> Outcome:
    """Return the outcome for sequences, given the results for their rows.

    A broken run with proposals does not fail: NaN of a proposal that is wrong may have reached the rows before it. It
    gets no tokens, so that its token runs again without proposals.
    """
    tokens, failed, errors = {}, set(), {}
    for run in step.runs:
        sequence = run.sequence
        if sequence in drawn:
            tokens[sequence] = _accepted(run, rows_of[sequence], drawn)
        elif sequence in refused and sequence not in broken:
            errors[sequence] = refused[sequence]
        elif sequence in broken and not run.proposals:
            failed.add(sequence)
    return Outcome(tokens, scores, frozenset(failed), errors)


def _accepted(run: Run, rows: list[Row], drawn: Mapping[Row, list[Token]]) -> list[Token]:
    """Return the tokens of ``rows`` up to the first that differs from its proposal.

    A row without a token ends them too: if its proposal was right, the next step runs it again and reports why.
    """
    tokens: list[Token] = []
    for row, proposal in zip(rows, (*run.proposals, None), strict=True):
        tokens += drawn.get(row, ())
        if row not in drawn or tokens[-1].id != proposal:
            break
    return tokens


def _broken(finite: list[bool], starts: tuple[int, ...], step: Step, rows_of: Mapping[Sequence, list[Row]]) -> set[Row]:
    """Return the sequences with a hidden state that is not ``finite``, and such states after proposals.

    All rows are checked, not only the sampled ones. A key or value that is not finite makes the hidden state at its
    own position not finite, so a block whose tokens pass this check is safe to share.
    """
    if all(finite):
        return set()
    broken: set[Row] = set()
    for run, begin, end in zip(step.runs, starts, starts[1:], strict=False):
        own = end - len(run.proposals)
        if not all(finite[begin:own]):
            broken.add(run.sequence)
        ahead = rows_of.get(run.sequence, [])[1:]
        broken.update(row for row, good in zip(ahead, finite[own:end], strict=True) if not good)
    return broken
