"""Resumption of a streamed answer that breaks: one answer over several connections.

A server that supports idempotency keys sends the header ``idempotency-replayed`` with each answer. If the request is
repeated under the same key, it replays the same answer from the start. This module compares the replay with the text
that it has already returned and skips that part. The caller sees one answer or an error, never parts of two answers.

This module does no network I/O: ``asynchronous`` and ``sync`` pass it the bytes of each connection.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moesaic.client import responses
from moesaic.client.answers import Answer, CallPiece, Piece, TokenLogprob, ToolCall, Usage
from moesaic.client.events import EventParser
from moesaic.errors import AnswerChanged, BadReply, ConnectionFailed, MoesaicError, StreamBroken

REPLAYED_HEADER = "idempotency-replayed"
CHANGED = "the server sent a different answer when the stream was resumed; send a new request"


class ReplayedText:
    """A text of an answer: the part that the caller has received, and how far a new connection has replayed it."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._expected = ""
        self._position = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def incomplete(self) -> bool:
        """Whether the new connection has not yet replayed all of the text that the caller has received."""
        return self._position < len(self._expected)

    def rewind(self) -> None:
        """Prepare for a new connection, which replays the text from its start."""
        self._expected, self._position = self.text, 0
        self._parts = [self._expected]

    def add(self, text: str) -> str:
        """Process the next ``text`` of the connection; return what the caller has not received yet.

        Raises:
            AnswerChanged: the replay differs from the text that the caller has received.
        """
        expected = self._expected[self._position : self._position + len(text)]
        if not text.startswith(expected):
            raise AnswerChanged(CHANGED)
        self._position += len(expected)
        new = text[len(expected) :]
        if new:
            self._parts.append(new)
        return new


@dataclass
class ReplayedCall:
    """One tool call of an answer, as received until now."""

    id: str
    name: str
    arguments: ReplayedText = field(default_factory=ReplayedText)
    replayed: bool = True
    """Whether the current connection has sent (a part of) this call."""

    def add(self, part: CallPiece) -> CallPiece | None:
        """Process the next part of this call from the connection; return what is new to the caller, or None.

        Raises:
            AnswerChanged: the replay has a different call at this index.
        """
        if (part.id and part.id != self.id) or (part.name and part.name != self.name):
            raise AnswerChanged(CHANGED)
        self.replayed = True
        new = self.arguments.add(part.arguments)
        return CallPiece(part.place, arguments=new) if new else None


class ReplayedChoice:
    """One of the ``n`` answers of a request, as received until now."""

    def __init__(self) -> None:
        self.text = ReplayedText()
        self.calls: dict[int, ReplayedCall] = {}
        self.logprobs: list[TokenLogprob] = []
        self.reason: str | None = None
        self._replayed_logprobs = 0
        """Number of tokens whose log-probabilities the current connection has sent."""

    @property
    def incomplete(self) -> bool:
        """Whether the new connection has not yet replayed everything that the caller has received."""
        calls = any(call.arguments.incomplete or not call.replayed for call in self.calls.values())
        return calls or self.text.incomplete or self._replayed_logprobs < len(self.logprobs)

    def rewind(self) -> None:
        """Prepare for a new connection, which replays the answer from its start."""
        self.text.rewind()
        for call in self.calls.values():
            call.arguments.rewind()
            call.replayed = False
        self._replayed_logprobs = 0

    def add(self, piece: Piece) -> Piece | None:
        """Process the next piece of this answer from the connection; return what is new to the caller, or None.

        Raises:
            AnswerChanged: the replay differs from what the caller has received.
        """
        text = self.text.add(piece.text)
        calls = tuple(new for part in piece.calls if (new := self._add_call(part)))
        logprobs = piece.logprobs[max(0, len(self.logprobs) - self._replayed_logprobs) :]
        self._replayed_logprobs += len(piece.logprobs)
        self.logprobs += logprobs
        reason = self._finish(piece.reason) if piece.reason else None
        if not (text or calls or logprobs or reason):
            return None
        return replace(piece, text=text, calls=calls, logprobs=logprobs, reason=reason)

    def _add_call(self, part: CallPiece) -> CallPiece | None:
        if call := self.calls.get(part.place):
            return call.add(part)
        call = self.calls[part.place] = ReplayedCall(part.id, part.name)
        call.arguments.add(part.arguments)
        return part

    def _finish(self, reason: str) -> str | None:
        if self.incomplete or self.reason not in (None, reason):
            raise AnswerChanged(CHANGED)
        previous, self.reason = self.reason, reason
        return None if previous else reason

    def answer(self, raw: Mapping[str, Any], usage: Usage | None) -> Answer:
        calls = [self.calls[index] for index in sorted(self.calls)]
        return Answer(
            text=self.text.text,
            reason=self.reason or "",
            usage=usage,
            calls=tuple(ToolCall(call.id, call.name, call.arguments.text) for call in calls),
            logprobs=tuple(self.logprobs) or None,
            id=raw.get("id", ""),
            model=raw.get("model", ""),
            raw=raw,
        )


class ResumableStream:
    """Parser of one streamed answer: it takes the bytes of one connection after another and returns pieces."""

    def __init__(self) -> None:
        self._choices: dict[int, ReplayedChoice] = {}
        self._parser = EventParser()
        self._ready: deque[Piece] = deque()
        self._error: MoesaicError | None = None
        self._usage: Usage | None = None
        self._raw: Mapping[str, Any] = {}
        self._request_id: str | None = None
        self._begun = self._resumable = False
        self.done = False
        """Whether the answer is complete."""
        self.resumed = 0
        """Number of times that a new connection continued the answer."""

    @property
    def text(self) -> str:
        """The text of the first answer, as received until now."""
        return self._choices[0].text.text if 0 in self._choices else ""

    def start_connection(self, headers: Mapping[str, str]) -> None:
        """Start to parse the response of a new connection, which has these ``headers``.

        Raises:
            StreamBroken: the answer has begun, and the server cannot replay it.
            BadReply: the response is not an event stream.
        """
        if not headers.get("content-type", "").lower().startswith("text/event-stream"):
            raise BadReply("the request asked for a stream, but the response is not an event stream; check base_url")
        self._resumable = REPLAYED_HEADER in headers
        if self._begun:
            if not self._resumable:
                raise StreamBroken("the answer broke off, and the server no longer has it; send a new request")
            self.resumed += 1
        self._request_id = headers.get("x-request-id")
        self._parser = EventParser()
        for choice in self._choices.values():
            choice.rewind()

    def feed(self, data: bytes) -> bool:
        """Parse bytes of the connection; return whether they brought new pieces, the end or an error for ``take``."""
        self._begun = self._begun or bool(data)
        before = len(self._ready)
        try:
            for event in self._parser.feed(data):
                if self.done:
                    break
                self._handle_event(event)
        except MoesaicError as error:  # raised by take(), after the pieces that came before it
            self._error = error
        return self.done or self._error is not None or len(self._ready) > before

    def take(self) -> Piece | None:
        """Return the next piece of the answer; None if more bytes are needed.

        Raises:
            MoesaicError: the server sent an error, or the stream is invalid.
        """
        if self._ready:
            return self._ready.popleft()
        if self._error:
            raise self._error
        return None

    def failure(self, cause: MoesaicError) -> MoesaicError:
        """Return the error to raise if no further try succeeds after ``cause``.

        Raises:
            StreamBroken: a further try cannot help: the answer has begun, and the server does not support
                idempotency keys.
        """
        if not self._begun or not isinstance(cause, ConnectionFailed):
            return cause
        if not self._resumable:
            why = f"the answer broke off ({cause}), and this server cannot resume it; send a new request"
            raise StreamBroken(why) from cause
        broken = StreamBroken(f"the answer broke off ({cause}), and it could not be resumed; send a new request")
        broken.__cause__ = cause
        return broken

    def answer(self) -> Answer:
        """Return the complete answer.

        Raises:
            StreamBroken: the answer is not complete.
        """
        if not self.done:
            raise StreamBroken("the stream ended early, so the answer is not complete; send a new request")
        first, *others = (self._choices[index].answer(self._raw, self._usage) for index in sorted(self._choices))
        return replace(first, request_id=self._request_id, alternatives=tuple(others))

    def _handle_event(self, data: str) -> None:
        if data == "[DONE]":
            return self._finish()
        try:
            chunk = json.loads(data)
        except ValueError:
            raise BadReply("the server sent an event that is not valid JSON; check base_url") from None
        if isinstance(chunk, dict) and chunk.get("error"):
            error = responses.event_error(chunk)
            error.request_id = self._request_id
            raise error
        for piece in responses.parse(responses.parse_pieces, chunk):
            if new := self._choices.setdefault(piece.index, ReplayedChoice()).add(piece):
                self._ready.append(new)
        usage = responses.parse(lambda content: responses.parse_usage(content.get("usage")), chunk)
        self._usage = usage or self._usage
        self._raw = {**self._raw, **chunk}

    def _finish(self) -> None:
        if any(choice.incomplete for choice in self._choices.values()):
            raise AnswerChanged(CHANGED)
        if not self._choices or not all(choice.reason for choice in self._choices.values()):
            raise BadReply("the server ended the stream without a finish reason")
        self.done = True
