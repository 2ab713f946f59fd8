"""Converts conversations to token ids, and marks the ids that are learned: the assistant's answers and their ends.

The prompts and answers come from the chat format, so training sees what the model will see when it chats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moesaic.errors import InvalidRequest
from moesaic.text.chat import ChatFormat
from moesaic.text.messages import Message
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools
from moesaic.train.data import BadLine, Conversation, Preference, Records

R = TypeVar("R", Conversation, Preference)
E = TypeVar("E")

PROBE: Message = {"role": "user", "content": "?"}
"""Message that follows an answer, to see what a format writes at the end of one."""


@dataclass(frozen=True)
class Example:
    """A sequence to learn.

    Attributes:
        ids: token ids.
        learned: for each id, whether the model learns to predict it.
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]

    @property
    def targets(self) -> int:
        """Number of ids that are learned; nothing predicts the first one."""
        return sum(self.learned[1:])


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer to one prompt."""

    chosen: Example
    rejected: Example


class Encoder:
    """Converts records to examples of at most ``max_length`` tokens, which longer ones are cut to."""

    def __init__(self, chat_format: ChatFormat, tokenizer: Tokenizer, max_length: int) -> None:
        self._format, self._tokenizer, self._max_length = chat_format, tokenizer, max_length
        self._stop_ids = chat_format.stop_ids(tokenizer)
        self.shortened = 0
        """Number of examples that were cut."""

    def conversation(self, record: Conversation) -> list[Example]:
        """Return the examples of a conversation: one, or one for each answer.

        There is one for each answer if the format changes earlier parts of a conversation when it goes on. Then no
        sequence has all answers as the model will see them.

        Raises:
            InvalidMessages: the chat format cannot express the conversation.
            InvalidRequest: no answer is left within the largest length.
        """
        spans = [self._answer(record.messages[: index + 1], record.tools) for index in _answers(record.messages)]
        last, _ = spans[-1]
        learned = [False] * len(last)
        for ids, begin in spans:
            if last[: len(ids)] != ids:
                return _with_targets([self._from(ids, begin) for ids, begin in spans])
            learned[begin : len(ids)] = [True] * (len(ids) - begin)
        return _with_targets([self._cut(last, learned)])

    def preference(self, record: Preference) -> list[Pair]:
        """Return the pair of a preference. Errors are those of ``conversation``."""
        pair = []
        for text in (record.chosen, record.rejected):
            answer: Message = {"role": "assistant", "content": text}
            ids, begin = self._answer((*record.prompt, answer), None)
            pair += _with_targets([self._from(ids, begin)])
        return [Pair(*pair)]

    def _answer(self, messages: Sequence[Message], tools: Tools | None) -> tuple[list[int], int]:
        """Return the ids up to the end of the last message, an answer, and the number of ids before the answer."""
        prompt = self._format.encode(messages[:-1], self._tokenizer, tools=tools)
        ids = self._format.encode(messages, self._tokenizer, tools=tools, continue_final=True)
        begin = 0
        while begin < min(len(prompt), len(ids)) and prompt[begin] == ids[begin]:
            begin += 1  # the last id of a prompt may merge with the text of the answer
        return ids + self._end(messages, ids, tools), begin

    def _end(self, messages: Sequence[Message], ids: list[int], tools: Tools | None) -> list[int]:
        """Return the ids that end the answer with which ``ids`` ends, up to the one that stops the model."""
        longer = self._format.encode([*messages, PROBE], self._tokenizer, tools=tools)
        if longer[: len(ids)] == ids:
            for count, token_id in enumerate(longer[len(ids) :], 1):
                if token_id in self._stop_ids:
                    return longer[len(ids) : len(ids) + count]
        return sorted(self._tokenizer.eos_ids)[:1]

    def _from(self, ids: list[int], begin: int) -> Example:
        """Return the example in which the ids from ``begin`` on are learned."""
        return self._cut(ids, [False] * begin + [True] * (len(ids) - begin))

    def _cut(self, ids: list[int], learned: list[bool]) -> Example:
        self.shortened += len(ids) > self._max_length
        return Example(tuple(ids[: self._max_length]), tuple(learned[: self._max_length]))


def encode(records: Records[R], convert: Callable[[R], Sequence[E]]) -> tuple[list[E], tuple[BadLine, ...]]:
    """Return what ``convert`` makes of each record of a file, and all lines of the file that cannot be used."""
    found, bad = list[E](), list(records.bad)
    for record in records.good:
        try:
            found += convert(record)
        except InvalidRequest as error:
            bad.append(BadLine(record.number, str(error)))
    if not found:
        raise InvalidRequest(f"{records.path} has no usable line; {bad[0]}")
    return found, tuple(sorted(bad, key=lambda line: line.number))


def _answers(messages: Sequence[Message]) -> list[int]:
    """Return the places of the answers in a conversation."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _with_targets(examples: list[Example]) -> list[Example]:
    kept = [example for example in examples if example.targets]
    if not kept:
        raise InvalidRequest("no token of an answer is within the largest length")
    return kept
