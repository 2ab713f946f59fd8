"""Backends without a model.

``FakeBackend`` computes each token from the prompt, the seed and the position. A test can therefore predict a reply,
and a second backend can resume it. A word in the prompt injects a fault at the third token: EXIT and SEGFAULT kill the
process, HANG stops all steps, and NAN ends the reply with an error.

``ScriptedBackend`` sends the pieces of a ``Script`` and records the requests that it receives.
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

MAX_PROMPT_TOKENS = 4000
SEED = 7
"""Seed of a request that names none."""


def prompt_of(request: GenerationRequest) -> str:
    """Return the prompt of a request; of a chat, its last message."""
    if request.messages is not None:
        return str(request.messages[-1]["content"])
    return str(request.prompt)


def token(prompt: str, seed: int, index: int, position: int) -> int:
    """Return the token at ``position`` of choice ``index``, from 0 to 65535."""
    source = f"{prompt}/{seed}/{index}/{position}".encode()
    return int.from_bytes(hashlib.sha256(source).digest()[:2], "big")


def text(tokens: Sequence[int]) -> str:
    return "".join(f"{token_id:x} " for token_id in tokens)


def answer(prompt: str, seed: int = SEED, count: int = 16, index: int = 0) -> str:
    """Return the first ``count`` tokens of the fake backend's reply, as text."""
    return text([token(prompt, seed, index, position) for position in range(count)])


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


class FakeStream(SteppedStream):
    """Response stream of a ``FakeBackend``."""

    def __init__(self, backend: FakeBackend, request: GenerationRequest) -> None:
        self._backend, self._request = backend, request
        super().__init__()

    def cancel(self) -> None:
        self.cancelled = True
        if not self._backend.stuck:  # an engine that hangs does not react to a cancellation
            self._backend.running.discard(self)

    async def _steps(self) -> AsyncIterator[list[Event]]:
        backend, request = self._backend, self._request
        prompt, n, seed = prompt_of(request), request.sampling.get("n") or 1, request.sampling.get("seed", SEED)
        max_tokens = request.sampling.get("max_tokens") or 16
        yield [PromptDone(index, (), len(prompt)) for index in range(n)]
        resumed = min(map(len, request.resume), default=0)
        for position in range(max_tokens):
            if position >= resumed:  # resumed tokens are read together with the prompt, in one step
                await backend.step(prompt, position)
            events: list[Event] = []
            for index in range(n):
                token_id = token(prompt, seed, index, position)
                earlier = request.resume[index] if index < len(request.resume) else ()
                if position < len(earlier):
                    assert earlier[position] == token_id, "the resumed tokens are not those of this reply"
                piece = text([token_id])
                events.append(Delta(index, piece, (TokenInfo(token_id, piece),)))
            if position == max_tokens - 1:
                backend.running.discard(self)
                events += [Finished(index, "length", len(prompt), max_tokens) for index in range(n)]
            yield events


class FakeBackend:
    """Backend whose replies are a hash of prompt, seed and position."""

    def __init__(self, model: str = "fake", seconds: float = 0.0) -> None:
        """Serve ``model``, which takes ``seconds`` for each token."""
        self.model, self._seconds = model, seconds
        self.running: set[FakeStream] = set()
        self.requests: list[GenerationRequest] = []
        self.steps = 0
        self.stuck = False

    async def step(self, prompt: str, position: int) -> None:
        """Take the time of one token; inject the prompt's fault at the third one."""
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
        return [ModelInfo(self.model, ("fake-alias",), context=MAX_PROMPT_TOKENS)]

    def stats(self) -> Mapping[str, ModelStats]:
        return {self.model: ModelStats(running=len(self.running), steps=self.steps)}

    async def generate(self, request: GenerationRequest) -> FakeStream:
        if len(prompt_of(request)) > MAX_PROMPT_TOKENS:
            raise PromptTooLong(len(prompt_of(request)), MAX_PROMPT_TOKENS)
        self.requests.append(request)
        stream = FakeStream(self, request)
        self.running.add(stream)
        return stream

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        return [TokenInfo(ord(char), char) for char in prompt_of(request)]

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
    """Reply of a scripted model: pieces of text with pauses between them, and optionally an error at the end."""

    pieces: Sequence[str] = ("Hello", ", ", "world", "!")
    pause: float = 0.0
    """Seconds after each piece."""
    reason: str = "stop"
    """Finish reason."""
    error: Exception | None = None
    """Error that the stream raises after the last piece."""
    refusal: Exception | None = None
    """Error that ``generate`` raises."""
    calls: Sequence[ToolCall] = ()
    """Parts of tool calls. They follow the text, each in a delta of its own."""
    stop: str | None = None
    """Stop string that ended the reply."""
    cached: int = 0
    """Prompt tokens that were found in the prefix cache."""
    held: bool = False
    """Whether the stream waits after its first piece until ``ScriptedBackend.go`` is set."""


class ScriptedStream(SteppedStream):
    """Response stream that follows a ``Script``."""

    def __init__(self, backend: ScriptedBackend, request: GenerationRequest, script: Script) -> None:
        self._backend, self._request, self._script = backend, request, script
        super().__init__()

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self._backend.cancelled += 1

    async def _steps(self) -> AsyncIterator[list[Event]]:
        script, sampling = self._script, self._request.sampling
        count = sampling.get("n", 1)
        scored = sampling.get("prompt_logprobs") is not None
        prompt = (TokenInfo(1, "<s>", True), TokenInfo(5, "Hi", False, -0.5, ((5, "Hi", -0.5),))) if scored else ()
        yield [PromptDone(index, prompt, 2) for index in range(count)]
        pieces = script.pieces[: sampling.get("max_tokens") or len(script.pieces)]
        for position, piece in enumerate(pieces):
            info = TokenInfo(10 + position, piece, False, -0.25, ((10 + position, piece, -0.25),))
            events: list[Event] = [Delta(index, piece, (info,)) for index in range(count)]
            if position == len(pieces) - 1 and not script.error:
                events += [Delta(index, calls=(part,)) for part in script.calls for index in range(count)]
                events += [self._finished(index, len(pieces)) for index in range(count)]
            yield events
            if script.held and position == 0:
                await self._backend.go.wait()
            await asyncio.sleep(script.pause)
        if script.error:
            raise script.error
        if not pieces:
            calls: list[Event] = [Delta(index, calls=(part,)) for part in script.calls for index in range(count)]
            yield calls + [self._finished(index, 0) for index in range(count)]

    def _finished(self, index: int, generated: int) -> Finished:
        script = self._script
        reason = "length" if generated < len(script.pieces) else script.reason
        has_calls = bool(script.calls)
        return Finished(index, reason, 2, generated, script.cached, script.stop, None, has_calls)  # type: ignore[arg-type]


class ScriptedBackend:
    """Backend that replies as its ``script`` says; ``requests`` holds the requests that it has accepted or refused."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.requests: list[GenerationRequest] = []
        self.calls: list[str] = []
        """Names of the ``generate`` and ``tokenize`` calls, in order."""
        self.cancelled = 0
        self.go = asyncio.Event()
        """Lets streams of a ``held`` script continue."""
        self.model_stats = {"scripted": ModelStats(blocks=10, free_blocks=10)}
        self.model_infos = [ModelInfo("scripted", ("alias",), context=100), ModelInfo("other", context=50)]

    def models(self) -> Sequence[ModelInfo]:
        return self.model_infos

    def stats(self) -> Mapping[str, ModelStats]:
        return self.model_stats

    async def generate(self, request: GenerationRequest) -> ScriptedStream:
        self.calls.append("generate")
        if request.limits is not None:
            [info] = [model for model in self.model_infos if model.name == request.model]
            count = len(self._tokens(request))
            limit = request.limits.max_tokens(count, request.sampling.get("max_tokens"), info.context)
            request = replace(request, sampling={**request.sampling, "max_tokens": limit})
        self.requests.append(request)
        if self.script.refusal:
            raise self.script.refusal
        return ScriptedStream(self, request, replace(self.script))

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        self.calls.append("tokenize")
        return self._tokens(request)

    def _tokens(self, request: GenerationRequest) -> list[TokenInfo]:
        """Return the prompt's tokens: each word is one, after the token that begins a text."""
        prompt = request.prompt if request.messages is None else " ".join(turn["content"] for turn in request.messages)
        words = prompt.split() if isinstance(prompt, str) else [str(token_id) for token_id in prompt or ()]
        bos = [TokenInfo(1, "<s>", True)] * request.add_bos
        return bos + [TokenInfo(20 + position, word) for position, word in enumerate(words)]

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    async def embed(self, model: str, texts: Sequence[Any]) -> tuple[list[list[float]], int]:
        return [[1.0, 0.0, 0.0] for _ in texts], len(texts)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        return [{"good": 0.75, "bad": 0.25} for _ in texts]

    async def close(self) -> None:
        self.go.set()
