"""Servers to ask: the application over a scripted door, and over a real model, both behind real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

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
from moesaic.serve import server as http_server
from moesaic.serve.app import App
from moesaic.serve.keys import Keys
from moesaic.serve.settings import Settings
from tests.serve.raw import Raw


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


class ScriptedAnswers:
    """See ``door.Answers``."""

    job = None

    def __init__(self, backend: Scripted, ask: GenerationRequest, script: Script) -> None:
        self._backend, self._ask, self._script = backend, ask, script
        self._events: list[Event] = []
        self.cancelled = False

    def ready(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self._backend.cancelled += 1

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for events in self._steps():
            self._events += events
            while self._events:
                yield self._events.pop(0)

    async def _steps(self) -> AsyncIterator[list[Event]]:
        """Yield what comes together; the ends come with the last tokens, as a door promises."""
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


@dataclass
class Server:
    """A running server."""

    app: App
    url: str
    http: http_server.Server
    loop: asyncio.AbstractEventLoop
    stop: Callable[[], None] = field(repr=False)

    @property
    def backend(self) -> Any:
        return self.app.backend

    def call(self, function: Callable[[], object]) -> None:
        """Do something on the server's thread."""
        self.loop.call_soon_threadsafe(function)

    def call_sync(self, function: Callable[[], Any]) -> Any:
        """Do something there, and return what it returns."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)


@contextlib.contextmanager
def running(
    make: Callable[[], Any] = Scripted,
    settings: Settings | None = None,
    keys: Keys | None = None,
    routes: Callable[[Any], Any] = lambda _: (),
    port: int = 0,
    figures: Callable[[Any], Any] = lambda _: tuple,
) -> Iterator[Server]:
    """Run a server over the door that ``make`` makes on its loop, with more ``routes`` and ``figures``; 0: any port."""
    settings = replace(settings or Settings(), port=port)
    listening = http_server.bind(settings)
    started: threading.Event = threading.Event()
    found: list[Any] = []

    async def main() -> None:
        made = make()
        backend = await made if asyncio.iscoroutine(made) else made
        app = App(backend, settings, keys, more=routes(backend), figures=figures(backend))
        server = http_server.Server(http_server.configured(app), app)
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup([listening])
        stopped = asyncio.Event()
        found.extend((app, server, asyncio.get_running_loop(), stopped))
        started.set()
        await stopped.wait()
        for each in server.servers:
            each.close()
        for connection in list(server.server_state.connections):
            connection._break()  # type: ignore[union-attr]
        while server.server_state.connections or server.server_state.tasks:
            await asyncio.sleep(0.001)
        await server.lifespan.shutdown()  # no second of uvicorn's waits: there are many tests

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert started.wait(60)
    app, server, loop, stopped = found

    def stop() -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stopped.set)
        thread.join(30)

    host, port = listening.getsockname()[:2]
    try:
        yield Server(app, f"http://{host}:{port}", server, loop, stop)
    finally:
        stop()
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while Raw.opened:
        Raw.opened.pop().socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(scope="session")
def tales() -> Iterator[Server]:
    """The built-in model, served."""
    from moesaic.llm import LLM
    from moesaic.local_backend import LocalBackend

    llm = LLM.load()
    with running(lambda: LocalBackend(llm)) as found:
        yield found
