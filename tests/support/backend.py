"""Backends without a model.

``Fake`` computes each token from the prompt, the seed and the position, so that an answer can be predicted and resumed.
A prompt may contain a fault: EXIT and SEGFAULT kill the process at the third token, HANG stops all steps, NAN ends the
answer with an error. ``Scripted`` sends the pieces of a ``Script``, and remembers the requests that it received.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moesaic.backend import (
    Delta,
    Event,
    Finished,
    GenerationRequest,
    ModelInfo,
    ModelStats,
    PromptDone,
    TokenInfo,
    ToolCall,
)
from moesaic.errors import InvalidRequest, NumericalError, PromptTooLong

LONGEST = 4000
SEED = 7
"""Of an answer that was asked for without one."""


def prompt_of(ask: GenerationRequest) -> str:
    if ask.messages is not None:
        return str(ask.messages[-1]["content"])
    return str(ask.prompt)


def token(prompt: str, seed: int, index: int, place: int) -> int:
    said = f"{prompt}/{seed}/{index}/{place}".encode()
    return int.from_bytes(hashlib.sha256(said).digest()[:2], "big")


def text(ids: Sequence[int]) -> str:
    return "".join(f"{id:x} " for id in ids)


def answer(prompt: str, seed: int = SEED, count: int = 16, index: int = 0) -> str:
    """Return what the fake says."""
    return text([token(prompt, seed, index, place) for place in range(count)])


class SteppedStream:
    """Stream of events that ``_steps`` yields in lists. Subclasses define ``_steps`` and ``cancel``."""

    job = None

    def __init__(self) -> None:
        self._events: list[Event] = []
        self.cancelled = False

    def ready(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for events in self._steps():
            self._events += events
            while self._events:
                yield self._events.pop(0)

    def _steps(self) -> AsyncIterator[list[Event]]:
        """Yield lists of events; each list is ready at once, and a reply ends in the list of its last token."""
        raise NotImplementedError


class FakeAnswers(SteppedStream):
    """See ``backend.ResponseStream``."""

    def __init__(self, backend: Fake, ask: GenerationRequest) -> None:
        self._backend, self._ask = backend, ask
        super().__init__()

    def cancel(self) -> None:
        self.cancelled = True
        if not self._backend.stuck:  # as an engine that hangs hears nothing any more
            self._backend.running.discard(self)

    async def _steps(self) -> AsyncIterator[list[Event]]:
        """Yield lists of events; each list is ready at once, and a reply ends in the list of its last token."""
        backend, ask = self._backend, self._ask
        prompt, n, seed = prompt_of(ask), ask.sampling.get("n") or 1, ask.sampling.get("seed", SEED)
        most = ask.sampling.get("max_tokens") or 16
        yield [PromptDone(index, (), len(prompt)) for index in range(n)]
        for place in range(most):
            given = min(map(len, ask.resume), default=0)
            if place >= given:  # what was told is read with the prompt, in one step
                await backend.step(prompt, place)
            events: list[Event] = []
            for index in range(n):
                id = token(prompt, seed, index, place)
                told = ask.resume[index] if index < len(ask.resume) else ()
                if place < len(told):
                    assert told[place] == id, "an answer was resumed with what it never said"
                events.append(Delta(index, text([id]), (TokenInfo(id, text([id])),)))
            if place == most - 1:
                backend.running.discard(self)
                events += [Finished(index, "length", len(prompt), most) for index in range(n)]
            yield events


class Fake:
    """See ``backend.Backend``."""

    def __init__(self, model: str = "fake", seconds: float = 0.0) -> None:
        """Offer a model that takes so many seconds for a token."""
        self.model, self._seconds = model, seconds
        self.running: set[FakeAnswers] = set()
        self.asked: list[GenerationRequest] = []
        self.steps = 0
        self.stuck = False

    async def step(self, prompt: str, place: int) -> None:
        await asyncio.sleep(self._seconds)
        if place == 2:
            if "EXIT" in prompt:
                os._exit(1)
            if "SEGFAULT" in prompt:
                os.kill(os.getpid(), signal.SIGSEGV)
            if "NAN" in prompt:
                raise NumericalError("the model computed NaN or infinity")
            self.stuck = self.stuck or "HANG" in prompt
        while self.stuck:
            await asyncio.sleep(0.05)
        self.steps += 1

    def models(self) -> Sequence[ModelInfo]:
        return [ModelInfo(self.model, ("fake-alias",), context=LONGEST)]

    def stats(self) -> Mapping[str, ModelStats]:
        return {self.model: ModelStats(running=len(self.running), steps=self.steps)}

    async def generate(self, request: GenerationRequest) -> FakeAnswers:
        if len(prompt_of(request)) > LONGEST:
            raise PromptTooLong(len(prompt_of(request)), LONGEST)
        self.asked.append(request)
        answers = FakeAnswers(self, request)
        self.running.add(answers)
        return answers

    async def tokenize(self, ask: GenerationRequest) -> list[TokenInfo]:
        return [TokenInfo(ord(each), each) for each in prompt_of(ask)]

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        return [[1.0, 0.0] for _ in texts], len(texts)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        raise InvalidRequest(f"{self.model} has no classes")

    async def close(self) -> None:
        pass


@dataclass
class Script:
    """What a scripted model answers: pieces with pauses between them, perhaps an error at the end."""

    pieces: Sequence[str] = ("Hello", ", ", "world", "!")
    pause: float = 0.0
    reason: str = "stop"
    error: Exception | None = None
    refusal: Exception | None = None
    calls: Sequence[ToolCall] = ()
    """Parts of calls of tools, which come after the text; each in a piece of its own."""
    stop: str | None = None
    cached: int = 0
    held: bool = False
    """Whether the answer waits, after its first piece, until ``Scripted.go`` is set."""


class ScriptedAnswers(SteppedStream):
    """See ``door.Answers``."""

    def __init__(self, backend: Scripted, ask: GenerationRequest, script: Script) -> None:
        self._backend, self._ask, self._script = backend, ask, script
        super().__init__()

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self._backend.cancelled += 1

    async def _steps(self) -> AsyncIterator[list[Event]]:
        """Yield lists of events; each list is ready at once, and a reply ends in the list of its last token."""
        script, sampling = self._script, self._ask.sampling
        count = sampling.get("n", 1)
        scored = sampling.get("prompt_logprobs") is not None
        prompt = (TokenInfo(1, "<s>", True), TokenInfo(5, "Hi", False, -0.5, ((5, "Hi", -0.5),))) if scored else ()
        yield [PromptDone(index, prompt, 2) for index in range(count)]
        pieces = script.pieces[: sampling.get("max_tokens") or len(script.pieces)]
        for place, text in enumerate(pieces):
            mark = TokenInfo(10 + place, text, False, -0.25, ((10 + place, text, -0.25),))
            events: list[Event] = [Delta(index, text, (mark,)) for index in range(count)]
            if place == len(pieces) - 1 and not script.error:
                events += [Delta(index, calls=(part,)) for part in script.calls for index in range(count)]
                events += [self._ended(index, len(pieces)) for index in range(count)]
            yield events
            if script.held and place == 0:
                await self._backend.go.wait()
            await asyncio.sleep(script.pause)
        if script.error:
            raise script.error
        if not pieces:
            calls: list[Event] = [Delta(index, calls=(part,)) for part in script.calls for index in range(count)]
            yield calls + [self._ended(index, 0) for index in range(count)]

    def _ended(self, index: int, generated: int) -> Finished:
        script = self._script
        reason = "length" if generated < len(script.pieces) else script.reason
        called = bool(script.calls)
        return Finished(index, reason, 2, generated, script.cached, script.stop, None, called)  # type: ignore[arg-type]


class Scripted:
    """A door without a model; ``asked`` has what came through."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.asked: list[GenerationRequest] = []
        self.cancelled = 0
        self.go = asyncio.Event()
        self.loads = {"scripted": ModelStats(blocks=10, free_blocks=10)}
        self.listed = [ModelInfo("scripted", ("alias",), context=100), ModelInfo("other", context=50)]

    def models(self) -> Sequence[ModelInfo]:
        return self.listed

    def stats(self) -> Mapping[str, ModelStats]:
        return self.loads

    async def generate(self, request: GenerationRequest) -> ScriptedAnswers:
        if request.limits is not None:
            [info] = [model for model in self.listed if model.name == request.model]
            count = len(await self.tokenize(request))
            limit = request.limits.max_tokens(count, request.sampling.get("max_tokens"), info.context)
            request = replace(request, sampling={**request.sampling, "max_tokens": limit})
        self.asked.append(request)
        if self.script.refusal:
            raise self.script.refusal
        return ScriptedAnswers(self, request, replace(self.script))

    async def tokenize(self, ask: GenerationRequest) -> list[TokenInfo]:
        prompt = ask.prompt if ask.messages is None else " ".join(turn["content"] for turn in ask.messages)
        words = prompt.split() if isinstance(prompt, str) else [str(id) for id in prompt or ()]
        return [TokenInfo(1, "<s>", True)] * ask.add_bos + [
            TokenInfo(20 + place, word) for place, word in enumerate(words)
        ]

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    async def embed(self, model: str, texts: Sequence[Any]) -> tuple[list[list[float]], int]:
        return [[1.0, 0.0, 0.0] for _ in texts], len(texts)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        return [{"good": 0.75, "bad": 0.25} for _ in texts]

    async def close(self) -> None:
        self.go.set()
