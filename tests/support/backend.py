"""Backends without a model: ``Fake``, which the benchmarks use too, and ``Scripted``.

``Scripted`` sends the pieces of a ``Script``, and remembers the requests that it received.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.fake_backend import SEED as SEED
from benchmarks.fake_backend import Fake as Fake
from benchmarks.fake_backend import SteppedStream
from benchmarks.fake_backend import answer as answer
from benchmarks.fake_backend import text as text
from benchmarks.fake_backend import token as token
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
        for place, piece in enumerate(pieces):
            mark = TokenInfo(10 + place, piece, False, -0.25, ((10 + place, piece, -0.25),))
            events: list[Event] = [Delta(index, piece, (mark,)) for index in range(count)]
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
