"""``moesaic run-batch``: a file of requests becomes a file of answers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import server_options, serving
from moesaic.cli.event_loop import run_async
from moesaic.cli.flags import CACHE_DTYPES, Commands, add_command, add_model, folder
from moesaic.errors import InvalidRequest

if TYPE_CHECKING:
    from moesaic.serve.batch_file import BatchCounts


def add_batch(commands: Commands) -> None:
    parser = add_command(
        commands,
        "run-batch",
        _run_batch,
        "answer a file of requests, in OpenAI's batch format",
        "No port is opened. What OUT has already\n"
        "is not asked again: after an interruption, run the same command. Exit code 1: some requests failed.",
        "moesaic run-batch requests.jsonl answers.jsonl",
        "moesaic run-batch requests.jsonl answers.jsonl ./mixtral-q4 --concurrency 64",
    )
    parser.add_argument("source", metavar="IN", type=Path, help='a {"custom_id", "method", "url", "body"} per line')
    parser.add_argument("target", metavar="OUT", type=Path, help="answers in the order in which they came")
    add_model(parser)
    parser.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer together")
    parser.add_argument("--cache-tokens", type=int, metavar="N", help="places in the key/value cache")
    parser.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES, default="auto", help="int8: half the memory")
    parser.add_argument("--chat-format", metavar="NAME", help="see `moesaic list chat-formats`")
    parser.add_argument(
        "--concurrency", type=int, default=32, metavar="N", help="requests at the same time (default 32)"
    )


def _run_batch(args: argparse.Namespace) -> int:
    server_options.need_packages()
    if args.concurrency < 1:
        raise InvalidRequest(f"--concurrency: is {args.concurrency}, expected at least 1")
    if not args.source.is_file():
        raise InvalidRequest(f"{args.source}: no such file")
    args.models = [args.model] if args.model else []
    args.sequences, args.queue = args.concurrency, 8 * args.concurrency + 256
    args.batch_tokens = None
    count = run_async(_answer(args))
    before = f", {count.skipped} of them before" if count.skipped else ""
    print(f"{count.answered} answered, {count.failed} failed{before}", file=sys.stderr)
    return 1 if count.failed else 0


async def _answer(args: argparse.Namespace) -> BatchCounts:
    from moesaic.console.progress import bar
    from moesaic.serve import batch_file
    from moesaic.serve.app import App
    from moesaic.serve.settings import Settings

    [book] = serving.books(args)
    backend = await serving.open_model(args, folder(args.model), book.card.name)
    try:
        app = App(backend, Settings(request_seconds=0, queue_seconds=0, body_bytes=1 << 30))
        with bar("requests", count=True) as progress:
            return await batch_file.run(app, args.source, args.target, args.concurrency, progress)
    finally:
        await backend.close()
