"""A conversation with a model: what was said, how it is sampled, and the next answer.

Knows how a conversation is cut to the context, continued, taken back and repeated. Does not know a
terminal: answers come as pieces of text, and whoever shows them decides how.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moesaic.console import saved
from moesaic.engine import Sampling
from moesaic.errors import InvalidParameter, InvalidRequest, PromptTooLong
from moesaic.llm import LLM, MAX_CHARACTERS_PER_TOKEN, Reply
from moesaic.text import chat
from moesaic.text.chat import Message

RESERVED = 512
"""Tokens kept free for an answer whose length nobody bounded; never more than half the context."""


@dataclass(frozen=True)
class Statistics:
    """How one answer went. Times are in seconds."""

    reason: str
    """stop, length, cancelled, or failed."""
    prompt_tokens: int
    tokens: int
    """Tokens generated, the one that ended the answer among them."""
    first: float | None
    """From the question to the first token."""
    seconds: float
    """From the question to the end."""

    @property
    def tokens_per_second(self) -> float:
        """The pace of generation: the tokens after the first, by the time they took; of a single token, over all."""
        if self.first is None:
            return 0.0
        after = self.seconds - self.first
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        parts = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"]
        if self.first is not None:
            parts += [f"{self.tokens_per_second:.1f} tokens/s", f"first token {self.first:.2f} s"]
        ended = {"length": "cut at the token limit", "cancelled": "stopped", "failed": "failed"}
        return " · ".join([*parts, *([ended[self.reason]] if self.reason in ended else [])])


class Turn:
    """A question, and its answer on the way: enter it, iterate over the pieces of text, leave it.

    Leaving takes what has come into the conversation, also where the answer was stopped or failed. If
    no text came at all, the conversation stays as it was, and ``Conversation.retry`` asks again.

    Attributes:
        dropped: how many of the oldest messages did not fit and were not shown to the model.
        reason: how it ended; "cancelled" until it has.
    """

    def __init__(
        self, conversation: Conversation, said: Sequence[Message], reply: Reply, prompt_tokens: int, dropped: int
    ) -> None:
        self.dropped = dropped
        self.reason = "cancelled"
        self._conversation, self._said, self._reply, self._prompt_tokens = conversation, said, reply, prompt_tokens
        self._pieces: list[str] = []
        self._tokens = 0
        self._began = time.perf_counter()
        self._first: float | None = None
        self._last = self._began

    @property
    def text(self) -> str:
        """What has come so far."""
        return "".join(self._pieces)

    @property
    def statistics(self) -> Statistics:
        """How it went so far."""
        first = None if self._first is None else self._first - self._began
        return Statistics(self.reason, self._prompt_tokens, self._tokens, first, self._last - self._began)

    def __enter__(self) -> Self:
        return self

    def __iter__(self) -> Iterator[str]:
        """Yield the answer's text as it comes.

        Raises:
            NumericalError: the model computed NaN or infinity for this answer.
            EngineStopped: the engine was closed, or died.
        """
        self.reason = "failed"  # unless it gets to the end
        for piece in self._reply:
            self._last = time.perf_counter()
            if piece.tokens and self._first is None:
                self._first = self._last
            self._tokens += len(piece.tokens)
            if piece.text:
                self._pieces.append(piece.text)
                yield piece.text
        self.reason = self._reply.answer.reason

    def cancel(self) -> None:
        """Stop the answer: iteration ends after at most the step that is running. A signal handler may call this."""
        self._reply.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reason in ("failed", "cancelled"):
            self._reply.cancel()  # where the loop was left early, the engine still runs
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            self.reason = "cancelled"
        self._conversation.settle(self._said, self.text, complete=self.reason in ("stop", "length"))


class Conversation:
    """What was said, the settings, and the model that answers. For one thread.

    Attributes:
        system: the system prompt; empty: none.
        messages: everything said, without the system prompt, also what no longer fits the context.
        settings: the sampling values that were set; all others are as the checkpoint recommends.
        plain: no chat format: the text so far is continued, and each thing said begins a new line.
    """

    def __init__(
        self, llm: LLM, *, system: str = "", settings: Mapping[str, Any] | None = None, plain: bool = False
    ) -> None:
        """Begin a conversation.

        Raises:
            InvalidParameter: a setting is out of range.
            InvalidRequest: a system prompt in plain text, which has no place for it.
        """
        if plain and system:
            raise InvalidRequest("plain text has no system prompt: leave out one of the two")
        self.llm, self.plain, self.system = llm, plain, system
        self.messages: list[Message] = []
        self.settings = dict(settings or {})
        self._unanswered: Sequence[Message] | None = None  # what was said up to a question that got no answer
        self._sampling(self.settings)

    @property
    def sampling(self) -> Sampling:
        """The settings over what the checkpoint recommends."""
        return self._sampling(self.settings)

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        sampling = self.llm.sampling(**settings)
        if sampling.n != 1:
            raise InvalidParameter("n", f"is {sampling.n}, but a conversation goes on from one answer")
        return sampling

    def ask(self, text: str) -> Turn:
        """Start the answer to ``text``. Nothing of the conversation changes before the turn is left.

        Raises:
            PromptTooLong: the text does not fit the context, even with nothing before it.
            InvalidMessages: the chat format cannot hold the conversation.
            EngineStopped: the engine was closed, or died.
        """
        return self._start([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> Turn:
        """Start another answer to the last question; the former answer stays until the new one has come.

        Raises:
            InvalidRequest: nothing was asked yet.
        """
        if self._unanswered is not None:
            return self._start(self._unanswered)
        place = self._last_question()
        if place is None:
            raise InvalidRequest("there is nothing to repeat: ask something first")
        return self._start(self.messages[: place + 1])

    def undo(self) -> str:
        """Take the last question and its answer out of the conversation, and return the question.

        Raises:
            InvalidRequest: nothing was asked yet.
        """
        place = self._last_question()
        if place is None:
            raise InvalidRequest("there is nothing to undo")
        question = self.messages[place]["content"]
        del self.messages[place:]
        self._unanswered = None
        return question

    def reset(self) -> None:
        """Forget everything that was said; the system prompt and the settings stay."""
        self.messages.clear()
        self._unanswered = None

    def set(self, name: str, text: str) -> None:
        """Set a sampling value from how it is typed: JSON, a bare string, or ``default`` for the checkpoint's own.

        Raises:
            InvalidParameter: there is no such value, or it is out of range; nothing has changed then.
        """
        changed = {key: value for key, value in self.settings.items() if key != name}
        if text != "default":
            changed[name] = saved.typed(name, text)
        elif name not in Sampling.__dataclass_fields__:
            raise InvalidParameter(name, "is no sampling parameter")
        self._sampling(changed)
        self.settings = changed

    def save(self, path: Path) -> None:
        """Write messages and settings to ``path``.

        Raises:
            InvalidRequest: it cannot be written, or there is something else under this name.
        """
        saved.write(path, saved.Saved(self._with_system(self.messages), self.settings), self.llm.name)

    def load(self, path: Path) -> None:
        """Go on with the conversation in ``path``; if it cannot be read, this one stays as it is.

        Raises:
            NotFound: there is no such file.
            InvalidRequest: it is no conversation, or one with a system prompt where there is no place for it.
            InvalidMessages, InvalidParameter: a role or a setting in it does not exist.
        """
        found = saved.read(path)
        self._sampling(found.settings)
        system = found.messages[0]["content"] if found.messages and found.messages[0]["role"] == "system" else ""
        if system and self.plain:
            raise InvalidRequest(f"{path} has a system prompt, for which plain text has no place")
        self.system, self.settings = system, dict(found.settings)
        self.messages = list(found.messages[1:] if system else found.messages)
        self._unanswered = None

    def tokens(self) -> int:
        """Return how many tokens the conversation has, all of it, as a prompt would."""
        if not self.messages and not self.system:
            return 0
        said = self.messages
        if not said or said[-1]["role"] != "user":  # a prompt ends with what the user says
            said = [*said, {"role": "user", "content": ""}]
        return len(self._encode(self._with_system(said)))

    def settle(self, said: Sequence[Message], answer: str, *, complete: bool) -> None:
        """Take an answer into the conversation; an incomplete one only if there is something of it."""
        if complete or answer:
            self.messages = [*said, {"role": "assistant", "content": answer}]
            self._unanswered = None
        else:
            self._unanswered = said

    def _last_question(self) -> int | None:
        places = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        return places[-1] if places else None

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [*([Message(role="system", content=self.system)] if self.system else []), *messages]

    def _start(self, said: Sequence[Message]) -> Turn:
        kept, dropped = self._fit(self._with_system(said))
        ids = self._encode(kept)
        [reply] = self.llm.submit(ids, self.sampling, chat=not self.plain)
        return Turn(self, said, reply, len(ids), dropped)

    def _fit(self, messages: list[Message]) -> tuple[list[Message], int]:
        """Return (what the model is shown, how many messages are not): the oldest make room for the answer."""
        context = self.llm.context
        reserved = min(self.sampling.max_tokens or RESERVED, context // 2)
        try:
            return chat.fit(messages, self._count, context - reserved)
        except PromptTooLong:  # a long question may have a shorter answer
            self._encode(self._with_system(messages[-1:]))  # a hopeless one is refused here
            return chat.fit(messages, self._count, context - 1)

    def _count(self, messages: list[Message]) -> int:
        """Return the tokens of a prompt; of one that is far too long, any number that is too large."""
        characters = sum(len(message["content"]) for message in messages)
        hopeless = characters > MAX_CHARACTERS_PER_TOKEN * self.llm.context
        return characters if hopeless else len(self._encode(messages))

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        if self.plain:
            return self.llm.encode("\n".join(message["content"] for message in messages))
        return self.llm.encode_chat(messages)
