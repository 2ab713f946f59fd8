"""Backends without a model.

``ScriptedBackend`` sends the pieces of a ``Script`` and records the requests that it receives. ``FakeBackend`` is
``benchmarks.fake_backend.FakeBackend``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.fake_backend import SEED as SEED
from benchmarks.fake_backend import FakeBackend as FakeBackend
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
    TopToken,
)


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
        prompt = (
            (TokenInfo(1, "<s>", True), TokenInfo(5, "Hi", False, -0.5, (TopToken(5, "Hi", -0.5, b"Hi"),)))
            if scored
            else ()
        )
        yield [PromptDone(index, prompt, 2) for index in range(count)]
        pieces = script.pieces[: sampling.get("max_tokens") or len(script.pieces)]
        for position, piece in enumerate(pieces):
            info = TokenInfo(
                10 + position,
                piece,
                False,
                -0.25,
                (TopToken(10 + position, piece, -0.25, piece.encode()),),
                piece.encode(),
            )
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

    async def embed(
        self, model: str, texts: Sequence[Any], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        return [[1.0, 0.0, 0.0] for _ in texts], len(texts)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        return [{"good": 0.75, "bad": 0.25} for _ in texts]

    async def close(self) -> None:
        self.go.set()
