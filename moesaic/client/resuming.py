"""One streamed answer, over as many connections as it takes.

A server that honours idempotency keys says so in the header ``idempotency-replayed`` of each answer, and tells the
same answer from its start when it is asked again under the same key. What was handed out already is then compared and
left out, so that whoever reads sees one answer, or an error: never the halves of two.

Knows what an answer is made of. Does not know sockets: ``sync`` and ``asynchronous`` bring the bytes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moesaic.client import replies
from moesaic.client.answers import Answer, CallPiece, Piece, TokenLogprob, ToolCall, Usage
from moesaic.client.events import Events
from moesaic.errors import AnswerChanged, BadReply, ConnectionFailed, MoesaicError, StreamBroken

REPLAYED = "idempotency-replayed"
CHANGED = "asked for the rest of an answer, the server told another one: ask anew"


class Strand:
    """One text of an answer, in pieces: what was handed out, and how far a replay has come in it."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._told = ""
        self._at = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def behind(self) -> bool:
        """Whether a replay has not come as far as what was handed out."""
        return self._at < len(self._told)

    def rewind(self) -> None:
        """Expect everything once more."""
        self._told, self._at = self.text, 0
        self._parts = [self._told]

    def add(self, text: str) -> str:
        """Return what of a piece is new.

        Raises:
            AnswerChanged: it is not what was handed out at this place.
        """
        known = self._told[self._at : self._at + len(text)]
        if not text.startswith(known):
            raise AnswerChanged(CHANGED)
        self._at += len(known)
        new = text[len(known) :]
        if new:
            self._parts.append(new)
        return new


@dataclass
class CallTold:
    """One call of a tool, as far as it has come."""

    id: str
    name: str
    arguments: Strand = field(default_factory=Strand)
    again: bool = True
    """Whether this connection has told of it."""

    def add(self, part: CallPiece) -> CallPiece | None:
        """Return what of a part is new.

        Raises:
            AnswerChanged: it is another call than the one that was handed out.
        """
        if (part.id and part.id != self.id) or (part.name and part.name != self.name):
            raise AnswerChanged(CHANGED)
        self.again = True
        new = self.arguments.add(part.arguments)
        return CallPiece(part.place, arguments=new) if new else None


class Choice:
    """One of the ``n`` answers, as far as it has come."""

    def __init__(self) -> None:
        self.text = Strand()
        self.calls: dict[int, CallTold] = {}
        self.logprobs: list[TokenLogprob] = []
        self.reason: str | None = None
        self._scored = 0
        """Log-probabilities that this connection has told."""

    @property
    def behind(self) -> bool:
        calls = any(call.arguments.behind or not call.again for call in self.calls.values())
        return calls or self.text.behind or self._scored < len(self.logprobs)

    def rewind(self) -> None:
        self.text.rewind()
        for call in self.calls.values():
            call.arguments.rewind()
            call.again = False
        self._scored = 0

    def add(self, piece: Piece) -> Piece | None:
        """Return what of a piece is new; None: nothing.

        Raises:
            AnswerChanged: it is not a piece of what was handed out.
        """
        text = self.text.add(piece.text)
        calls = tuple(new for part in piece.calls if (new := self._call(part)))
        scored = piece.logprobs[max(0, len(self.logprobs) - self._scored) :]
        self._scored += len(piece.logprobs)
        self.logprobs += scored
        reason = self._ended(piece.reason) if piece.reason else None
        if not (text or calls or scored or reason):
            return None
        return replace(piece, text=text, calls=calls, logprobs=scored, reason=reason)

    def _call(self, part: CallPiece) -> CallPiece | None:
        if known := self.calls.get(part.place):
            return known.add(part)
        call = self.calls[part.place] = CallTold(part.id, part.name)
        call.arguments.add(part.arguments)
        return part

    def _ended(self, reason: str) -> str | None:
        if self.behind or self.reason not in (None, reason):
            raise AnswerChanged(CHANGED)
        known, self.reason = self.reason, reason
        return None if known else reason

    def answer(self, head: Mapping[str, Any], used: Usage | None) -> Answer:
        calls = [self.calls[place] for place in sorted(self.calls)]
        return Answer(
            text=self.text.text,
            reason=self.reason or "",
            usage=used,
            calls=tuple(ToolCall(call.id, call.name, call.arguments.text) for call in calls),
            logprobs=tuple(self.logprobs) or None,
            id=head.get("id", ""),
            model=head.get("model", ""),
            raw=head,
        )


class Course:
    """The course of one streamed answer: bytes of its connections in, its pieces out."""

    def __init__(self) -> None:
        self._choices: dict[int, Choice] = {}
        self._events = Events()
        self._ready: deque[Piece] = deque()
        self._error: MoesaicError | None = None
        self._usage: Usage | None = None
        self._head: Mapping[str, Any] = {}
        self._request_id: str | None = None
        self._begun = self._resumable = False
        self.done = False
        """Whether the whole answer is there."""
        self.resumed = 0
        """How often it was asked for again and went on."""

    @property
    def text(self) -> str:
        """What has come of the first answer."""
        return self._choices[0].text.text if 0 in self._choices else ""

    def opened(self, headers: Mapping[str, str]) -> None:
        """Take up a connection that begins to tell the answer.

        Raises:
            StreamBroken: it was to be a replay, and the server does not do such a thing.
            BadReply: it brings no events.
        """
        if not headers.get("content-type", "").lower().startswith("text/event-stream"):
            raise BadReply("a stream was asked for, and the server sent something else")
        self._resumable = REPLAYED in headers
        if self._begun:
            if not self._resumable:
                raise StreamBroken("an answer broke off, and the server that was asked for the rest does not know it")
            self.resumed += 1
        self._request_id = headers.get("x-request-id")
        self._events = Events()
        for choice in self._choices.values():
            choice.rewind()

    def feed(self, data: bytes) -> bool:
        """Take bytes; return whether they brought something new. What they bring is there by ``take``."""
        self._begun = self._begun or bool(data)
        before = len(self._ready)
        try:
            for event in self._events.feed(data):
                if self.done:
                    break
                self._event(event)
        except MoesaicError as error:  # after what came before it
            self._error = error
        return self.done or self._error is not None or len(self._ready) > before

    def take(self) -> Piece | None:
        """Return the next piece; None: there is none yet.

        Raises:
            MoesaicError: what the server told of, or what makes the rest no rest of this answer.
        """
        if self._ready:
            return self._ready.popleft()
        if self._error:
            raise self._error
        return None

    def failed(self, cause: MoesaicError) -> MoesaicError:
        """Return the error that a failed try is, if no further one makes it good.

        Raises:
            StreamBroken: none can: some of the answer came, and the server does not know idempotency keys.
        """
        if not self._begun or not isinstance(cause, ConnectionFailed):
            return cause
        if not self._resumable:
            raise StreamBroken(f"the answer broke off ({cause}), and this server cannot go on with it") from cause
        broken = StreamBroken(f"the answer broke off ({cause}), and the server could not be asked for the rest")
        broken.__cause__ = cause
        return broken

    def answer(self) -> Answer:
        """Return the whole answer.

        Raises:
            StreamBroken: it is not there.
        """
        if not self.done:
            raise StreamBroken("the stream was left before its end: there is no whole answer")
        first, *others = (self._choices[index].answer(self._head, self._usage) for index in sorted(self._choices))
        return replace(first, request_id=self._request_id, alternatives=tuple(others))

    def _event(self, data: str) -> None:
        if data == "[DONE]":
            return self._end()
        try:
            chunk = json.loads(data)
        except ValueError:
            raise BadReply("the server sent an event that is no JSON") from None
        if isinstance(chunk, dict) and chunk.get("error"):
            error = replies.event_error(chunk)
            error.request_id = self._request_id
            raise error
        for piece in replies.read(replies.pieces, chunk):
            if new := self._choices.setdefault(piece.index, Choice()).add(piece):
                self._ready.append(new)
        self._usage = replies.read(lambda value: replies.usage(value.get("usage")), chunk) or self._usage
        self._head = {**self._head, **chunk}

    def _end(self) -> None:
        if any(choice.behind for choice in self._choices.values()):
            raise AnswerChanged(CHANGED)
        if not self._choices or not all(choice.reason for choice in self._choices.values()):
            raise BadReply("the server ended a stream without saying why the answer ends")
        self.done = True
