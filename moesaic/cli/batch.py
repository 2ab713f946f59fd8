"""``moesaic run-batch``: answer a file of requests without a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import server_options, serving
from moesaic.cli.event_loop import run_async
from moesaic.cli.flags import Commands, add_command, add_model, add_show_plan, add_speculation
from moesaic.errors import InvalidRequest
from moesaic.load_options import CACHE_DTYPES

if TYPE_CHECKING:
    from moesaic.serve.batch_file import BatchCounts


def add_batch(commands: Commands) -> None:
    parser = add_command(
        commands,
        "run-batch",
        _run_batch,
        "answer a file of requests in OpenAI's batch format",
        "The command opens no port. Requests that OUT already answers are skipped: run the same command again after "
        "an interruption. The exit code is 1 if requests failed.",
        "moesaic run-batch requests.jsonl answers.jsonl",
        "moesaic run-batch requests.jsonl answers.jsonl ./mixtral-q4 --concurrency 64",
    )
    parser.add_argument(
        "source", metavar="IN", type=Path, help='file with {"custom_id", "method", "url", "body"} on each line'
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="file for the answers, in the order of completion")
    add_model(parser)
    parser.add_argument("--context", type=int, metavar="N", help="maximum tokens of prompt and answer together")
    parser.add_argument("--cache-tokens", type=int, metavar="N", help="capacity of the key/value cache in tokens")
    parser.add_argument(
        "--kv-cache-dtype", choices=CACHE_DTYPES, default="auto", help="int8 takes half the memory of bfloat16"
    )
    parser.add_argument(
        "--chat-format", metavar="NAME", help="see `moesaic list chat-formats`; or FILE.jinja; default: the model's own"
    )
    add_speculation(parser)
    add_show_plan(parser)
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="concurrent requests (default 32)")


def _run_batch(args: argparse.Namespace) -> int:
    server_options.require_packages()
    if args.concurrency < 1:
        raise InvalidRequest(f"--concurrency: is {args.concurrency}, expected at least 1")
    if not args.source.is_file():
        raise InvalidRequest(f"{args.source}: no such file")
    from moesaic import builtin

    args.models = [args.model or builtin.default()]
    args.sequences, args.queue = args.concurrency, 8 * args.concurrency + 256
    args.batch_tokens = None
    counts = run_async(_answer(args))
    earlier = f", {counts.skipped} of them before" if counts.skipped else ""
    print(f"{counts.answered} answered, {counts.failed} failed{earlier}", file=sys.stderr)
    return 1 if counts.failed else 0


async def _answer(args: argparse.Namespace) -> BatchCounts:
    from moesaic.console.progress import bar
    from moesaic.serve import batch_file
    from moesaic.serve.app import App
    from moesaic.serve.settings import Settings

    [entry] = serving.model_entries(args)
    backend = await (await entry.make_plan()).load()
    try:
        app = App(backend, Settings(request_seconds=0, queue_seconds=0, body_bytes=1 << 30))
        with bar("requests", count=True) as progress:
            return await batch_file.run(app, args.source, args.target, args.concurrency, progress)
    finally:
        await backend.close()
