"""Which tokens the sequences of a step may take, where a grammar has a say.

Knows how a grammar, the ends of an answer and ``min_tokens`` go together. Does not know any grammar
(see ``request.Constraint``) nor logits (``sampler`` puts -inf where a mask says no).

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moesaic.engine.request import Constraint, Sequence
from moesaic.errors import GrammarError

Mask = NDArray[np.bool_]


def allowed(sequences: Iterable[Sequence], vocab: int) -> tuple[dict[Sequence, Mask], dict[Sequence, GrammarError]]:
    """Return the mask [V] of each sequence that has a grammar, and those that no token can follow with the reason."""
    # One after the other: at sixteen rows of JSON two threads took longer (13 us a row of 32,000 tokens).
    found: dict[Sequence, Mask] = {}
    refused: dict[Sequence, GrammarError] = {}
    for sequence in sequences:
        if sequence.constraint is not None:
            try:
                found[sequence] = _mask(sequence, sequence.constraint, vocab)
            except GrammarError as error:
                refused[sequence] = error
    return found, refused


def _mask(sequence: Sequence, constraint: Constraint, vocab: int) -> Mask:
    """Return what may come next: text that the grammar allows, and an end where it allows that.

    Before ``min_tokens`` there is no end, unless there is nothing else: the grammar wins.

    Raises:
        GrammarError: nothing may come.
    """
    bits = constraint.mask().astype("<i4", copy=False)
    mask = np.unpackbits(bits.view(np.uint8), count=vocab, bitorder="little").view(np.bool_)
    ends = list(sequence.request.stop_ids)
    if sequence.generated < sequence.request.sampling.min_tokens:
        text = mask.copy()
        text[ends] = False
        if text.any():
            return text
    if constraint.may_end:
        mask[ends] = True
    if not mask.any():
        raise GrammarError("no token of the vocabulary continues the answer under its grammar")
    return mask
