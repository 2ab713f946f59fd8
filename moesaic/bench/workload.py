"""Requests of a load test: random words, the lines of a file, and two workloads of the company AIME.

The same seed gives the same requests. A generated prompt has about the requested number of tokens; only the server
can count them exactly. This module does not know how requests are sent.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from moesaic.bench.endpoints import Request
from moesaic.errors import InvalidParameter, InvalidRequest

COMMON_WORDS = """
the and that have with this from they will would there their what about which when make like time just know take
people into year your good some could them see other than then now look only come its over think also back after use
two how our work first well way even new want because any these give day most find here thing many tell very still
mother father house water night light world story long little great small old young king queen forest river mountain
sea road door window garden tree bird horse dog cat fish bread milk table chair book letter word song voice hand eye
heart head face white black red green blue gold silver stone wood fire wind rain snow sun moon star morning evening
summer winter spring hour week month again always never often once soon today before under behind between across
through around without against toward while until where why who each every both few more less much same such own able
bad best better big bright call carry city clear close cold cut dark deep dream drink drive early earth east eat end
enough fall family far fast feel field fight fill fly follow food foot free friend full game girl boy go ground grow
half happen happy hard hear help high hold home hope hot idea keep kind land large last late laugh learn leave left
let life line list listen live lose love man mean meet mind miss move music name near need next north note number open
""".split()
"""Common English words; most are a single token in most vocabularies."""
AIME_SHORT_PROMPT = "Tell a long story: Once upon a time"
AIME_TOKENS = 500
"""Tokens of an answer in both workloads for which the company AIME publishes results."""
PRESETS = ("aime-short", "aime-context")
FREE_SHARE = 0.01
"""Fraction of the context that aime-context leaves free, because words differ in their number of tokens."""
MIN_FREE_TOKENS = 16
"""Tokens of the context that aime-context leaves free at least."""


@dataclass(frozen=True)
class TokenScale:
    """Relation of words to tokens: ``tokens = overhead + words * per_word``; a chat template makes the overhead."""

    per_word: float = 1.0
    overhead: float = 0.0

    def words(self, tokens: int) -> int:
        """Return the number of words that have about ``tokens`` tokens."""
        return max(1, round((tokens - self.overhead) / self.per_word))

    @classmethod
    def from_prompts(cls, short: tuple[int, int], long: tuple[int, int]) -> TokenScale:
        """Return the scale that fits two prompts, each given as (words, tokens)."""
        per_word = (long[1] - short[1]) / (long[0] - short[0])
        return cls(per_word, short[1] - short[0] * per_word) if per_word > 0 else cls()


class Workload(Protocol):
    """Source of the requests of a load test."""

    def requests(self, part: str, /) -> Iterator[Request]:
        """Yield requests without end.

        Each ``part`` of a measurement has different requests, so that no answer comes from a prefix cache.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return a description of the workload for the results file."""
        ...


@dataclass(frozen=True)
class RandomWords:
    """Prompts of random words.

    Raises:
        InvalidParameter: a number is out of range.
    """

    prompt_tokens: int = 128
    """Average tokens of a prompt."""
    answer_tokens: int = 128
    """Average of the answers' maximum tokens."""
    spread: float = 0.0
    """Maximum relative difference of a length from the average."""
    shared_prefix_tokens: int = 0
    """Tokens at the start of a prompt that all prompts share."""
    seed: int = 0
    scale: TokenScale = field(default_factory=TokenScale)

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.spread < 1:
            raise InvalidParameter("spread", f"is {self.spread}, expected at least 0 and less than 1")
        shortest = int(self.prompt_tokens * (1 - self.spread))
        if not 0 <= self.shared_prefix_tokens <= shortest:
            problem = f"is {self.shared_prefix_tokens}, expected 0 to {shortest}, the length of the shortest prompt"
            raise InvalidParameter("shared_prefix_tokens", problem)

    def requests(self, part: str, /) -> Iterator[Request]:
        shared = round(self.shared_prefix_tokens / self.scale.per_word)
        prefix = random.Random(f"{self.seed} prefix").choices(COMMON_WORDS, k=shared)
        generator = random.Random(f"{self.seed} {part}")
        while True:
            tokens = self._length(generator, self.prompt_tokens)
            words = self.scale.words(tokens)
            own = generator.choices(COMMON_WORDS, k=max(0, words - len(prefix)))
            yield Request(
                " ".join((prefix + own)[:words]), self._length(generator, self.answer_tokens), prompt_tokens=tokens
            )

    def describe(self) -> dict[str, Any]:
        return {"kind": "words"} | asdict(self)

    def _length(self, generator: random.Random, tokens: int) -> int:
        return max(1, round(tokens * generator.uniform(1 - self.spread, 1 + self.spread)))


@dataclass(frozen=True)
class AimeShortPrompt:
    """The short workload for which the company AIME publishes results: all requests have the same short prompt."""

    def requests(self, _part: str, /) -> Iterator[Request]:
        while True:
            yield Request(AIME_SHORT_PROMPT, AIME_TOKENS)

    def describe(self) -> dict[str, Any]:
        return {"kind": "aime-short", "answer_tokens": AIME_TOKENS}


@dataclass(frozen=True)
class Dataset:
    """Requests of a file, in its order, repeated without end."""

    name: str
    lines: tuple[Request, ...]

    def requests(self, _part: str, /) -> Iterator[Request]:
        return cycle(self.lines)

    def describe(self) -> dict[str, Any]:
        return {"kind": "dataset", "name": self.name, "questions": len(self.lines)}


def aime_context(context: int, seed: int, scale: TokenScale) -> RandomWords:
    """Return the long workload for which the company AIME publishes results.

    A prompt and an answer of 500 tokens almost fill the context. ``seed`` is that of the words.

    Raises:
        InvalidParameter: the context is too small for an answer of 500 tokens.
    """
    prompt = context - AIME_TOKENS - max(MIN_FREE_TOKENS, round(FREE_SHARE * context))
    if prompt < 1:
        raise InvalidParameter("context", f"is {context}, too small for a prompt and an answer of {AIME_TOKENS} tokens")
    return RandomWords(prompt, AIME_TOKENS, seed=seed, scale=scale)


def read_dataset(path: Path, answer_tokens: int, *, supports_messages: bool) -> Dataset:
    """Read a JSONL file whose lines have {"prompt": ...} or {"messages": [...]}, and optionally "max_tokens".

    Args:
        path: the file.
        answer_tokens: maximum tokens of the answer to a line without "max_tokens".
        supports_messages: whether the dialect can send conversations.

    Raises:
        InvalidRequest: the file cannot be read or a line is not valid; the message has the line's number.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--dataset: {path} cannot be read: {error}") from error
    requests = [
        _parse_line(line, f"{path}:{number}", answer_tokens, supports_messages)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not requests:
        raise InvalidRequest(f"--dataset: {path} is empty")
    return Dataset(path.name, tuple(requests))


def _parse_line(line: str, location: str, answer_tokens: int, supports_messages: bool) -> Request:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{location}: not JSON: {error}") from error
    entry = entry if isinstance(entry, dict) else {}
    prompt, messages, tokens = entry.get("prompt"), entry.get("messages"), entry.get("max_tokens", answer_tokens)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InvalidRequest(f'{location}: "max_tokens" is {tokens!r}, expected an integer of at least 1')
    if isinstance(prompt, str) and prompt and messages is None:
        return Request(prompt, tokens)
    if prompt is None and _is_conversation(messages):
        if not supports_messages:
            raise InvalidRequest(f'{location}: "messages" requires a chat dialect, such as openai-chat')
        return Request("", tokens, tuple(messages))
    raise InvalidRequest(
        f'{location}: expected {{"prompt": "..."}} or {{"messages": [{{"role": ..., "content": ...}}]}}'
    )


def _is_conversation(messages: Any) -> TypeGuard[list[dict[str, Any]]]:
    if not messages or not isinstance(messages, list):
        return False
    return all(
        isinstance(entry, dict) and isinstance(entry.get("role"), str) and "content" in entry for entry in messages
    )
