"""Measure the delay that the HTTP layer adds to a token, with many concurrent streams.

The server is a child process. It runs the real HTTP application over a backend that sends each stream the current
time, --rate times per second. This process reads all streams and compares the received times with its own clock. Run
it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from moesaic.backend import Delta, Event, Finished, GenerationRequest, ModelInfo, ModelStats, PromptDone, TokenInfo

EXAMPLE = """example:
  python -m benchmarks.streams --streams 500 --rate 20 --seconds 30 --out docs/results/streams-500.json
"""
BODY = {"messages": [{"role": "user", "content": "What time is it?"}], "stream": True}


class ClockBackend:
    """Backend whose tokens are the current time in nanoseconds, at a fixed rate. Only ``generate`` works."""

    def __init__(self, rate: float, seconds: float) -> None:
        self._gap, self._count = 1 / rate, int(rate * seconds)

    def models(self) -> Sequence[ModelInfo]:
        return [ModelInfo("clock", context=1 << 20)]

    def stats(self) -> Mapping[str, ModelStats]:
        return {"clock": ModelStats()}

    async def generate(self, request: GenerationRequest) -> ClockResponseStream:
        return ClockResponseStream(self._gap, self._count)

    async def close(self) -> None:
        pass


class ClockResponseStream:
    """Event stream of a ``ClockBackend``; see ``moesaic.backend.ResponseStream``."""

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
        due = loop.time()
        for position in range(self._count):
            due += self._gap
            await asyncio.sleep(due - loop.time())
            yield Delta(0, f"{time.monotonic_ns()} ", (TokenInfo(position, "x"),))
        yield Finished(0, "length", 1, self._count)


def serve(port: int, rate: float, seconds: float) -> None:
    """Run the server in this process. Each stream gets ``rate`` tokens per second for ``seconds``."""
    from moesaic.cli.event_loop import run_async
    from moesaic.serve import server
    from moesaic.serve.app import App
    from moesaic.serve.settings import Settings

    settings = Settings(port=port)
    listener = server.bind(settings)
    run_async(server.serve(App(ClockBackend(rate, seconds), settings), listener))  # type: ignore[arg-type]


async def read_stream(session: aiohttp.ClientSession, url: str, delays: list[float]) -> int:
    """Read a stream to its end; append each token's delay in ms to ``delays``; return the number of tokens."""
    count = 0
    async with session.post(url, json=BODY) as response:
        async for line in response.content:
            sent = line.partition(b'"content":"')[2].partition(b" ")[0]
            if sent.isdigit():
                delays.append((time.monotonic_ns() - int(sent)) / 1e6)
                count += 1
    return count


async def measure(url: str, streams: int) -> tuple[list[float], int]:
    """Read this number of concurrent streams; return the delays of all tokens in milliseconds, and their number."""
    delays: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def read_later(number: int) -> int:
            await asyncio.sleep(number / streams)  # real users do not all arrive at the same moment
            return await read_stream(session, url + "/v1/chat/completions", delays)

        counts = await asyncio.gather(*(read_later(number) for number in range(streams)))
    return delays, sum(counts)


def peak_memory(pid: int) -> float:
    """Return the peak resident memory of the process ``pid``, in 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streams",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--streams", type=int, default=500, metavar="N", help="concurrent streams (default 500)")
    parser.add_argument("--rate", type=float, default=20.0, metavar="R", help="tokens per second each (default 20)")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="length of a stream (default 30)")
    parser.add_argument("--port", type=int, default=8123, help="port of the server (default 8123)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to this file, as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.port, args.rate, args.seconds)
    command = [sys.executable, "-m", "benchmarks.streams", "--serve", "--port", str(args.port)]
    with subprocess.Popen([*command, "--rate", str(args.rate), "--seconds", str(args.seconds)]) as server:
        try:
            time.sleep(3)
            start = os.times()
            delays, count = asyncio.run(measure(f"http://127.0.0.1:{args.port}", args.streams))
            end = os.times()
            memory = peak_memory(server.pid)
        finally:
            server.terminate()
    delays.sort()

    def percentile(share: float) -> float:
        return round(delays[min(len(delays) - 1, int(share * len(delays)))], 2)

    added = {"p50": percentile(0.5), "p90": percentile(0.9), "p99": percentile(0.99), "max": round(delays[-1], 2)}
    figures: dict[str, Any] = {
        "streams": args.streams,
        "tokens_per_second_each": args.rate,
        "seconds": args.seconds,
        "tokens": count,
        "lost": args.streams * int(args.rate * args.seconds) - count,
        "added_ms": added,
        "server_megabytes": round(memory, 1),
        "client_cores": round((end.user + end.system - start.user - start.system) / (end.elapsed - start.elapsed), 2),
    }
    print(json.dumps(figures, indent=1))
    if args.out:
        from moesaic.bench import provenance  # imports torch, which this process does without while it measures

        provenance.write(args.out, provenance.record(" ".join([parser.prog, *sys.argv[1:]]), figures))


if __name__ == "__main__":
    main()
