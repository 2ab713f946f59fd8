"""What HTTP costs an engine: the same chats straight from it, and streamed by a server, turn by turn.

Server and client share the machine, and answers are sampled as the model recommends. Run by hand, alone on the machine:

    python -m tests.serve.share --chats 16 --tokens 500 --rounds 5 --out docs/results/http-share.json

With ``--gateway`` there is a third turn: a gateway, and a worker that has the model.
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
from moesaic.bench import report
from moesaic.cli.loop import run_async


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell story number {number} about a fox."}]


Turn = Callable[[int], float]
"""Has that many-th of turns done; returns tokens per second."""


@contextlib.contextmanager
def direct(chats: int, tokens: int) -> Iterator[Turn]:
    """Have an engine in a process of its own."""
    code = f"from tests.serve.share import in_process; in_process({chats}, {tokens})"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
        assert child.stdin and child.stdout
        asked, said = child.stdin, child.stdout

        def turn(number: int) -> float:
            asked.write(f"{number}\n")
            return float(said.readline())

        yield turn
        asked.close()


def in_process(chats: int, tokens: int) -> None:
    with LLM.load() as llm:
        sampling = llm.sampling(max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        for line in sys.stdin:
            prompts = [llm.encode_chat(chat(int(line) * chats + number)) for number in range(chats)]
            begun = time.perf_counter()
            replies = [llm.submit(prompt, sampling, chat=True)[0] for prompt in prompts]
            count = sum(len(reply.answer.tokens) for reply in replies)
            print(count / (time.perf_counter() - begun), flush=True)


@contextlib.contextmanager
def streamed(chats: int, tokens: int, *gateway: str) -> Iterator[Turn]:
    """Have a server, or a gateway with a worker."""
    with server(*gateway) as url:
        yield lambda number: run_async(_streamed(url, number, chats, tokens))


async def _streamed(url: str, number: int, chats: int, tokens: int) -> float:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        begun = time.perf_counter()
        count = sum(
            await asyncio.gather(*(read(session, url, chat(number * chats + each), tokens) for each in range(chats)))
        )
        return count / (time.perf_counter() - begun)


async def read(session: aiohttp.ClientSession, url: str, messages: Any, tokens: int) -> int:
    body = {"messages": messages, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    tail = b""
    async with session.post(url + "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for chunk in answer.content.iter_any():
            tail = tail[-2000:] + chunk
    return int(tail.split(b'"completion_tokens":')[1].split(b",")[0])


@contextlib.contextmanager
def server(*gateway: str) -> Iterator[str]:
    """Run a server of the built-in model, or a gateway with a worker; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, quiet = f"http://127.0.0.1:{port}", ["--log-level", "warning"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        what = ["gateway", "--jobs", f"{folder}/jobs.sqlite"] if gateway else ["serve"]
        commands = [[*what, "--port", str(port)]]
        if gateway:
            commands.append(["worker", "--gateway", url])
        for command in commands:
            child = stack.enter_context(subprocess.Popen([sys.executable, "-m", "moesaic.cli", *command, *quiet]))
            stack.callback(child.terminate)
        asyncio.run(ready(url))
        yield url


async def ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url + "/v1/models") as answer:
                    if (await answer.json()).get("data"):
                        return
            await asyncio.sleep(0.2)


def measure(chats: int, tokens: int, rounds: int, *, gateway: bool) -> Mapping[str, Any]:
    """Take turns, so that what else goes on in the machine slows all of them; a first one of each does not count."""
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        turns = {"direct": stack.enter_context(direct(chats, tokens))}
        turns["server"] = stack.enter_context(streamed(chats, tokens))
        if gateway:
            turns["gateway"] = stack.enter_context(streamed(chats, tokens, "gateway"))
        for number in range(rounds + 1):
            for name, turn in turns.items():
                speed = turn(number)
                if number:
                    found.setdefault(name, []).append(round(speed, 1))
                    print(f"{number} of {rounds}: {name} {speed:.0f} tok/s", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in found.items()}
    figures: dict[str, Any] = {"chats": chats, "tokens": tokens, "tokens_per_second": found, "medians": medians}
    figures["server_of_direct"] = _share(found["server"], found["direct"])
    if gateway:
        figures["gateway_of_server"] = _share(found["gateway"], found["server"])
    return figures


def _share(these: Sequence[float], those: Sequence[float]) -> float:
    """Return the median of the rounds' own shares."""
    return round(statistics.median(one / other for one, other in zip(these, those, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gateway", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.chdir(Path(__file__).parents[2])
    figures = measure(args.chats, args.tokens, args.rounds, gateway=args.gateway)
    print(figures)
    if args.out:
        command = f"python -m tests.serve.share --chats {args.chats} --tokens {args.tokens} --rounds {args.rounds}"
        written = f"{command}{' --gateway' * args.gateway} --out {args.out.name}"
        report.write(args.out, report.record(written, figures))


if __name__ == "__main__":
    main()
