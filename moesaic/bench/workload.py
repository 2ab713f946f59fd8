"""What a server is asked under load: prompts made of words, lines of a file, and AIME's two workloads.

Knows how questions are drawn, the same ones for the same seed. Does not know how they are sent. A prompt
made here is about as long as was asked for; how many tokens it really has, only the server can say.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from moesaic.bench.endpoints import Ask
from moesaic.errors import InvalidParameter, InvalidRequest

WORDS = """
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
"""Common words, most of which are one token in most vocabularies."""
STORY = "Tell a long story: Once upon a time"
AIME_TOKENS = 500
"""Tokens that AIME generates in both workloads."""
PRESETS = ("aime-short", "aime-context")
MARGIN = 0.01
"""Share of a context that is left free, and at least ``LEAST`` tokens: words are not of quite equal length."""
LEAST = 16


@dataclass(frozen=True)
class Scale:
    """How many words make a prompt: ``tokens = overhead + words * per_word``, the overhead being a chat template's."""

    per_word: float = 1.0
    overhead: float = 0.0

    def words(self, tokens: int) -> int:
        """Return how many words come to about ``tokens``."""
        return max(1, round((tokens - self.overhead) / self.per_word))

    @classmethod
    def through(cls, short: tuple[int, int], long: tuple[int, int]) -> Scale:
        """Return what two prompts of so many (words, tokens) show."""
        per_word = (long[1] - short[1]) / (long[0] - short[0])
        return cls(per_word, short[1] - short[0] * per_word) if per_word > 0 else cls()


class Workload(Protocol):
    """Questions without end."""

    def asks(self, part: str, /) -> Iterator[Ask]:
        """Yield them; each ``part`` of a measurement has others, so that none is answered from a cache."""
        ...

    def about(self) -> dict[str, Any]:
        """Return what stands in the results."""
        ...


@dataclass(frozen=True)
class Words:
    """Prompts of random words: ``prompt_tokens`` +- the share ``spread`` of them, and answers likewise.

    The first ``shared_prefix_tokens`` of all prompts are the same.

    Raises:
        InvalidParameter: a number is out of range.
    """

    prompt_tokens: int = 128
    answer_tokens: int = 128
    spread: float = 0.0
    shared_prefix_tokens: int = 0
    seed: int = 0
    scale: Scale = field(default_factory=Scale)

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.spread < 1:
            raise InvalidParameter("spread", f"is {self.spread}, expected at least 0 and less than 1")
        least = int(self.prompt_tokens * (1 - self.spread))
        if not 0 <= self.shared_prefix_tokens <= least:
            what = f"is {self.shared_prefix_tokens}, expected 0 to {least}, which the shortest prompt has"
            raise InvalidParameter("shared_prefix_tokens", what)

    def asks(self, part: str, /) -> Iterator[Ask]:
        shared = round(self.shared_prefix_tokens / self.scale.per_word)
        prefix = random.Random(f"{self.seed} prefix").choices(WORDS, k=shared)
        draw = random.Random(f"{self.seed} {part}")
        while True:
            tokens = self._length(draw, self.prompt_tokens)
            words = self.scale.words(tokens)
            own = draw.choices(WORDS, k=max(0, words - len(prefix)))
            yield Ask(" ".join((prefix + own)[:words]), self._length(draw, self.answer_tokens), prompt_tokens=tokens)

    def about(self) -> dict[str, Any]:
        return {"kind": "words"} | asdict(self)

    def _length(self, draw: random.Random, tokens: int) -> int:
        return max(1, round(tokens * draw.uniform(1 - self.spread, 1 + self.spread)))


@dataclass(frozen=True)
class Story:
    """AIME's short prompt: the same for all."""

    def asks(self, _part: str, /) -> Iterator[Ask]:
        while True:
            yield Ask(STORY, AIME_TOKENS)

    def about(self) -> dict[str, Any]:
        return {"kind": "aime-short", "answer_tokens": AIME_TOKENS}


@dataclass(frozen=True)
class Lines:
    """Questions of a file, in its order, over and over."""

    name: str
    questions: tuple[Ask, ...]

    def asks(self, _part: str, /) -> Iterator[Ask]:
        return cycle(self.questions)

    def about(self) -> dict[str, Any]:
        return {"kind": "dataset", "name": self.name, "questions": len(self.questions)}


def filling(context: int, seed: int, scale: Scale) -> Words:
    """Return AIME's long prompts: with 500 tokens of an answer they fill ``context``, but for a margin.

    Raises:
        InvalidParameter: the context has no room for them.
    """
    prompt = context - AIME_TOKENS - max(LEAST, round(MARGIN * context))
    if prompt < 1:
        raise InvalidParameter("context", f"is {context}: it has no room for a prompt and {AIME_TOKENS} tokens")
    return Words(prompt, AIME_TOKENS, seed=seed, scale=scale)


def read(path: Path, answer_tokens: int, *, chats: bool) -> Lines:
    """Read a JSONL file of {"prompt": ...} or {"messages": [...]}, with "max_tokens" or without.

    Args:
        path: the file.
        answer_tokens: where a line says nothing.
        chats: whether conversations can be asked.

    Raises:
        InvalidRequest: it cannot be read, or a line is something else; the message has its number.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--dataset: {path} cannot be read: {error}") from error
    found = [
        _ask(line, f"{path}:{number}", answer_tokens, chats) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise InvalidRequest(f"--dataset: {path} has no lines")
    return Lines(path.name, tuple(found))


def _ask(line: str, where: str, answer_tokens: int, chats: bool) -> Ask:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{where}: no JSON: {error}") from error
    entry = entry if isinstance(entry, dict) else {}
    prompt, messages, tokens = entry.get("prompt"), entry.get("messages"), entry.get("max_tokens", answer_tokens)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InvalidRequest(f'{where}: "max_tokens" is {tokens!r}, expected a number from 1')
    if isinstance(prompt, str) and prompt and messages is None:
        return Ask(prompt, tokens)
    if prompt is None and _conversation(messages):
        if not chats:
            raise InvalidRequest(f'{where}: "messages" need a dialect for chats, such as openai-chat')
        return Ask("", tokens, tuple(messages))
    raise InvalidRequest(f'{where}: expected {{"prompt": "..."}} or {{"messages": [{{"role": ..., "content": ...}}]}}')


def _conversation(messages: Any) -> TypeGuard[list[dict[str, Any]]]:
    if not messages or not isinstance(messages, list):
        return False
    return all(isinstance(each, dict) and isinstance(each.get("role"), str) and "content" in each for each in messages)
