"""Decodes the events of the engine to the text and tool calls of an answer, while the answer is running.

Text contains only complete characters and ends before a stop string. This module does not depend on how requests are
made.
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
    """A piece of an answer: new text, new tokens and new tool calls, each of which may be empty."""

    text: str
    tokens: tuple[Token, ...] = ()
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A complete answer.

    ``reason`` is "stop" if the model, a stop string, a stop token or the grammar ended the answer. Otherwise it is
    "length" or "cancelled".
    """

    text: str
    reason: Literal["stop", "length", "cancelled"]
    tokens: tuple[Token, ...]
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were in the cache already."""
    stop: str | None = None
    """The stop string that ended the answer, if any."""
    stop_id: int | None = None
    """The id of the token that ended the answer, if any."""
    prompt_logprobs: tuple[Token, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    """The tool calls in order; ``text`` is the rest of the answer."""
    alternatives: tuple[Answer, ...] = ()
    """The other n - 1 answers of a request with ``n`` > 1."""


class AnswerDecoder:
    """Incremental decoder from the tokens of an answer to text and tool calls.

    The result depends on the tokens only, so an answer that continues on another worker decodes to the same text
    there. Only generated ids differ, for calls to which the model gave no id.
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
        self._satisfied = False  # all allowed tools were called
        self._strip = strip  # white space before the answer is part of the chat format
        self._text = TextStream(tokenizer, request.sampling.stop, skip_special=skip_special, begins=begins)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the answer, or None."""
        return self._text.stopped

    @property
    def ended(self) -> bool:
        """Whether a stop string, or the last allowed tool call, has ended the answer."""
        return self._satisfied or self.stopped is not None

    def add(self, token: Token) -> Text:
        """Decode the next token of the answer; it must not be called after the end."""
        if token.id in self._stop_ids:  # the stop token is not part of the text
            return Text("", (token,))
        if self._calls and token.id in self._marks:
            before = self._split(self._text.finish())  # a control token ends the text before it
            return self._show([*before, *self._calls.add_control_token(self._marks[token.id])], token)
        text, _ = self._text.add(token.id)
        piece = self._show(self._split(text), token)
        self._satisfied = self._calls is not None and self._calls.satisfied
        return piece

    def finish(self) -> Text:
        """Return the text that was held back, after the last token."""
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


def finished_answers(request: Request, new_decoder: Callable[[], AnswerDecoder]) -> frozenset[int]:
    """Return the indexes of answers that the tokens in ``request.resume`` complete, by a stop string or a tool call.

    Raises:
        InvalidParameter: an answer ends before the last of its tokens.
    """
    indexes = set()
    for index, token_ids in enumerate(request.resume):
        decoder = new_decoder()
        for position, token_id in enumerate(token_ids):
            if decoder.ended:
                problem = f"answer {index} ends before its token {position}: remove the tokens after the end"
                raise InvalidParameter("resume", problem)
            decoder.add(Token(token_id))
        if decoder.ended:
            indexes.add(index)
    return frozenset(indexes)


class Reply:
    """A running answer: iterating yields its pieces, and ``answer`` is the complete answer. It is for one thread."""

    def __init__(self, stream: Stream, request: Request, decoder: AnswerDecoder) -> None:
        self.stream, self.request = stream, request
        self._decoder = decoder
        self._shown: list[Text] = []
        self._prompt_logprobs: tuple[Token, ...] = ()
        self._done: Done | None = None

    def __iter__(self) -> Iterator[Text]:
        """Yield the pieces of the answer as they are generated.

        Raises:
            NumericalError: the model computed NaN or infinity for this answer.
            EngineStopped: the engine was closed or has failed; the cause is chained.
        """
        for event in self.stream:
            yield from self._read(event)

    def poll(self) -> list[Text]:
        """Return the pieces generated since the last call, without waiting; errors are those of iteration."""
        return [piece for event in self.stream.poll() for piece in self._read(event)]

    def _read(self, event: Event) -> Iterator[Text]:
        if isinstance(event, Done):
            self._done = event
            yield self._show(self._decoder.finish())
        elif isinstance(event, PromptLogprobs):
            self._prompt_logprobs = event.tokens
        elif not self._decoder.ended:
            piece = self._show(self._decoder.add(event))
            if self._decoder.ended:
                self.stream.cancel()
            yield piece

    def _show(self, piece: Text) -> Text:
        self._shown.append(piece)
        return piece

    def cancel(self) -> None:
        """Cancel the request; iteration then ends after the pieces that were generated."""
        self.stream.cancel()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer; the engine ends it with its next step."""
        return self._decoder.stopped is not None

    @property
    def ended(self) -> bool:
        """Whether the end of the answer was read."""
        return self._done is not None

    @property
    def prompt_logprobs(self) -> tuple[Token, ...]:
        """Log probabilities of the prompt's tokens, if requested; available before the first piece."""
        return self._prompt_logprobs

    @property
    def answer(self) -> Answer:
        """The complete answer; waits for its end."""
        for _ in self:
            pass
        assert self._done is not None, "a stream ended with neither Done nor an error"
        return Answer(
            text="".join(piece.text for piece in self._shown),
            reason="stop" if self._decoder.ended else self._done.reason,
            tokens=tuple(token for piece in self._shown for token in piece.tokens),
            prompt_tokens=self._done.prompt_tokens,
            cached_tokens=self._done.cached_tokens,
            stop=self._decoder.stopped,
            stop_id=self._done.stop_id if self._decoder.stopped is None else None,
            prompt_logprobs=self._prompt_logprobs,
            calls=tuple(call for piece in self._shown for call in piece.calls),
        )
