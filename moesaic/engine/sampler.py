"""From logits to tokens.

A row goes through, in this order (that of transformers' ``generate``, and of vLLM where it has the
same step): logit bias, no end before ``min_tokens``, repetition penalty, frequency and presence
penalties; the greedy rows then take the largest logit; the others go on through temperature,
top-k, top-p, min-p, typical-p, and one draw. Log-probabilities that are reported are of the row
as the model gave it.

The draw inverts the distribution at a number that is a hash of (seed, index of the answer, place
in the answer) and of nothing else: no generator's state that a preemption or the company in a
batch could disturb.

Knows sequences and their ``Sampling``. Does not know batches, caches or how a sequence ends.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as Listing

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.engine.request import Sampling, Sequence, Token

NEVER = float("-inf")
HEAD = 1024
"""How many of the likeliest tokens top-p looks at before it sorts the whole vocabulary."""


def sample(logits: Tensor, sequences: Listing[Sequence]) -> dict[Sequence, list[Token]]:
    """Return the next token of each sequence from its row of ``logits`` [R, V], which must be finite."""
    adjusted = _adjust(logits, sequences)
    ids = adjusted.argmax(-1).tolist()
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.request.sampling.greedy]
    if drawn:
        for row, id in zip(drawn, _draw(adjusted[drawn], [sequences[row] for row in drawn]), strict=True):
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
    if sequence.generated < s.min_tokens and sequence.request.stop_ids:
        row[_ids(sequence.request.stop_ids, row)] = NEVER
    if s.repetition_penalty != 1:
        seen = _ids(set(sequence.ids), row)
        row[seen] = torch.where(row[seen] > 0, row[seen] / s.repetition_penalty, row[seen] * s.repetition_penalty)
    if s.frequency_penalty or s.presence_penalty:
        answer = _ids(sequence.ids[sequence.prompt :], row)
        counts = torch.bincount(answer, minlength=len(row))
        row -= s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
    return row


def _ids(ids: object, row: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=row.device)  # type: ignore[call-overload]


# Truncations: what is left of the tail. Each takes logits [R, V] and a parameter per row [R, 1]


def temper(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide by the temperature, the largest logit at 0 so that a small temperature overflows to -inf only."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k largest, and what equals the last of them."""
    k = k.long().clamp(max=logits.shape[-1])
    least = logits.topk(int(k.max())).values.gather(-1, k - 1)
    return logits.masked_fill(logits < least, NEVER)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches p, and what equals the last of them.

    Only rows whose likeliest HEAD tokens do not reach p are sorted whole; each decides for itself.
    """
    probabilities = logits.softmax(-1)
    head = probabilities.topk(min(HEAD, logits.shape[-1])).values
    least = _reach(head, p)
    flat = (head.sum(-1) < p[:, 0]).nonzero()[:, 0]
    if len(flat):
        least[flat] = _reach(probabilities[flat].sort(descending=True).values, p[flat])
    return logits.masked_fill(probabilities < least, NEVER)


def _reach(ordered: Tensor, p: Tensor) -> Tensor:
    """Return the entry [R, 1] of falling ``ordered`` at which the sum reaches p."""
    place = (ordered.cumsum(-1) < p).sum(-1, keepdim=True)
    return ordered.gather(-1, place.clamp(max=ordered.shape[-1] - 1))


def min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), NEVER)


def typical_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the expected one, up to mass p."""
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    expected = -(probabilities * logprobs).nansum(-1, keepdim=True)
    order = (-logprobs - expected).abs().sort(dim=-1, stable=True).indices
    ordered = probabilities.gather(-1, order)
    before = F.pad(ordered.cumsum(-1)[:, :-1], (1, 0))  # the first is always kept
    return logits.masked_fill(~torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before < p), NEVER)


Truncation = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Sampling], float], float]

TRUNCATIONS: tuple[Truncation, ...] = (
    (temper, lambda s: s.temperature, 1.0),
    (top_k, lambda s: s.top_k, 0),
    (top_p, lambda s: s.top_p, 1.0),
    (min_p, lambda s: s.min_p, 0.0),
    (typical_p, lambda s: s.typical_p, 1.0),
)
"""What is done to a row that is drawn from, in order: the function, its parameter, and the value that is off."""


def truncate(logits: Tensor, samplings: Listing[Sampling]) -> Tensor:
    """Return logits [R, V] after temperature and truncation; each step touches only the rows that want it."""
    logits = logits.clone()
    for change, parameter, off in TRUNCATIONS:
        rows = [row for row, sampling in enumerate(samplings) if parameter(sampling) != off]
        if rows:
            values = [parameter(samplings[row]) for row in rows]
            logits[rows] = change(logits[rows], torch.tensor(values, device=logits.device)[:, None])
    return logits


# The draw


def _draw(logits: Tensor, sequences: Listing[Sequence]) -> list[int]:
    """Return one id for each row of adjusted logits [R, V]."""
    kept = truncate(logits, [sequence.request.sampling for sequence in sequences])
    mass = kept.softmax(-1).cumsum(-1, dtype=torch.float64)  # a float32 sum would round a large vocabulary's tail away
    numbers = torch.tensor([uniform(sequence) for sequence in sequences], dtype=torch.float64, device=mass.device)
    return torch.searchsorted(mass, numbers[:, None] * mass[:, -1:], right=True)[:, 0].tolist()


def uniform(sequence: Sequence) -> float:
    """Return the number in [0, 1) with which the next token is drawn.

    It has 52 bits, so that times a mass of about 1 it stays below that mass in float64.
    """
    place = f"{sequence.seed}/{sequence.index}/{sequence.generated}"
    return float(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little") >> 12) / 2**52
