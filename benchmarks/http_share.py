"""Measure what HTTP costs an engine: the same chats run on the engine directly and through a streaming server.

Every round measures all variants one after another, so that other load on the machine slows all of them. Server and
client run on the same machine. The sampling parameters are those that the model recommends. With --gateway, a third
variant goes through a gateway to a worker that has the model. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from moesaic import LLM
from moesaic.bench import provenance
from moesaic.cli.event_loop import run_async

EXAMPLES = """examples:
  python -m benchmarks.http_share --chats 16 --tokens 500 --rounds 5
  python -m benchmarks.http_share --gateway --rounds 12 --out docs/results/http-share.json
"""

Turn = Callable[[int], float]
"""Function that runs the chats of the round with the given number and returns tokens per second."""


def chat(number: int) -> list[dict[str, str]]:
    """Return the messages of chat ``number``."""
    return [{"role": "user", "content": f"Tell story number {number} about a fox."}]


@contextlib.contextmanager
def direct(chats: int, tokens: int) -> Iterator[Turn]:
    """Run an engine in a child process; yield a function that runs a round of chats on it."""
    code = f"from benchmarks.http_share import run_engine; run_engine({chats}, {tokens})"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
        assert child.stdin and child.stdout
        rounds, speeds = child.stdin, child.stdout

        def turn(number: int) -> float:
            rounds.write(f"{number}\n")
            return float(speeds.readline())

        yield turn
        rounds.close()


def run_engine(chats: int, tokens: int) -> None:
    """Run the chats of every round whose number comes on standard input, and print the round's tokens per second."""
    with LLM.load("tales") as llm:
        sampling = llm.sampling(max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        for line in sys.stdin:
            prompts = [llm.encode_chat(chat(int(line) * chats + number)) for number in range(chats)]
            start = time.perf_counter()
            replies = [llm.submit(prompt, sampling, chat=True)[0] for prompt in prompts]
            count = sum(len(reply.answer.tokens) for reply in replies)
            print(count / (time.perf_counter() - start), flush=True)


@contextlib.contextmanager
def streamed(chats: int, tokens: int, *, gateway: bool) -> Iterator[Turn]:
    """Run a server, or a gateway with a worker; yield a function that runs a round of chats through it."""
    with run_server(gateway=gateway) as url:
        yield lambda number: run_async(_streamed(url, number, chats, tokens))


async def _streamed(url: str, number: int, chats: int, tokens: int) -> float:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()
        counts = await asyncio.gather(
            *(_read_stream(session, url, chat(number * chats + offset), tokens) for offset in range(chats))
        )
        return sum(counts) / (time.perf_counter() - start)


async def _read_stream(session: aiohttp.ClientSession, url: str, messages: Any, tokens: int) -> int:
    """Read an answer to its end and return its number of tokens, as the server counts them."""
    body = {"messages": messages, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    tail = b""
    async with session.post(url + "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for chunk in response.content.iter_any():
            tail = tail[-2000:] + chunk
    return int(tail.split(b'"completion_tokens":')[1].split(b",")[0])


@contextlib.contextmanager
def run_server(*, gateway: bool) -> Iterator[str]:
    """Run a server of the model tales, or a gateway with a worker; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, quiet = f"http://127.0.0.1:{port}", ["--log-level", "warning"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = ["gateway", "--jobs", f"{folder}/jobs.sqlite"] if gateway else ["serve", "tales"]
        commands = [[*server, "--port", str(port)]]
        if gateway:
            commands.append(["worker", "tales", "--gateway", url])
        for command in commands:
            child = stack.enter_context(subprocess.Popen([sys.executable, "-m", "moesaic.cli", *command, *quiet]))
            stack.callback(child.terminate)
        asyncio.run(_wait_until_ready(url))
        yield url


async def _wait_until_ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url + "/v1/models") as response:
                    if (await response.json()).get("data"):
                        return
            await asyncio.sleep(0.2)


def measure(chats: int, tokens: int, rounds: int, *, gateway: bool) -> Mapping[str, Any]:
    """Run a warm-up round and ``rounds`` rounds; return tokens per second by variant, the medians, and their ratios."""
    speeds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        turns = {"direct": stack.enter_context(direct(chats, tokens))}
        turns["server"] = stack.enter_context(streamed(chats, tokens, gateway=False))
        if gateway:
            turns["gateway"] = stack.enter_context(streamed(chats, tokens, gateway=True))
        for number in range(rounds + 1):
            for name, turn in turns.items():
                speed = turn(number)
                if number:  # round 0 is the warm-up
                    speeds.setdefault(name, []).append(round(speed, 1))
                    print(f"{number} of {rounds}: {name} {speed:.0f} tok/s", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    figures: dict[str, Any] = {"chats": chats, "tokens": tokens, "tokens_per_second": speeds, "medians": medians}
    figures["server_of_direct"] = _median_ratio(speeds["server"], speeds["direct"])
    if gateway:
        figures["gateway_of_server"] = _median_ratio(speeds["gateway"], speeds["server"])
    return figures


def _median_ratio(speeds: Sequence[float], baselines: Sequence[float]) -> float:
    """Return the median, over all rounds, of the ratio of a round's speed to its baseline."""
    return round(statistics.median(speed / baseline for speed, baseline in zip(speeds, baselines, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http_share",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chats", type=int, default=16, metavar="N", help="concurrent chats (default 16)")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="tokens per answer (default 500)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds after the warm-up (default 5)")
    parser.add_argument("--gateway", action="store_true", help="also measure a gateway with a worker")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to this file, as JSON")
    args = parser.parse_args()
    out = args.out.absolute() if args.out else None
    os.chdir(Path(__file__).parents[1])  # child processes import this package
    figures = measure(args.chats, args.tokens, args.rounds, gateway=args.gateway)
    print(figures)
    if out:
        command = f"{parser.prog} --chats {args.chats} --tokens {args.tokens} --rounds {args.rounds}"
        command = f"{command}{' --gateway' * args.gateway} --out {out.name}"
        provenance.write(out, provenance.record(command, figures))


if __name__ == "__main__":
    main()
