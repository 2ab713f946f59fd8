"""A running answer: the engine's events as text and calls, never half a character, never past a stop string.

Knows streams, tokenizers, stop strings and what finds calls. Does not know how a request came about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from moesaic.engine import Done, Event, PromptLogprobs, Request, Stream, Token
from moesaic.errors import InvalidParameter
from moesaic.text.stream import TextStream
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tool_parser import Part, ToolCallParser
from moesaic.text.tools import ToolCall


@dataclass(frozen=True)
class Text:
    """A piece of an answer: what can be shown now, the tokens that came, tools that are called. Any may be empty."""

    text: str
    tokens: tuple[Token, ...] = ()
    calls: tuple[ToolCall, ...] = ()


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
    calls: tuple[ToolCall, ...] = ()
    """The tools that it calls, in order; ``text`` is what it says besides."""
    alternatives: tuple[Answer, ...] = ()
    """With ``n`` > 1, the other n - 1 answers."""


class Reading:
    """What an answer says: its tokens as text and calls, one after the other.

    It follows from the tokens alone, so that an answer which goes on elsewhere reads the same there, but for the
    ids of calls that the model gave none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        *,
        strip: bool = False,
        skip_special: bool = True,
        begins: bool = True,
        calls: ToolCallParser | None = None,
    ) -> None:
        self._calls = calls
        marks = calls.control_tokens if calls else ()
        self._marks = {tokenizer.control[name]: name for name in marks if name in tokenizer.control}
        self._stop_ids = request.stop_ids
        self._satisfied = False  # has called all that it may
        self._strip = strip  # white space in front of the answer belongs to the format
        self._text = TextStream(tokenizer, request.sampling.stop, skip_special=skip_special, begins=begins)

    @property
    def stopped(self) -> str | None:
        """The stop string that was met."""
        return self._text.stopped

    @property
    def ended(self) -> bool:
        """Whether what was said ends the answer: a stop string, or all the calls that it may make."""
        return self._satisfied or self.stopped is not None

    def add(self, token: Token) -> Text:
        """Return what the answer's next token brings; not asked for once it has ended."""
        if token.id in self._stop_ids:  # it ends the answer and is no part of it
            return Text("", (token,))
        if self._calls and token.id in self._marks:
            before = self._split(self._text.finish())  # a mark ends what stands before it
            return self._show([*before, *self._calls.add_control_token(self._marks[token.id])], token)
        text, _ = self._text.add(token.id)
        piece = self._show(self._split(text), token)
        self._satisfied = self._calls is not None and self._calls.satisfied
        return piece

    def finish(self) -> Text:
        """Return what was held back, after the last token."""
        rest = self._split(self._text.finish())
        return self._show([*rest, *(self._calls.finish() if self._calls else ())])

    def _split(self, text: str) -> list[Part]:
        return self._calls.add_text(text) if self._calls else [text]

    def _show(self, parts: list[Part], *tokens: Token) -> Text:
        text = "".join(part for part in parts if isinstance(part, str))
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        return Text(text, tokens, tuple(part for part in parts if isinstance(part, ToolCall)))


def finished(request: Request, read: Callable[[], Reading]) -> frozenset[int]:
    """Return the indexes of answers that end, for what they say, with the tokens that they have already.

    Raises:
        InvalidParameter: one ends before its last token.
    """
    found = set()
    for index, given in enumerate(request.resume):
        reading = read()
        for place, id in enumerate(given):
            if reading.ended:
                why = f"answer {index} ends before its token {place}: give none behind the end"
                raise InvalidParameter("resume", why)
            reading.add(Token(id))
        if reading.ended:
            found.add(index)
    return frozenset(found)


class Reply:
    """A running answer: iterate over its pieces; afterwards ``answer`` is the whole. From one thread."""

    def __init__(self, stream: Stream, request: Request, reading: Reading) -> None:
        self.stream, self.request = stream, request
        self._reading = reading
        self._shown: list[Text] = []
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
            yield self._show(self._reading.finish())
        elif isinstance(event, PromptLogprobs):
            self._prompt_logprobs = event.tokens
        elif not self._reading.ended:
            piece = self._show(self._reading.add(event))
            if self._reading.ended:
                self.stream.cancel()
            yield piece

    def _show(self, piece: Text) -> Text:
        self._shown.append(piece)
        return piece

    def cancel(self) -> None:
        """Take the request back; iteration goes on to the end, which comes at once."""
        self.stream.cancel()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; the end comes with the engine's next step, if it has not been read."""
        return self._reading.stopped is not None

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
            text="".join(piece.text for piece in self._shown),
            reason="stop" if self._reading.ended else self._done.reason,
            tokens=tuple(token for piece in self._shown for token in piece.tokens),
            prompt_tokens=self._done.prompt_tokens,
            cached_tokens=self._done.cached_tokens,
            stop=self._reading.stopped,
            stop_id=self._done.stop_id if self._reading.stopped is None else None,
            prompt_logprobs=self._prompt_logprobs,
            calls=tuple(call for piece in self._shown for call in piece.calls),
        )
