"""From logits to tokens.

A row goes through, in this order (that of transformers' ``generate``, and of vLLM where it has the
same step): logit bias, no end before ``min_tokens``, repetition penalty, frequency and presence
penalties, what a grammar forbids (``masks``); the greedy rows then take the largest logit; the
others go on through temperature, top-k, top-p, min-p, typical-p, and one draw. Log-probabilities
that are reported are of the row as the model gave it.

The draw inverts the distribution at a number that is a hash of (seed, index of the answer, place
in the answer) and of nothing else: no generator's state that a preemption or the company in a
batch could disturb.

Knows sequences and their ``Sampling``. Does not know batches, caches or how a sequence ends.

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
from moesaic.engine.request import Sampling, Sequence, Token

NEVER = float("-inf")


def sample(
    logits: Tensor, sequences: Listing[Sequence], allowed: Mapping[Sequence, NDArray[np.bool_]] | None = None
) -> dict[Sequence, list[Token]]:
    """Return the next token of each sequence from its row of ``logits`` [R, V], which must be finite.

    ``allowed`` has the tokens [V] that a grammar allows, at least one, for each sequence that has a grammar.
    """
    adjusted = _adjust(logits, sequences)
    if allowed:
        adjusted = _forbid(adjusted, sequences, allowed, fresh=adjusted is not logits)
    ids = [0] * len(sequences)
    for greedy in (True, False):
        rows = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.greedy is greedy]
        if rows:
            chosen = adjusted if len(rows) == len(sequences) else adjusted[rows]
            found = chosen.argmax(-1).tolist() if greedy else _draw(chosen, [sequences[row] for row in rows])
            for row, id in zip(rows, found, strict=True):
                ids[row] = id
    tokens = [Token(id) for id in ids]
    for row, sequence in enumerate(sequences):
        top = sequence.request.sampling.logprobs
        if top is not None:
            tokens[row] = report(logits[row : row + 1], [ids[row]], top)[0]
    return {sequence: [token] for sequence, token in zip(sequences, tokens, strict=True)}


def report(logits: Tensor, ids: Listing[int], top: int) -> list[Token]:
    """Return ``ids`` [R] with their log-probabilities under ``logits`` [R, V] and the ``top`` likeliest of each row."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    likeliest = [_likeliest(row, top) for row in logprobs]
    return [Token(id, value, best) for id, value, best in zip(ids, chosen, likeliest, strict=True)]


def _likeliest(row: Tensor, top: int) -> tuple[tuple[int, float], ...]:
    """Return the ``top`` largest of row [V] with their ids, falling; ties by lower id, which topk leaves open."""
    top = min(top, len(row))
    if not top:
        return ()
    candidates = (row >= row.topk(top).values[-1]).nonzero()[:, 0]
    pairs = zip(candidates.tolist(), row[candidates].tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:top])


# Adjustments: what is wanted of the tokens, whatever the temperature


def _adjust(logits: Tensor, sequences: Listing[Sequence]) -> Tensor:
    """Return logits [R, V] after bias and penalties; the same tensor if no row wants any."""
    wants = [row for row, sequence in enumerate(sequences) if _wants_adjusting(sequence)]
    if wants:
        logits = logits.clone()
    for row in wants:
        logits[row] = adjust(logits[row], sequences[row])
    return logits


def _wants_adjusting(sequence: Sequence) -> bool:
    s = sequence.request.sampling
    penalized = s.repetition_penalty != 1 or s.frequency_penalty or s.presence_penalty
    return bool(s.logit_bias or penalized or sequence.generated < s.min_tokens)


def adjust(row: Tensor, sequence: Sequence) -> Tensor:
    """Return row [V] after bias, minimum length and penalties. May change ``row`` in place."""
    s = sequence.request.sampling
    if s.logit_bias:
        row[_ids(s.logit_bias, row)] += torch.tensor(list(s.logit_bias.values()), device=row.device)
    # Under a grammar it is the mask that knows whether an end can be done without.
    if sequence.generated < s.min_tokens and sequence.request.stop_ids and sequence.constraint is None:
        row[_ids(sequence.request.stop_ids, row)] = NEVER
    if s.repetition_penalty != 1:
        seen = _ids(set(sequence.ids), row)
        row[seen] = torch.where(row[seen] > 0, row[seen] / s.repetition_penalty, row[seen] * s.repetition_penalty)
    if s.frequency_penalty or s.presence_penalty:
        answer = _ids(sequence.ids[sequence.prompt :], row)
        counts = torch.bincount(answer, minlength=len(row))
        row -= s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
    return row


def _forbid(
    logits: Tensor, sequences: Listing[Sequence], allowed: Mapping[Sequence, NDArray[np.bool_]], *, fresh: bool
) -> Tensor:
    """Return logits [R, V] with -inf where a sequence's grammar does not allow the token."""
    rows = [row for row, sequence in enumerate(sequences) if sequence in allowed]
    if rows:
        kept = torch.from_numpy(np.stack([allowed[sequences[row]] for row in rows])).to(logits.device)
        logits = logits if fresh else logits.clone()
        logits[rows] = logits[rows].masked_fill_(~kept, NEVER)
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
"""The settings of ``ops.truncate``, in its order."""

PLAIN = [1.0, 0, 1.0, 0.0, 1.0]
"""Settings that leave a row as it is."""


def _draw(logits: Tensor, sequences: Listing[Sequence]) -> list[int]:
    """Return one id for each row of adjusted logits [R, V]."""
    settings = [[setting(sequence.request.sampling) for setting in SETTINGS] for sequence in sequences]
    if any(each != PLAIN for each in settings):
        logits = ops.truncate(logits, torch.tensor(settings, dtype=torch.float32, device=logits.device))
    numbers = torch.tensor([uniform(sequence) for sequence in sequences], dtype=torch.float64, device=logits.device)
    return ops.draw(logits, numbers).tolist()


def uniform(sequence: Sequence) -> float:
    """Return the number in [0, 1) with which the next token is drawn.

    It has 52 bits, so that times a mass of about 1 it stays below that mass in float64.
    """
    place = f"{sequence.seed}/{sequence.index}/{sequence.generated}"
    return float(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little") >> 12) / 2**52
