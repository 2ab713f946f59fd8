"""A running answer: the engine's events as text and calls, never half a character, never past a stop string.

Knows streams, tokenizers, stop strings and what finds calls. Does not know how a request came about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moesaic.engine import Done, Event, PromptLogprobs, Request, Stream, Token
from moesaic.text.calls import Calls, Part
from moesaic.text.stream import TextStream
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Call


@dataclass(frozen=True)
class Text:
    """A piece of an answer: what can be shown now, the tokens that came, tools that are called. Any may be empty."""

    text: str
    tokens: tuple[Token, ...] = ()
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    ``reason`` is "stop" (the model ended it, or a stop string or id did, or its grammar), "length" or "cancelled".
    """

    text: str
    reason: Literal["stop", "length", "cancelled"]
    tokens: tuple[Token, ...]
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were still in the cache."""
    stop: str | None = None
    """The stop string that was met."""
    stop_id: int | None = None
    """The token that ended it."""
    prompt_logprobs: tuple[Token, ...] = ()
    calls: tuple[Call, ...] = ()
    """The tools that it calls, in order; ``text`` is what it says besides."""
    alternatives: tuple[Answer, ...] = ()
    """With ``n`` > 1, the other n - 1 answers."""


class Reply:
    """A running answer: iterate over its pieces; afterwards ``answer`` is the whole. From one thread."""

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        request: Request,
        *,
        strip: bool = False,
        skip_special: bool = True,
        begins: bool = True,
        calls: Calls | None = None,
    ) -> None:
        self.stream, self.request = stream, request
        self._calls = calls
        marks = {tokenizer.control[name]: name for name in calls.marks if name in tokenizer.control} if calls else {}
        self._marks, self._called = marks, list[Call]()
        self._satisfied = False  # has called all that it may
        self._strip = strip  # white space in front of the answer belongs to the format
        self._text = TextStream(tokenizer, request.sampling.stop, skip_special=skip_special, begins=begins)
        self._shown: list[str] = []
        self._tokens: list[Token] = []
        self._prompt_logprobs: tuple[Token, ...] = ()
        self._done: Done | None = None

    def __iter__(self) -> Iterator[Text]:
        """Yield pieces as they come.

        Raises:
            NumericalError: the model computed NaN or infinity for this answer.
            EngineStopped: the engine was closed, or died; the cause is chained.
        """
        for event in self.stream:
            yield from self._read(event)

    def poll(self) -> list[Text]:
        """Return the pieces that have come so far, without waiting. Raises as iteration does."""
        return [piece for event in self.stream.poll() for piece in self._read(event)]

    def _read(self, event: Event) -> Iterator[Text]:
        if isinstance(event, Done):
            self._done = event
            rest = self._split(self._text.finish())
            yield self._show([*rest, *(self._calls.finish() if self._calls else ())])
        elif isinstance(event, PromptLogprobs):
            self._prompt_logprobs = event.tokens
        elif self._text.stopped is None and not self._satisfied:
            yield self._take(event)

    def _take(self, token: Token) -> Text:
        self._tokens.append(token)
        if token.id in self.request.stop_ids:  # it ends the answer and is no part of it
            return Text("", (token,))
        if self._calls and token.id in self._marks:
            before = self._split(self._text.finish())  # a mark ends what stands before it
            return self._show([*before, *self._calls.mark(self._marks[token.id])], token)
        text, stopped = self._text.add(token.id)
        piece = self._show(self._split(text), token)
        self._satisfied = self._calls is not None and self._calls.satisfied
        if stopped or self._satisfied:
            self.stream.cancel()
        return piece

    def _split(self, text: str) -> list[Part]:
        return self._calls.add(text) if self._calls else [text]

    def _show(self, parts: list[Part], *tokens: Token) -> Text:
        text = "".join(part for part in parts if isinstance(part, str))
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        calls = tuple(part for part in parts if isinstance(part, Call))
        self._shown.append(text)
        self._called += calls
        return Text(text, tokens, calls)

    def cancel(self) -> None:
        """Take the request back; iteration goes on to the end, which comes at once."""
        self.stream.cancel()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; the end comes with the engine's next step, if it has not been read."""
        return self._text.stopped is not None

    @property
    def ended(self) -> bool:
        """Whether the end has been read."""
        return self._done is not None

    @property
    def prompt_logprobs(self) -> tuple[Token, ...]:
        """Of the prompt's tokens, if asked for; there before the first piece."""
        return self._prompt_logprobs

    @property
    def answer(self) -> Answer:
        """The whole answer; reads to its end first."""
        for _ in self:
            pass
        assert self._done is not None, "a stream ended with neither Done nor an error"
        return Answer(
            text="".join(self._shown),
            reason="stop" if self._text.stopped is not None or self._satisfied else self._done.reason,
            tokens=tuple(self._tokens),
            prompt_tokens=self._done.prompt_tokens,
            cached_tokens=self._done.cached_tokens,
            stop=self._text.stopped,
            stop_id=self._done.stop_id if self._text.stopped is None else None,
            prompt_logprobs=self._prompt_logprobs,
            calls=tuple(self._called),
        )
