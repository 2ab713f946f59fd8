"""Conversation with a model: messages, sampling settings, and running answers.

A conversation is truncated to the context, and supports undo and retry. This module does not depend on a terminal:
answers come as pieces of text, and the caller shows them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moesaic.console import conversation_file
from moesaic.engine import Sampling
from moesaic.errors import InvalidParameter, InvalidRequest, PromptTooLong
from moesaic.llm import LLM, Reply
from moesaic.text import chat
from moesaic.text.chat import Message
from moesaic.text.length import MAX_CHARACTERS_PER_TOKEN

RESERVED_TOKENS = 512
"""Number of tokens that are kept free for an answer without ``max_tokens``, but at most half of the context."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of one answer; times are in seconds."""

    reason: str
    """Reason for the end: stop, length, cancelled, or failed."""
    prompt_tokens: int
    tokens: int
    """Number of tokens of the answer, including the token that ended it."""
    first_token_seconds: float | None
    """Time from the question to the first token; None if no token was generated."""
    seconds: float
    """Time from the question to the end of the answer."""

    @property
    def tokens_per_second(self) -> float:
        """Generation speed: tokens after the first one per second since it; for a single token, 1 / ``seconds``."""
        if self.first_token_seconds is None:
            return 0.0
        after = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        parts = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"]
        if self.first_token_seconds is not None:
            parts += [f"{self.tokens_per_second:.1f} tokens/s", f"first token {self.first_token_seconds:.2f} s"]
        endings = {"length": "cut at the token limit", "cancelled": "stopped", "failed": "failed"}
        return " · ".join([*parts, *([endings[self.reason]] if self.reason in endings else [])])


class Turn:
    """A question and its running answer. Use it as a context manager, and iterate over it for the pieces of text.

    On exit, the question and the received text are added to the conversation, even if the answer was stopped or failed.
    If there is no text, the conversation does not change, and ``Conversation.retry`` asks the question again.

    Attributes:
        dropped: number of the oldest messages that did not fit into the context and were not sent to the model.
        reason: reason for the end of the answer; before the end, "cancelled" or "failed".
    """

    def __init__(
        self, conversation: Conversation, messages: Sequence[Message], reply: Reply, prompt_tokens: int, dropped: int
    ) -> None:
        self.dropped = dropped
        self.reason = "cancelled"
        self._conversation, self._messages, self._reply = conversation, messages, reply
        self._prompt_tokens = prompt_tokens
        self._pieces: list[str] = []
        self._tokens = 0
        self._started = time.perf_counter()
        self._first_token: float | None = None
        self._last_piece = self._started

    @property
    def text(self) -> str:
        """The part of the answer's text that has been received."""
        return "".join(self._pieces)

    @property
    def statistics(self) -> Statistics:
        """Statistics of the answer so far."""
        first = None if self._first_token is None else self._first_token - self._started
        return Statistics(self.reason, self._prompt_tokens, self._tokens, first, self._last_piece - self._started)

    def __enter__(self) -> Self:
        return self

    def __iter__(self) -> Iterator[str]:
        """Yield the text of the answer as it comes.

        Raises:
            NumericalError: the model computed NaN or infinity for this answer.
            EngineStopped: the engine was closed, or has failed.
        """
        self.reason = "failed"  # until the answer is complete
        for piece in self._reply:
            self._last_piece = time.perf_counter()
            if piece.tokens and self._first_token is None:
                self._first_token = self._last_piece
            self._tokens += len(piece.tokens)
            if piece.text:
                self._pieces.append(piece.text)
                yield piece.text
        self.reason = self._reply.answer.reason

    def cancel(self) -> None:
        """Stop the answer after the engine's current step. A signal handler may call this method."""
        self._reply.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reason in ("failed", "cancelled"):
            self._reply.cancel()  # after an early exit from the loop the engine still generates
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            self.reason = "cancelled"
        self._conversation.record(self._messages, self.text, complete=self.reason in ("stop", "length"))


class Conversation:
    """Messages, settings and the model of one conversation; not thread-safe.

    Attributes:
        system: the system prompt; empty if there is none.
        messages: all messages except the system prompt, including those that no longer fit into the context.
        settings: the sampling parameters that were set; the others have the checkpoint's recommended values.
        plain: whether no chat format is used; the model then continues plain text, with each message on a new line.
    """

    def __init__(
        self, llm: LLM, *, system: str = "", settings: Mapping[str, Any] | None = None, plain: bool = False
    ) -> None:
        """Start an empty conversation with a model.

        Raises:
            InvalidParameter: a setting is invalid.
            InvalidRequest: ``system`` is set and ``plain`` is true.
        """
        if plain and system:
            raise InvalidRequest(
                "a chat in plain text has no system prompt: leave out either plain text or the system prompt"
            )
        self.llm, self.plain, self.system = llm, plain, system
        self.messages: list[Message] = []
        self.settings = dict(settings or {})
        self._unanswered: Sequence[Message] | None = None  # the messages up to a question without an answer
        self._sampling(self.settings)

    @property
    def sampling(self) -> Sampling:
        """Sampling parameters: the settings, and the checkpoint's recommendations for the rest."""
        return self._sampling(self.settings)

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        sampling = self.llm.sampling(**settings)
        if sampling.n != 1:
            raise InvalidParameter("n", f"is {sampling.n}, but a conversation needs exactly one answer: use 1")
        return sampling

    def ask(self, text: str) -> Turn:
        """Start the answer to ``text``. The conversation changes only when the ``with`` block of the turn ends.

        Raises:
            PromptTooLong: the text alone does not fit into the context.
            InvalidMessages: the chat format cannot represent the conversation.
            EngineStopped: the engine was closed, or has failed.
        """
        return self._start([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> Turn:
        """Start another answer to the last question. It replaces the old one when the turn's ``with`` block ends.

        Raises:
            InvalidRequest: there is no question yet.
        """
        if self._unanswered is not None:
            return self._start(self._unanswered)
        index = self._last_question()
        if index is None:
            raise InvalidRequest("nothing to answer again: ask a question first")
        return self._start(self.messages[: index + 1])

    def undo(self) -> str:
        """Remove the last question and its answer, and return the question.

        Raises:
            InvalidRequest: there is no question yet.
        """
        index = self._last_question()
        if index is None:
            raise InvalidRequest("nothing to undo: the conversation is empty")
        question = self.messages[index]["content"]
        del self.messages[index:]
        self._unanswered = None
        return question

    def reset(self) -> None:
        """Remove all messages; the system prompt and the settings stay."""
        self.messages.clear()
        self._unanswered = None

    def set(self, name: str, text: str) -> None:
        """Set the sampling parameter ``name`` from text: JSON, a string, or ``default`` for the checkpoint's value.

        Raises:
            InvalidParameter: the parameter is unknown or the value is invalid; the settings are unchanged.
        """
        changed = {key: value for key, value in self.settings.items() if key != name}
        if text != "default":
            changed[name] = conversation_file.parse_setting(name, text)
        elif name not in Sampling.__dataclass_fields__:
            raise InvalidParameter(name, "is not a sampling parameter")
        self._sampling(changed)
        self.settings = changed

    def save(self, path: Path) -> None:
        """Save the messages and the settings to ``path``.

        Raises:
            InvalidRequest: the file cannot be written, or exists and is not a saved conversation.
        """
        content = conversation_file.SavedConversation(self._with_system(self.messages), self.settings)
        conversation_file.write(path, content, self.llm.name)

    def load(self, path: Path) -> None:
        """Replace this conversation by the one in the file ``path``. After an error, it is unchanged.

        Raises:
            NotFound: the file does not exist.
            InvalidRequest: the file is not a conversation, or has a system prompt and ``plain`` is true.
            InvalidMessages, InvalidParameter: a message or a setting in the file is invalid.
        """
        content = conversation_file.read(path)
        self._sampling(content.settings)
        messages = content.messages
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        if system and self.plain:
            raise InvalidRequest(
                f"{path} has a system prompt, but a chat in plain text has none: start without --plain-text"
            )
        self.system, self.settings = system, dict(content.settings)
        self.messages = list(messages[1:] if system else messages)
        self._unanswered = None

    def tokens(self) -> int:
        """Return the number of tokens of a prompt that contains the whole conversation."""
        if not self.messages and not self.system:
            return 0
        messages = self.messages
        if not messages or messages[-1]["role"] != "user":  # a prompt ends with a message of the user
            messages = [*messages, {"role": "user", "content": ""}]
        return len(self._encode(self._with_system(messages)))

    def record(self, messages: Sequence[Message], answer: str, *, complete: bool) -> None:
        """Make the conversation ``messages`` and the answer to their last one, unless it is incomplete and empty."""
        if complete or answer:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            self._unanswered = None
        else:
            self._unanswered = messages

    def _last_question(self) -> int | None:
        indexes = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        return indexes[-1] if indexes else None

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [*([Message(role="system", content=self.system)] if self.system else []), *messages]

    def _start(self, messages: Sequence[Message]) -> Turn:
        kept, dropped = self._truncate(self._with_system(messages))
        ids = self._encode(kept)
        [reply] = self.llm.submit(ids, self.sampling, chat=not self.plain)
        return Turn(self, messages, reply, len(ids), dropped)

    def _truncate(self, messages: list[Message]) -> tuple[list[Message], int]:
        """Remove the oldest messages to make room for the answer; return the others, and the number of removed ones."""
        context = self.llm.context
        reserved = min(self.sampling.max_tokens or RESERVED_TOKENS, context // 2)
        try:
            return chat.truncate(messages, self._count, context - reserved)
        except PromptTooLong:  # reserve less for the answer, since the question is long
            self._encode(self._with_system(messages[-1:]))  # raises if the question alone is too long
            return chat.truncate(messages, self._count, context - 1)

    def _count(self, messages: list[Message]) -> int:
        """Return the number of tokens of a prompt; if it is far too long, its number of characters instead."""
        characters = sum(len(message["content"]) for message in messages)
        too_long = characters > MAX_CHARACTERS_PER_TOKEN * self.llm.context
        return characters if too_long else len(self._encode(messages))

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        if self.plain:
            return self.llm.encode("\n".join(message["content"] for message in messages))
        return self.llm.encode_chat(messages)
