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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from moesaic import LLM
from moesaic.bench import report


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell story number {number} about a fox."}]


def direct(chats: int, tokens: int, rounds: int) -> list[float]:
    """Return tokens per second of each round, from an engine in a process of its own."""
    code = f"from tests.serve.share import in_process; in_process({chats}, {tokens}, {rounds})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def in_process(chats: int, tokens: int, rounds: int) -> None:
    with LLM.load() as llm:
        sampling = llm.sampling(max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        for turn in range(rounds + 1):
            prompts = [llm.encode_chat(chat(turn * chats + number)) for number in range(chats)]
            begun = time.perf_counter()
            replies = [llm.submit(prompt, sampling, chat=True)[0] for prompt in prompts]
            count = sum(len(reply.answer.tokens) for reply in replies)
            if turn:
                print(count / (time.perf_counter() - begun))


async def streamed(url: str, chats: int, tokens: int, rounds: int) -> list[float]:
    """Return the same of a server."""
    found = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for turn in range(rounds + 1):
            begun = time.perf_counter()
            work = (read(session, url, chat(turn * chats + number), tokens) for number in range(chats))
            count = sum(await asyncio.gather(*work))
            if turn:
                found.append(count / (time.perf_counter() - begun))
    return found


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
    found: dict[str, list[float]] = {"direct": [], "server": []}
    for _ in range(rounds):
        found["direct"] += direct(chats, tokens, 2)
        with server() as url:
            found["server"] += asyncio.run(streamed(url, chats, tokens, 2))
        if gateway:
            with server("gateway") as url:
                found.setdefault("gateway", []).extend(asyncio.run(streamed(url, chats, tokens, 2)))
    medians = {name: statistics.median(values) for name, values in found.items()}
    figures: dict[str, Any] = {"chats": chats, "tokens": tokens, "tokens_per_second": found, "medians": medians}
    figures["server_of_direct"] = round(medians["server"] / medians["direct"], 3)
    if gateway:
        figures["gateway_of_server"] = round(medians["gateway"] / medians["server"], 3)
    return figures


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
