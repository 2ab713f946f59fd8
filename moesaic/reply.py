"""Decodes the events of the engine to the text and tool calls of an answer, while the answer is running.

Text contains only complete characters and ends before a stop string. This module does not depend on how requests are
made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moesaic.engine import Done, Event, PromptLogprobs, Request, Stream, Token
from moesaic.errors import InvalidParameter
from moesaic.text.stream import TextStream
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tool_parser import Part, ToolCallParser
from moesaic.text.tools import CallPart, ToolCall, join_calls


@dataclass(frozen=True)
class Text:
    """A piece of a running answer: the text, tokens and parts of tool calls that are new. Each may be empty.

    In the model's output, parts that continue a call of an earlier piece precede the text, and new calls follow it.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    calls: tuple[CallPart, ...] = ()
    places: tuple[TokenPlace | None, ...] = ()
    """For each token, what it adds to the text of the answer; None for a token without log-probabilities."""


@dataclass(frozen=True)
class TokenPlace:
    """What a token of an answer, and each of its likely alternatives, adds to the answer's text at its place."""

    offset: int
    """Number of characters of the answer that were complete before this token."""
    data: bytes
    """UTF-8 bytes that the token adds to the text; b"" for a special token whose name the text omits."""
    top: tuple[bytes, ...] = ()
    """The UTF-8 bytes that each alternative in ``Token.top`` would add instead."""


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
    """The stop string that ended the answer; None: no stop string ended it."""
    stop_id: int | None = None
    """The id of the token that ended the answer, such as an end-of-text token; None: no token ended it."""
    prompt_logprobs: tuple[Token, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    """The tool calls in order; ``text`` is the answer without them. If the answer was cut off, the last may be too."""
    alternatives: tuple[Answer, ...] = ()
    """The other n - 1 answers of a request with ``n`` > 1."""


class AnswerDecoder:
    """Incremental decoder from the tokens of an answer to text and tool calls.

    The result depends on the tokens only, so an answer that continues on another worker decodes to the same text
    there. Only ids that the decoder makes, for tool calls to which the model gave no id, differ.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        *,
        strip: bool = False,
        skip_special: bool = True,
        begins: bool = True,
        included: Collection[str | int] = (),
        calls: ToolCallParser | None = None,
    ) -> None:
        """Create a decoder.

        Args:
            tokenizer: the tokenizer of the model.
            request: the request; its stop strings and stop ids end the text.
            strip: drop white space at the beginning of the answer.
            skip_special: omit the names of special tokens from the text.
            begins: the answer begins a text, so that a leading space of the tokenizer is dropped.
            included: the stop strings and stop ids that stay in the text.
            calls: the parser that finds the tool calls of the answer; None: the request has no tools.
        """
        self._calls = calls
        marks = calls.control_tokens if calls else ()
        self._marks = {tokenizer.control[name]: name for name in marks if name in tokenizer.control}
        self._stop_ids = request.stop_ids
        self._satisfied = False  # all allowed tools were called
        self._strip = strip  # white space before the answer is part of the chat format
        self._included = included
        self._text = TextStream(
            tokenizer, request.sampling.stop, skip_special=skip_special, begins=begins, included=included
        )

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the answer; None: no stop string has ended it."""
        return self._text.stopped

    @property
    def ended(self) -> bool:
        """Whether a stop string, or the last tool call that the request allows, has ended the answer."""
        return self._satisfied or self.stopped is not None

    def add(self, token: Token) -> Text:
        """Decode the next token of the answer; return the new piece of the answer that can be shown.

        It must not be called once ``ended`` is true.
        """
        place = self._place(token)
        if token.id in self._stop_ids and token.id not in self._included:
            return Text("", (token,), places=(place and replace(place, data=b""),))
        if self._calls and token.id in self._marks:
            before = self._split(self._text.finish())  # a control token ends the text before it
            parts = [*before, *self._calls.add_control_token(self._marks[token.id])]
        else:
            parts = self._split(self._text.add(token.id)[0])
        self._satisfied = self._calls is not None and self._calls.satisfied
        return self._show(parts, (token,), (place,))

    def _place(self, token: Token) -> TokenPlace | None:
        if token.logprob is None:
            return None
        data = [self._text.bytes(token_id) for token_id in (token.id, *(token_id for token_id, _ in token.top))]
        if self._strip:
            data = [_without_leading_space(each) for each in data]
        return TokenPlace(self._text.decoded, data[0], tuple(data[1:]))

    def finish(self, *, cut: bool = False) -> Text:
        """Return the last piece of the answer: text and calls that were held back until the last token was known.

        ``cut``: the answer was cut off by a limit or cancelled, so its last tool call may be incomplete.
        """
        rest = self._split(self._text.finish())
        return self._show([*rest, *(self._calls.finish(cut=cut) if self._calls else ())])

    def _split(self, text: str) -> list[Part]:
        return self._calls.add_text(text) if self._calls else [text]

    def _show(
        self, parts: list[Part], tokens: tuple[Token, ...] = (), places: tuple[TokenPlace | None, ...] = ()
    ) -> Text:
        text = "".join(part for part in parts if isinstance(part, str))
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        return Text(text, tokens, tuple(part for part in parts if isinstance(part, CallPart)), places)


def _without_leading_space(data: bytes) -> bytes:
    """Return the bytes of a token without leading white space. Bytes of an incomplete character are kept."""
    return data.decode(errors="surrogateescape").lstrip().encode(errors="surrogateescape")


def finished_answers(request: Request, new_decoder: Callable[[], AnswerDecoder]) -> frozenset[int]:
    """Return the indexes of answers that are complete already, with the tokens in ``request.resume``.

    A stop string or the last allowed tool call ends them. ``new_decoder`` makes a decoder for one answer.

    Raises:
        InvalidParameter: an answer ends before the last of its tokens in ``request.resume``.
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
    """A running answer. Iteration yields its pieces; ``answer`` waits for the complete answer.

    Only one thread at a time may use it.
    """

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
        """Return the pieces generated since the last call, or [], without waiting. Errors are as for iteration."""
        return [piece for event in self.stream.poll() for piece in self._read(event)]

    def _read(self, event: Event) -> Iterator[Text]:
        if isinstance(event, Done):
            self._done = event
            cut = event.reason != "stop" and not self._decoder.ended
            yield self._show(self._decoder.finish(cut=cut))
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
        """Cancel the generation of this answer. Iteration ends after the pieces that were generated before."""
        self.stream.cancel()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: no more text comes, and ``ended`` follows with the engine's next step."""
        return self._decoder.stopped is not None

    @property
    def ended(self) -> bool:
        """Whether the last event of the answer was read, so that no more pieces come."""
        return self._done is not None

    @property
    def prompt_logprobs(self) -> tuple[Token, ...]:
        """The prompt's tokens with log-probabilities, known before the first piece; () if not requested."""
        return self._prompt_logprobs

    @property
    def answer(self) -> Answer:
        """The complete answer. Reading it waits until the answer has ended; errors are those of iteration."""
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
            calls=join_calls(part for piece in self._shown for part in piece.calls),
        )
