"""A backend without a model, whose text depends only on the prompt, the seed and the token's position.

A prompt can ask for a fault: EXIT and SEGFAULT kill the process at the third token, HANG stops all further steps, and
NAN ends the answer with an error.
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
"""Maximum number of characters of a prompt, and the context length that the model reports."""
SEED = 7
"""Seed of a request without one."""


def prompt_of(request: GenerationRequest) -> str:
    """Return the text of the request's last message or, if it has no messages, its prompt."""
    if request.messages is not None:
        return str(request.messages[-1]["content"])
    return str(request.prompt)


def token(prompt: str, seed: int, index: int, position: int) -> int:
    """Return the id (0 to 65,535) of the token at ``position`` of answer number ``index``."""
    key = f"{prompt}/{seed}/{index}/{position}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:2], "big")


def text(ids: Sequence[int]) -> str:
    """Return the text of token ids: each in hexadecimal, followed by a space."""
    return "".join(f"{token_id:x} " for token_id in ids)


def answer(prompt: str, seed: int = SEED, count: int = 16, index: int = 0) -> str:
    """Return the text of the first ``count`` tokens that the backend generates as answer number ``index``."""
    return text([token(prompt, seed, index, position) for position in range(count)])


class SteppedStream:
    """Base class of event streams. A subclass defines ``cancel`` and ``_steps``."""

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
        """Yield the events of each step; they become available together. An answer ends in its last token's step."""
        raise NotImplementedError


class FakeStream(SteppedStream):
    """Event stream of a ``FakeBackend``; see ``moesaic.backend.ResponseStream``."""

    def __init__(self, backend: FakeBackend, request: GenerationRequest) -> None:
        self._backend, self._request = backend, request
        super().__init__()

    def cancel(self) -> None:
        self.cancelled = True
        if not self._backend.stuck:  # an engine that hangs does not process a cancellation either
            self._backend.running.discard(self)

    async def _steps(self) -> AsyncIterator[list[Event]]:
        """Yield the events of each step. The last step has the last token and the end of every answer."""
        backend, request = self._backend, self._request
        prompt, n, seed = prompt_of(request), request.sampling.get("n") or 1, request.sampling.get("seed", SEED)
        count = request.sampling.get("max_tokens") or 16
        resumed = min(map(len, request.resume), default=0)
        yield [PromptDone(index, (), len(prompt)) for index in range(n)]
        for position in range(count):
            if position >= resumed:  # tokens of a resumed answer are read with the prompt, in one step
                await backend.step(prompt, position)
            events: list[Event] = []
            for index in range(n):
                token_id = token(prompt, seed, index, position)
                earlier = request.resume[index] if index < len(request.resume) else ()
                if position < len(earlier):
                    assert earlier[position] == token_id, "the answer is resumed with tokens that it never had"
                events.append(Delta(index, text([token_id]), (TokenInfo(token_id, text([token_id])),)))
            if position == count - 1:
                backend.running.discard(self)
                events += [Finished(index, "length", len(prompt), count) for index in range(n)]
            yield events


class FakeBackend:
    """Backend that offers one model and computes nothing; see ``moesaic.backend.Backend``."""

    def __init__(self, model: str = "fake", seconds: float = 0.0) -> None:
        """Create a backend that offers a model of this name. Each token takes ``seconds``."""
        self.model, self._seconds = model, seconds
        self.running: set[FakeStream] = set()
        self.requests: list[GenerationRequest] = []
        self.steps = 0
        self.stuck = False

    async def step(self, prompt: str, position: int) -> None:
        """Wait as long as a step takes. At the third token, cause the fault that the prompt asks for."""
        await asyncio.sleep(self._seconds)
        if position == 2:
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

    async def generate(self, request: GenerationRequest) -> FakeStream:
        if len(prompt_of(request)) > LONGEST:
            raise PromptTooLong(len(prompt_of(request)), LONGEST)
        self.requests.append(request)
        stream = FakeStream(self, request)
        self.running.add(stream)
        return stream

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        return [TokenInfo(ord(character), character) for character in prompt_of(request)]

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    async def embed(
        self, model: str, texts: Sequence[str | Sequence[int]], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        return [[1.0, 0.0] for _ in texts], len(texts)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        raise InvalidRequest(f"{self.model} is not a classifier")

    async def close(self) -> None:
        pass
