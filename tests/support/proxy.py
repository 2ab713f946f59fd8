"""TCP proxy that drops, delays, splits or withholds data."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Literal

Mode = Literal["good", "drop", "delay", "split", "silent", "refuse"]


class Proxy:
    """Proxy to a port of loopback, with the faults of ``mode``. It belongs to the event loop that starts it."""

    def __init__(self, port: int, seed: int = 1) -> None:
        self._to, self._random = port, random.Random(seed)
        self.mode: Mode = "good"
        self.dropped = self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self._open.add(writer)
        far: asyncio.StreamWriter | None = None
        try:
            if self.mode != "refuse":
                back, far = await asyncio.open_connection("127.0.0.1", self._to)
                self._open.add(far)
                await asyncio.gather(self._pass(reader, far), self._pass(back, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for stream in (writer, far):
                if stream is not None:
                    self._open.discard(stream)
                    stream.transport.abort()
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.mode == "drop" and self._random.random() < 0.1:
                self.dropped += 1
                raise ConnectionResetError
            if self.mode == "delay":
                await asyncio.sleep(self._random.uniform(0, 0.3))
            while self.mode == "silent":  # both sides see an open connection
                await asyncio.sleep(0.05)
            parts = [data[n : n + 1] for n in range(len(data))] if self.mode == "split" else [data]
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
