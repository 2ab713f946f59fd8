"""What the HTTP layer adds to a token: many streams of a model that does nothing but say what time it is.

The server is a process of its own, with the real application over a door that sends each stream the clock, so many
times a second; this process reads them all and compares. Run by hand, alone on the machine:

    python -m tests.serve.streams --streams 500 --rate 20 --seconds 30 --out docs/results/streams-500.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from moesaic.backend import Delta, Event, Finished, GenerationRequest, PromptDone, TokenInfo

BODY = {"messages": [{"role": "user", "content": "What time is it?"}], "stream": True}


class Clock:
    """A door whose answers are the time in nanoseconds, at an even pace. It has the methods of ``ScriptedBackend``."""

    def __init__(self, rate: float, seconds: float) -> None:
        from tests.support.backend import ScriptedBackend

        self._gap, self._count = 1 / rate, int(rate * seconds)
        self._rest = ScriptedBackend()
        self.cards, self.load, self.close = self._rest.cards, self._rest.load, self._rest.close

    async def generate(self, request: GenerationRequest) -> Ticks:
        return Ticks(self._gap, self._count)


class Ticks:
    """See ``door.Answers``."""

    job = None

    def __init__(self, gap: float, count: int) -> None:
        self._gap, self._count = gap, count

    def ready(self) -> list[Event]:
        return []

    def cancel(self) -> None:
        self._count = 0

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        yield PromptDone(0)
        at = loop.time()
        for place in range(self._count):
            at += self._gap
            await asyncio.sleep(at - loop.time())
            yield Delta(0, f"{time.monotonic_ns()} ", (TokenInfo(place, "x"),))
        yield Finished(0, "length", 1, self._count)


def serve(port: int, rate: float, seconds: float) -> None:
    from moesaic.cli.loop import run_async
    from moesaic.serve import server
    from moesaic.serve.app import App
    from moesaic.serve.settings import Settings

    settings = Settings(port=port)
    listening = server.bind(settings)
    run_async(server.serve(App(Clock(rate, seconds), settings), listening))  # type: ignore[arg-type]


async def read(session: aiohttp.ClientSession, url: str, delays: list[float]) -> int:
    count = 0
    async with session.post(url, json=BODY) as answer:
        async for line in answer.content:
            said = line.partition(b'"content":"')[2].partition(b" ")[0]
            if said.isdigit():
                delays.append((time.monotonic_ns() - int(said)) / 1e6)
                count += 1
    return count


async def measure(url: str, streams: int) -> tuple[list[float], int]:
    delays: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def later(place: int) -> int:
            await asyncio.sleep(place / streams)  # not all in the same moment, as users do not come either
            return await read(session, url + "/v1/chat/completions", delays)

        counts = await asyncio.gather(*(later(place) for place in range(streams)))
    return delays, sum(counts)


def resident(pid: int) -> float:
    """Return the most memory that a process has had, in 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.port, args.rate, args.seconds)
    command = [sys.executable, "-m", "tests.serve.streams", "--serve", "--port", str(args.port)]
    with subprocess.Popen([*command, "--rate", str(args.rate), "--seconds", str(args.seconds)]) as server:
        try:
            time.sleep(3)
            begin = os.times()
            delays, count = asyncio.run(measure(f"http://127.0.0.1:{args.port}", args.streams))
            end = os.times()
            memory = resident(server.pid)
        finally:
            server.terminate()
    delays.sort()

    def at(share: float) -> float:
        return round(delays[min(len(delays) - 1, int(share * len(delays)))], 2)

    figures: dict[str, Any] = {
        "streams": args.streams,
        "tokens_per_second_each": args.rate,
        "seconds": args.seconds,
        "tokens": count,
        "lost": args.streams * int(args.rate * args.seconds) - count,
        "added_ms": {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": round(delays[-1], 2)},
        "server_megabytes": round(memory, 1),
        "client_cores": round((end.user + end.system - begin.user - begin.system) / (end.elapsed - begin.elapsed), 2),
    }
    print(json.dumps(figures, indent=1))
    if args.out:
        from moesaic.bench import report  # which has torch, and this process is to be small

        report.write(args.out, report.record(" ".join(["python -m tests.serve.streams", *sys.argv[1:]]), figures))


if __name__ == "__main__":
    main()
