"""Appends tokens to an answer and decides what ends it.

This module handles length limits, stop ids and grammars. It does not depend on blocks, steps or text. It treats
sampled tokens and tokens that come with the request alike.
"""

from __future__ import annotations

from moesaic.engine.request import Done, Reason, Sequence, Token
from moesaic.errors import InvalidParameter


def append_token(sequence: Sequence, token_id: int) -> Done | None:
    """Append ``token_id`` to the answer of ``sequence``; return its ``Done`` event if this token ends the answer."""
    sequence.ids.append(token_id)
    if token_id in sequence.request.stop_ids:  # the sampler never chooses one before min_tokens
        return done_event(sequence, "stop", token_id)
    if _completes(sequence, token_id):
        return done_event(sequence, "stop")
    return done_event(sequence, "length") if len(sequence.ids) >= sequence.limit else None


def resume(sequence: Sequence) -> None:
    """Append the tokens that ``Request.resume`` has for the answer of ``sequence``, as if they had just been sampled.

    Afterwards ``sequence`` has ended, or has the state of a sequence that was preempted after these tokens.

    Raises:
        InvalidParameter: there are too many tokens, the grammar forbids one, or one follows the end of the answer.
        GrammarError: the grammar cannot compute the allowed tokens.
    """
    request, index = sequence.request, sequence.index
    tokens = request.resumed_tokens(index)
    room = sequence.limit - sequence.prompt
    if len(tokens) > room:
        raise InvalidParameter("resume", f"has {len(tokens)} tokens for answer {index}, which has room for {room}")
    end: Done | None = None
    for position, token_id in enumerate(tokens):
        if end is not None:
            message = f"answer {index} ends before its token {position}; remove the tokens after the end"
            raise InvalidParameter("resume", message)
        if not _allowed(sequence, token_id):
            message = f"the grammar does not allow {token_id} as token {position} of answer {index}"
            raise InvalidParameter("resume", message)
        end = append_token(sequence, token_id)
    if end is None and index in request.finished:
        end = done_event(sequence, "cancelled")
    sequence.ended = end is not None
    sequence.resumed_events = (*map(Token, tokens), *([] if end is None else [end]))


def done_event(sequence: Sequence, reason: Reason, stop_id: int | None = None) -> Done:
    """Return the event that ends the answer of ``sequence`` after the tokens that it has now.

    ``stop_id`` is the stop id that ended the answer, if one did.
    """
    cached = sequence.cached_prompt_tokens or 0
    return Done(reason, stop_id, sequence.prompt, sequence.generated, cached, sequence.preemptions)


def _completes(sequence: Sequence, token_id: int) -> bool:
    """Advance the grammar of ``sequence`` by ``token_id``; return whether it allows no further token.

    Without a grammar, return False.
    """
    if sequence.constraint is None:
        return False
    sequence.constraint.accept(token_id)
    return sequence.constraint.done


def _allowed(sequence: Sequence, token_id: int) -> bool:
    """Return whether ``token_id`` may be the next token of ``sequence``; without a grammar, every token may."""
    constraint = sequence.constraint
    if constraint is None or (constraint.may_end and token_id in sequence.request.stop_ids):
        return True
    return bool(constraint.mask()[token_id // 32] >> (token_id % 32) & 1)
