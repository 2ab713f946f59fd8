"""Reads training data from JSONL files, in the forms that people have them in.

A line is a JSON object. Conversations have one of these forms:

    messages                       OpenAI's list of messages, optionally with ``tools``
    conversations                  ShareGPT's list of {"from", "value"}
    instruction, input, output     Alpaca's fields; ``input`` may be missing or empty
    prompt, completion             two texts, or two lists of messages

Preferences have ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages. Without ``prompt``, it is what
the other two lists have in common at their beginning.

A line that is none of these is no reason to stop: it is kept as a ``BadLine`` with its number and the reason. This
module does not depend on a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from moesaic.errors import InvalidRequest, MoesaicError
from moesaic.text.messages import Message, validate
from moesaic.text.tools import Tools
from moesaic.text_files import open_text

T = TypeVar("T")

SUFFIXES = (".jsonl", ".json", ".jsonl.xz")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
}
CONVERSATION_FORMS = "messages; conversations; instruction and output; or prompt and completion"
PREFERENCE_FORMS = "prompt, chosen and rejected; or chosen and rejected as lists of messages"


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used: its number, from 1 on, and the reason."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.reason}"


@dataclass(frozen=True)
class Conversation:
    """A conversation whose answers are learned.

    Attributes:
        number: number of its line.
        messages: the messages; at least one is the assistant's.
        tools: the tools that the answers may call.
    """

    number: int
    messages: tuple[Message, ...]
    tools: Tools | None = None


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer.

    Attributes:
        number: number of its line.
        prompt: the messages before the answer.
        chosen: text of the better answer.
        rejected: text of the worse answer.
    """

    number: int
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Records(Generic[T]):
    """What a file holds: the records, and the lines that are none."""

    path: Path
    good: tuple[T, ...]
    bad: tuple[BadLine, ...]


def conversations(path: Path) -> Records[Conversation]:
    """Return the conversations of a file.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: the file cannot be read, or has no usable line.
    """
    return _records(path, _conversation, CONVERSATION_FORMS)


def preferences(path: Path) -> Records[Preference]:
    """Return the preferences of a file. Errors are those of ``conversations``."""
    return _records(path, _preference, PREFERENCE_FORMS)


def _records(path: Path, parse: Callable[[int, Mapping[str, Any]], T], forms: str) -> Records[T]:
    good, bad = list[T](), list[BadLine]()
    for number, text in _lines(path):
        try:
            record = json.loads(text)
            if not isinstance(record, dict):
                raise InvalidRequest("it is no JSON object")
            good.append(parse(number, record))
        except (ValueError, RecursionError) as error:
            bad.append(BadLine(number, f"it is no JSON: {error}"))
        except MoesaicError as error:
            bad.append(BadLine(number, str(error)))
    if not good:
        first = f"; {bad[0]}" if bad else ""
        raise InvalidRequest(f"{path} has no usable line; a line has {forms}{first}")
    return Records(path, tuple(good), tuple(bad))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that is not empty."""
    with open_text(path) as file:
        if not path.name.endswith(SUFFIXES):
            raise InvalidRequest(f"{path}: expected a file that ends with {', '.join(SUFFIXES)}")
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _conversation(number: int, record: Mapping[str, Any]) -> Conversation:
    if "messages" in record:
        messages = _validated("messages", record["messages"])
        tools = Tools.from_request(record["tools"]) if record.get("tools") else None
        return _with_answer(number, messages, tools)
    if "conversations" in record:
        return _with_answer(number, validate(_from_sharegpt(record["conversations"])))
    if "instruction" in record and "output" in record:
        task = [_text(record, "instruction"), *([_text(record, "input")] if record.get("input") else [])]
        turns = [{"role": "user", "content": "\n\n".join(task)}]
        return _with_answer(number, validate([*turns, {"role": "assistant", "content": _text(record, "output")}]))
    if "prompt" in record and "completion" in record:
        prompt = _turns(record, "prompt", "user")
        return _with_answer(number, validate([*prompt, *_turns(record, "completion", "assistant")]))
    raise InvalidRequest(f"it has the keys {', '.join(record) or 'none'}; expected {CONVERSATION_FORMS}")


def _with_answer(number: int, messages: Sequence[Message], tools: Tools | None = None) -> Conversation:
    if not any(message["role"] == "assistant" for message in messages):
        raise InvalidRequest("it has no answer of the assistant to learn")
    return Conversation(number, tuple(messages), tools)


def _preference(number: int, record: Mapping[str, Any]) -> Preference:
    if "chosen" not in record or "rejected" not in record:
        raise InvalidRequest(f"it has the keys {', '.join(record) or 'none'}; expected {PREFERENCE_FORMS}")
    chosen, rejected = (_turns(record, key, "assistant") for key in ("chosen", "rejected"))
    if "prompt" in record:
        prompt = _turns(record, "prompt", "user")
    else:
        common = 0
        while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
            common += 1
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    if not prompt:
        raise InvalidRequest("it has no prompt")
    return Preference(number, tuple(validate(prompt)), _answer(chosen, "chosen"), _answer(rejected, "rejected"))


def _answer(turns: Sequence[Mapping[str, Any]], key: str) -> str:
    """Return the text of the only message of ``turns``, which is the assistant's."""
    if len(turns) != 1 or turns[0].get("role") != "assistant" or not isinstance(turns[0].get("content"), str):
        raise InvalidRequest(f"{key} is no single answer of the assistant")
    return str(turns[0]["content"])


def _turns(record: Mapping[str, Any], key: str, role: str) -> list[Mapping[str, Any]]:
    """Return the messages of a field that holds them, or a text that ``role`` says."""
    value = record[key]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return value
    raise InvalidRequest(f"{key} is neither a text nor a list of messages")


def _validated(key: str, value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{key} is no list of messages")
    return validate(value)


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise InvalidRequest(f"{key} is no text")
    return str(record[key])


def _from_sharegpt(turns: Any) -> list[dict[str, str]]:
    if not isinstance(turns, list):
        raise InvalidRequest("conversations is no list")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise InvalidRequest(f'conversations[{index}] has no text in "value"')
        if turn.get("from") not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise InvalidRequest(f'conversations[{index}] is "from" {turn.get("from")!r}; known: {known}')
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return messages
