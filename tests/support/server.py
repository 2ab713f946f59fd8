"""Servers for tests: the HTTP application in a thread, and ``moesaic serve`` in a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.serve import server as http_server
from moesaic.serve.app import App
from moesaic.serve.keys import Keys
from moesaic.serve.settings import Settings
from tests.support.backend import ScriptedBackend


@dataclass
class Server:
    """Running server."""

    app: App
    url: str
    http: http_server.Server
    loop: asyncio.AbstractEventLoop
    stop: Callable[[], None] = field(repr=False)

    @property
    def backend(self) -> Any:
        return self.app.services.backend

    def call(self, function: Callable[[], object]) -> None:
        """Call ``function`` on the server's thread, later."""
        self.loop.call_soon_threadsafe(function)

    def call_sync(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` on the server's thread and return its result."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)


@contextlib.contextmanager
def running(
    make: Callable[[], Any] = ScriptedBackend,
    settings: Settings | None = None,
    keys: Keys | None = None,
    routes: Callable[[Any], Any] = lambda _: (),
    port: int = 0,
    figures: Callable[[Any], Any] = lambda _: tuple,
) -> Iterator[Server]:
    """Run a server over the backend that ``make`` returns, with more ``routes`` and ``figures``. Port 0 is any port."""
    settings = replace(settings or Settings(), port=port)
    listening = http_server.bind(settings)
    started: threading.Event = threading.Event()
    parts: list[Any] = []

    async def main() -> None:
        backend = make()
        if asyncio.iscoroutine(backend):
            backend = await backend
        app = App(backend, settings, keys, more_endpoints=routes(backend), more_metrics=figures(backend))
        server = http_server.Server(http_server.uvicorn_config(app), app)
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup([listening])
        stopped = asyncio.Event()
        parts.extend((app, server, asyncio.get_running_loop(), stopped))
        started.set()
        await stopped.wait()
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection._break()  # type: ignore[union-attr]
        while server.server_state.connections or server.server_state.tasks:
            await asyncio.sleep(0.001)
        await server.lifespan.shutdown()  # uvicorn's own shutdown waits for a second

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert started.wait(60)
    app, server, loop, stopped = parts

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


@contextlib.contextmanager
def serving(log: Path, *flags: str) -> Iterator[str]:
    """Run ``moesaic serve`` with these models and flags in a process, and yield its address."""
    command = [sys.executable, "-m", "moesaic.cli", "serve", "--port", "0", *flags]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        yield address(process, log)
    finally:
        early_exit = process.poll()
        process.terminate()
        code = process.wait(60)
        assert early_exit is None and code == 0, f"the server ended with {code}: {log.read_text()[-4000:]}"


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server's log has its address, and return it."""
    for _ in range(600):
        for line in log.read_text().splitlines():
            if '"event": "serving"' in line:
                return str(json.loads(line)["url"])
        if process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"the server did not start: {log.read_text()[-4000:]}")
