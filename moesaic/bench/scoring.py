"""Log-likelihoods of continuations after their contexts, computed by the engine.

The engine computes a request's context from the prefix cache where another request with the same context has run
before. ``likelihoods`` therefore runs the first request of each context before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from moesaic.engine import Done, Engine, PromptLogprobs, Request, Sampling, Stream, Token
from moesaic.errors import InvalidRequest

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Continuation:
    """Token ids of a continuation, and of the context before it; each has at least one."""

    context: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is after its context."""

    logprob: float
    """Sum of log p of its tokens, in nats, each after all tokens before it."""
    greedy: bool
    """Whether each of its tokens is the likeliest at its place."""


def likelihoods(
    engine: Engine, continuations: Sequence[Continuation], at_once: int, progress: Progress | None = None
) -> list[Likelihood]:
    """Return the likelihood of each continuation.

    A context that is too long is cut from the left. The model reads at most ``engine.capacity`` - 1 tokens, since it
    does not read the last token of a continuation.

    Args:
        engine: the engine; its model scores.
        continuations: what to score, in any order.
        at_once: number of requests that wait or run at the same time, about.
        progress: called with the number of continuations scored so far and the total.

    Raises:
        InvalidRequest: a continuation is empty, has no context, or does not fit with one token of its context.
        InvalidParameter: a token id is not in the model's vocabulary.
        NumericalError: the model computed NaN or infinity.
    """
    cut = [_cut(continuation, engine.capacity) for continuation in continuations]
    out: dict[int, Likelihood] = {}
    for groups in _batches(cut, at_once):
        firsts, others = [group[0] for group in groups], [index for group in groups for index in group[1:]]
        for wave in (firsts, others):
            streams = [(index, _submit(engine, cut[index])) for index in wave]
            for index, stream in streams:
                out[index] = _read(stream, cut[index])
                if progress is not None:
                    progress(len(out), len(cut))
    return [out[index] for index in range(len(cut))]


def _cut(continuation: Continuation, capacity: int) -> Continuation:
    """Return ``continuation`` with as much of its context as fits into ``capacity`` tokens."""
    context, ids = continuation.context, continuation.ids
    if not context or not ids:
        raise InvalidRequest("a continuation and its context need at least one token each")
    if len(ids) >= capacity:
        raise InvalidRequest(f"a continuation has {len(ids)} tokens, but the model can score at most {capacity - 1}")
    return Continuation(context[-(capacity - len(ids)) :], ids)


def _batches(continuations: Sequence[Continuation], at_once: int) -> Iterator[list[list[int]]]:
    """Yield groups of indexes, each of continuations with one context; together they have about ``at_once`` indexes.

    Contexts that begin alike follow each other.
    """
    order = sorted(range(len(continuations)), key=lambda index: continuations[index].context)
    batch: list[list[int]] = []
    for _, group in groupby(order, key=lambda index: continuations[index].context):
        indexes = list(group)
        for begin in range(0, len(indexes), at_once):
            batch.append(indexes[begin : begin + at_once])
            if sum(map(len, batch)) >= at_once:
                yield batch
                batch = []
    if batch:
        yield batch


def _submit(engine: Engine, continuation: Continuation) -> Stream:
    """Start a request whose events report the log-probability of each token of ``continuation``.

    The last token is generated: it is the only one allowed, and its log-probability is that before this limit.
    """
    context, ids = continuation.context, continuation.ids
    sampling = Sampling(
        temperature=0.0,
        max_tokens=1,
        logprobs=1,
        prompt_logprobs=1 if len(ids) > 1 else None,
        allowed_token_ids=ids[-1:],
    )
    [stream] = engine.submit(Request((*context, *ids[:-1]), sampling, prompt_logprobs_start=len(context)))
    return stream


def _read(stream: Stream, continuation: Continuation) -> Likelihood:
    tokens: list[Token] = []
    for event in stream:
        if isinstance(event, PromptLogprobs):
            tokens += event.tokens[len(continuation.context) :]
        elif not isinstance(event, Done):
            tokens.append(event)
    assert [token.id for token in tokens] == list(continuation.ids)
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    assert len(logprobs) == len(tokens)
    return Likelihood(sum(logprobs), all(token.top[0][0] == token.id for token in tokens))
