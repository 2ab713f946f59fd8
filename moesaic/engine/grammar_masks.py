"""Token masks for the sequences of a step that have a grammar.

This module combines the grammar (a ``request.Constraint``) with stop ids and ``min_tokens``. It does not depend on a
grammar library or on logits; ``sampler`` sets the logits of forbidden tokens to -inf.

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
    """Return the mask [V] of each sequence with a grammar, and the errors of sequences that no token can follow."""
    # One thread: two threads were slower for sixteen rows of JSON (13 us per row of 32,000 tokens).
    masks: dict[Sequence, Mask] = {}
    refused: dict[Sequence, GrammarError] = {}
    for sequence in sequences:
        if sequence.constraint is not None:
            try:
                masks[sequence] = _mask(sequence, sequence.constraint, vocab)
            except GrammarError as error:
                refused[sequence] = error
    return masks, refused


def _mask(sequence: Sequence, constraint: Constraint, vocab: int) -> Mask:
    """Return the tokens that may come next: text that the grammar allows, and stop ids if the answer may end.

    Before ``min_tokens``, stop ids are forbidden unless the grammar allows nothing else.

    Raises:
        GrammarError: no token is allowed.
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
