"""How an answer grows by a token, and what ends it.

Knows limits, stop ids and grammars. Does not know blocks, steps or text, nor whether a token was drawn
here or comes with the request.
"""

from __future__ import annotations

from moesaic.engine.request import Done, Reason, Sequence, Token
from moesaic.errors import InvalidParameter


def grow(sequence: Sequence, id: int) -> Done | None:
    """Enter the next token of the answer; return its end if that was the last."""
    sequence.ids.append(id)
    if id in sequence.request.stop_ids:  # before min_tokens the sampler gives none
        return done(sequence, "stop", id)
    if _completes(sequence, id):
        return done(sequence, "stop")
    return done(sequence, "length") if len(sequence.ids) >= sequence.limit else None


def resume(sequence: Sequence) -> None:
    """Enter the tokens that the request brings along for this answer, as if each had just been drawn.

    Afterwards the sequence is as one that was preempted behind them, or has ended.

    Raises:
        InvalidParameter: the answer cannot have had them: there are too many, the grammar forbids one, or one
            stands behind an end.
        GrammarError: what the grammar allows cannot be found out.
    """
    request, index = sequence.request, sequence.index
    given = request.given(index)
    room = sequence.limit - sequence.prompt
    if len(given) > room:
        raise InvalidParameter("resume", f"brings {len(given)} tokens for answer {index}, which has room for {room}")
    end: Done | None = None
    for place, id in enumerate(given):
        if end is not None:
            raise InvalidParameter("resume", f"answer {index} ends before its token {place}: give none behind the end")
        if not _allowed(sequence, id):
            raise InvalidParameter("resume", f"the grammar does not allow {id} as token {place} of answer {index}")
        end = grow(sequence, id)
    if end is None and index in request.finished:
        end = done(sequence, "cancelled")
    sequence.ended = end is not None
    sequence.begun = (*map(Token, given), *([] if end is None else [end]))


def done(sequence: Sequence, reason: Reason, stop_id: int | None = None) -> Done:
    """Return the event that ends the answer as it stands."""
    hits = sequence.hits or 0
    return Done(reason, stop_id, sequence.prompt, sequence.generated, hits, sequence.preemptions)


def _completes(sequence: Sequence, id: int) -> bool:
    """Enter a token into the sequence's grammar; return whether nothing can follow."""
    if sequence.constraint is None:
        return False
    sequence.constraint.accept(id)
    return sequence.constraint.done


def _allowed(sequence: Sequence, id: int) -> bool:
    """Return whether the grammar, if there is one, lets ``id`` come next."""
    constraint = sequence.constraint
    if constraint is None or (constraint.may_end and id in sequence.request.stop_ids):
        return True
    return bool(constraint.mask()[id // 32] >> (id % 32) & 1)
