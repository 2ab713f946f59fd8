"""The response stream of a request to a model in this process: decoded text and tokens become events.

This module does not depend on the engine's threads or on how requests are made.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from moesaic.backend import Delta, Event, Finished, PromptDone, TokenInfo, ToolCall, TopToken
from moesaic.engine import Token
from moesaic.errors import MoesaicError, Overloaded
from moesaic.reply import Reply, Text, TokenPlace
from moesaic.text.stream import TextStream
from moesaic.text.tokenizer import Tokenizer

MAX_UNREAD_EVENTS = 1024
"""Largest number of events that may wait for a stream's reader; if there are more, the request is cancelled."""
UNREAD_EVENTS_PER_ANSWER = 64
"""Events that may wait for each answer of a request, if their sum is larger than ``MAX_UNREAD_EVENTS``."""


class TokenInfoCache:
    """Makes ``TokenInfo`` values from tokens of the engine.

    Most tokens have no log-probabilities. For these, one value is made for each token id and used again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._plain: dict[int, TokenInfo] = {}

    def of(self, token: Token, place: TokenPlace | None = None) -> TokenInfo:
        """Return the ``TokenInfo`` of a token of an answer.

        ``place`` is what the token adds to the text; None: the token has no log-probabilities.
        """
        if place is None:
            if token.id not in self._plain:
                self._plain[token.id] = self._info(token.id)
            return self._plain[token.id]
        piece = self._tokenizer.piece
        top = (
            TopToken(token_id, piece(token_id), value, data)
            for (token_id, value), data in zip(token.top, place.top, strict=True)
        )
        return self._info(token.id, token.logprob, tuple(top), place.data, place.offset)

    def of_prompt(self, tokens: Sequence[Token]) -> tuple[TokenInfo, ...]:
        """Return the ``TokenInfo`` of each token of a prompt, for tokens with log-probabilities."""
        stream = TextStream(self._tokenizer)
        infos = []
        for token in tokens:
            top = tuple(self._data(stream, token_id) for token_id, _ in token.top)
            infos.append(self.of(token, TokenPlace(stream.decoded, self._data(stream, token.id), top)))
            stream.add(token.id)
        return tuple(infos)

    def _data(self, stream: TextStream, token_id: int) -> bytes:
        special = self._tokenizer.is_special(token_id)
        return self._tokenizer.bytes(token_id) if special else stream.bytes(token_id)

    def _info(self, token_id: int, *more: Any) -> TokenInfo:
        return TokenInfo(token_id, self._tokenizer.piece(token_id), self._tokenizer.is_special(token_id), *more)


class LocalResponseStream:
    """The ``ResponseStream`` of a request to a local model. It is used on the event loop's thread only."""

    job = None

    def __init__(self, replies: Sequence[Reply], tokens: TokenInfoCache) -> None:
        self._replies, self._token_infos = replies, tokens
        resumed = sum(len(reply.request.resumed_tokens(reply.stream.index)) for reply in replies)
        # Each poll brings events of all answers, and the resumed tokens come at once.
        self._behind = max(MAX_UNREAD_EVENTS, UNREAD_EVENTS_PER_ANSWER * len(replies)) + resumed
        self._begun: set[int] = set()
        self._events: deque[Event] = deque()
        self._held: dict[int, list[Event]] = {}  # last deltas, which are sent with the end that follows
        self._failed: MoesaicError | None = None
        self._open = len(replies)
        self._waiter: asyncio.Future[None] | None = None

    def pump(self, reply: Reply) -> bool:
        """Append the new events of ``reply``, one of the answers, to those that wait for the reader.

        Return whether the answer has ended, normally or by an error.
        """
        if self._failed:
            return True
        try:
            pieces = reply.poll()
        except MoesaicError as error:
            self._fail(error)
            return True
        index = reply.stream.index
        if index not in self._begun and (pieces or reply.ended):
            self._begun.add(index)
            prompt = self._token_infos.of_prompt(reply.prompt_logprobs)
            self._events.append(PromptDone(index, prompt, len(reply.request.ids)))
        wanted = [piece for piece in pieces if piece.text or piece.tokens or piece.calls]
        shown: list[Event] = [self._piece(index, piece) for piece in wanted]
        if reply.stopped and not reply.ended:
            self._held.setdefault(index, []).extend(shown)
            return False
        self._events.extend([*self._held.pop(index, ()), *shown])
        if reply.ended:
            self._open -= 1
            self._events.append(_ended(index, reply))
        elif len(self._events) > self._behind:
            self._fail(Overloaded("the client read the answer more slowly than it was generated"))
        self._wake()
        return reply.ended

    def _piece(self, index: int, piece: Text) -> Delta:
        infos = self._token_infos.of
        tokens = tuple(infos(token, place) for token, place in zip(piece.tokens, piece.places, strict=True))
        calls = (ToolCall(part.index, part.id, part.name, part.arguments) for part in piece.calls)
        return Delta(index, piece.text, tokens, tuple(calls))

    def _fail(self, error: MoesaicError) -> None:
        self._failed = error
        self.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        for reply in self._replies:
            if not reply.ended:
                reply.cancel()

    def ready(self) -> list[Event]:
        events = list(self._events)
        self._events.clear()
        return events

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._failed:
                raise self._failed
            if not self._open:
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


def _ended(index: int, reply: Reply) -> Finished:
    answer = reply.answer
    return Finished(
        index,
        answer.reason,
        answer.prompt_tokens,
        len(answer.tokens),
        answer.cached_tokens,
        answer.stop,
        answer.stop_id,
        has_tool_calls=bool(answer.calls) and all(call.whole for call in answer.calls),
    )
