"""The sampler: from logits to tokens.

The steps have the order of transformers' ``generate``, and of vLLM for the steps that it has: logit bias, no stop id
before ``min_tokens``, repetition penalty, frequency and presence penalties, grammar mask (``grammar_masks``). Greedy
rows then take the largest logit. The others continue with temperature, top-k, top-p, min-p, typical-p and one draw.
Reported log-probabilities are those of the model's unchanged logits.

A draw inverts the cumulative distribution at a number that is a hash of (seed, index of the answer, position in the
answer). There is no generator state that a preemption or the other sequences of a batch could change.

This module depends on sequences and their ``Sampling``, but not on batches, caches or stop conditions.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic import ops
from moesaic.engine.request import Sampling, Token
from moesaic.engine.step import Row

REMOVED = float("-inf")


def sample(
    logits: Tensor, sequences: Listing[Row], allowed: Mapping[Row, NDArray[np.bool_]] | None = None
) -> dict[Row, list[Token]]:
    """Draw the next token of each sequence from its row of ``logits`` [R, V]; return each as a list of one token.

    A sequence with proposed tokens (``step.Ahead``) has a row of its own for each of them. The logits must be finite.
    ``allowed`` has the mask [V] of each sequence that has one; a mask allows at least one token.
    """
    adjusted = _adjust(logits, sequences)
    if allowed:
        adjusted = _forbid(adjusted, sequences, allowed, fresh=adjusted is not logits)
    ids = [0] * len(sequences)
    for greedy in (True, False):
        rows = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.greedy is greedy]
        if rows:
            chosen = adjusted if len(rows) == len(sequences) else adjusted[rows]
            drawn = ops.argmax(chosen).tolist() if greedy else _draw(chosen, [sequences[row] for row in rows])
            for row, token_id in zip(rows, drawn, strict=True):
                ids[row] = token_id
    tokens = [Token(token_id) for token_id in ids]
    for row, sequence in enumerate(sequences):
        top = sequence.request.sampling.logprobs
        if top is not None:
            tokens[row] = report(logits[row : row + 1], [ids[row]], top)[0]
    return {sequence: [token] for sequence, token in zip(sequences, tokens, strict=True)}


def report(logits: Tensor, ids: Listing[int], top: int) -> list[Token]:
    """Return a Token for each of ``ids`` [R], with log-probabilities from its row of ``logits`` [R, V].

    ``top`` is the number of likeliest tokens of the row that each Token also reports.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    likeliest = [_likeliest(row, top) for row in logprobs]
    return [Token(token_id, value, best) for token_id, value, best in zip(ids, chosen, likeliest, strict=True)]


def _likeliest(row: Tensor, top: int) -> tuple[tuple[int, float], ...]:
    """Return (index, value) of the ``top`` largest values of ``row`` [V], by descending value, then by index."""
    top = min(top, len(row))
    if not top:
        return ()
    # topk does not define the order of equal values.
    candidates = (row >= row.topk(top).values[-1]).nonzero()[:, 0]
    pairs = zip(candidates.tolist(), row[candidates].tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:top])


# Adjustments, which do not depend on the temperature


def _adjust(logits: Tensor, sequences: Listing[Row]) -> Tensor:
    """Return ``logits`` [R, V] after the bias, minimum length and penalties of each row's sequence.

    If no sequence has any, the result is the same tensor, otherwise a copy.
    """
    rows = [row for row, sequence in enumerate(sequences) if _has_adjustments(sequence)]
    if rows:
        logits = logits.clone()
    for row in rows:
        logits[row] = adjust(logits[row], sequences[row])
    return logits


def _has_adjustments(sequence: Row) -> bool:
    s = sequence.request.sampling
    penalized = s.repetition_penalty != 1 or s.frequency_penalty or s.presence_penalty
    return bool(s.logit_bias or penalized or sequence.generated < s.min_tokens)


def adjust(row: Tensor, sequence: Row) -> Tensor:
    """Return the logits ``row`` [V] of ``sequence`` after its bias, minimum length and penalties.

    ``row`` may be changed in place.
    """
    s = sequence.request.sampling
    if s.logit_bias:
        row[_ids(s.logit_bias, row)] += torch.tensor(list(s.logit_bias.values()), device=row.device)
    # With a mask, it decides whether a stop id is allowed.
    if sequence.generated < s.min_tokens and sequence.request.stop_ids and not sequence.request.masked:
        row[_ids(sequence.request.stop_ids, row)] = REMOVED
    if s.repetition_penalty != 1:
        seen = _ids(set(sequence.ids), row)
        row[seen] = torch.where(row[seen] > 0, row[seen] / s.repetition_penalty, row[seen] * s.repetition_penalty)
    if s.frequency_penalty or s.presence_penalty:
        answer = _ids(sequence.ids[sequence.prompt :], row)
        counts = torch.bincount(answer, minlength=len(row))
        row -= s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
    return row


def _forbid(
    logits: Tensor, sequences: Listing[Row], allowed: Mapping[Row, NDArray[np.bool_]], *, fresh: bool
) -> Tensor:
    """Return logits [R, V] with -inf for each token that the sequence's mask forbids.

    ``allowed`` has the mask [V] of each sequence that has one. With ``fresh``, ``logits`` may be overwritten, otherwise
    they are copied.
    """
    rows = [row for row, sequence in enumerate(sequences) if sequence in allowed]
    if rows:
        kept = torch.from_numpy(np.stack([allowed[sequences[row]] for row in rows])).to(logits.device)
        logits = logits if fresh else logits.clone()
        logits[rows] = logits[rows].masked_fill_(~kept, REMOVED)
    return logits


def _ids(ids: object, row: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=row.device)  # type: ignore[call-overload]


# The draw


SETTINGS: tuple[Callable[[Sampling], float], ...] = (
    lambda s: s.temperature,
    lambda s: s.top_k,
    lambda s: s.top_p,
    lambda s: s.min_p,
    lambda s: s.typical_p,
)
"""Functions that return the columns of the argument ``settings`` of ``ops.truncate``, in order."""

SETTINGS_OFF = [1.0, 0, 1.0, 0.0, 1.0]
"""Columns of ``settings`` with which ``ops.truncate`` does not change the probabilities of a row."""


def _draw(logits: Tensor, sequences: Listing[Row]) -> list[int]:
    """Draw one token id for each row of ``logits`` [R, V], after temperature and truncations."""
    settings = [[setting(sequence.request.sampling) for setting in SETTINGS] for sequence in sequences]
    if any(row != SETTINGS_OFF for row in settings):
        logits = ops.truncate(logits, torch.tensor(settings, dtype=torch.float32, device=logits.device))
    numbers = torch.tensor([uniform(sequence) for sequence in sequences], dtype=torch.float64, device=logits.device)
    return ops.draw(logits, numbers).tolist()


def uniform(sequence: Row) -> float:
    """Return the pseudo-random number in [0, 1) that decides the next draw of ``sequence``.

    It has 52 bits, so that its product with a total probability of about 1 stays below that total in float64.
    """
    key = f"{sequence.seed}/{sequence.index}/{sequence.generated}"
    return float(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 12) / 2**52
