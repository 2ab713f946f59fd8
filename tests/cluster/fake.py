"""A door without a model: what it says follows from the prompt, the seed and the place alone, as a real one's does.

A prompt may name what is to go wrong: EXIT and SEGFAULT kill the process at the third token, HANG stops the steps for
ever, NAN ends the answer with an error.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence

from moesaic.backend import Delta, Event, Finished, GenerationRequest, ModelInfo, ModelStats, PromptDone, TokenInfo
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


class FakeAnswers:
    """See ``backend.ResponseStream``."""

    job = None

    def __init__(self, backend: Fake, ask: GenerationRequest) -> None:
        self._backend, self._ask = backend, ask
        self._events: list[Event] = []
        self.cancelled = False

    def ready(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def cancel(self) -> None:
        self.cancelled = True
        if not self._backend.stuck:  # as an engine that hangs hears nothing any more
            self._backend.running.discard(self)

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for events in self._steps():
            self._events += events
            while self._events:
                yield self._events.pop(0)

    async def _steps(self) -> AsyncIterator[list[Event]]:
        """Yield what comes together; the ends come with the last tokens, as a door promises."""
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
