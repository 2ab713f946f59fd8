"""The command ``moesaic``: one subcommand = one short function that imports what it needs when called.

Knows the flags, and how an error becomes one line and an exit code: 0 done, 2 refused or failed, 130
interrupted, 141 nobody reads the output any more. ``moesaic --help`` imports neither torch nor a terminal library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic import __version__
from moesaic.cli.admin import add_admin
from moesaic.cli.batch import add_batch
from moesaic.cli.cluster import add_gateway, add_worker
from moesaic.cli.flags import CACHE_DTYPES, DTYPES, Commands, add_command, add_model, folder
from moesaic.cli.keys import add_keys
from moesaic.cli.launch import add_launch
from moesaic.cli.measuring import add_bench, add_perplexity
from moesaic.cli.serving import add_serve
from moesaic.errors import InvalidRequest, MoesaicError

if TYPE_CHECKING:
    from moesaic.llm import LLM

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed")
LAYOUTS = ("hf", "mistral", "meta")
LISTS = ("models", "formats", "ops", "checkpoints", "chat-formats")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's own) and return its exit code."""
    args = _parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    # For the records of what is measured, which leave out where things lie on this machine.
    args.line = shlex.join(["moesaic", *(re.sub(r"(^|=)[~/].*/", r"\1", word) for word in words)])
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except MoesaicError as error:
        from moesaic.console.visible import one_line

        print(f"moesaic: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moesaic",
        description="Run sparse mixture-of-experts chat models (Mixtral) and their dense relatives.",
        epilog="examples:\n  moesaic chat\n  moesaic chat --help    all about one command",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moesaic {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_chat,
        add_serve,
        add_gateway,
        add_worker,
        add_admin,
        add_launch,
        add_keys,
        add_batch,
        _add_pull,
        _add_convert,
        _add_pack,
        _add_list,
        add_perplexity,
        add_bench,
    ):
        add(commands)
    return parser


# chat


def _add_chat(commands: Commands) -> None:
    parser = add_command(
        commands,
        "chat",
        _chat,
        "talk to a model in the terminal",
        "If standard input is not a terminal,\nall of it is one message, and nothing but the answer is printed.",
        "moesaic chat",
        "moesaic chat mistralai/Mixtral-8x7B-Instruct-v0.1 --temperature 0.7 --top-p 0.9",
        'echo "Tell me a story about a rabbit." | moesaic chat',
        'moesaic chat ./model -m "Hello!" --json',
    )
    add_model(parser)
    talk = parser.add_argument_group("conversation")
    talk.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    talk.add_argument("--chat-format", metavar="NAME", help="see `moesaic list chat-formats`; default: the model's own")
    talk.add_argument("--plain-text", action="store_true", help="no chat format: what you type is continued")
    talk.add_argument("-m", "--message", metavar="TEXT", help="ask this, print the answer and exit")
    talk.add_argument("--json", action="store_true", help="with -m or piped input: the answer as a JSON object")
    talk.add_argument("--stats", action="store_true", help="with -m or piped input: tokens and times on standard error")
    talk.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer together")
    talk.add_argument(
        "--kv-cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="int8: half the memory of bfloat16; default: that of activations",
    )
    how = parser.add_argument_group("sampling (default: what the checkpoint recommends)")
    how.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    how.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0: off")
    how.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that have this mass together")
    how.add_argument("--min-p", type=float, metavar="P", help="only tokens this times as likely as the likeliest")
    how.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: fewer repetitions")
    how.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer; default: as many as fit")
    how.add_argument("--seed", type=int, metavar="N", help="makes answers repeatable")


def _chat(args: argparse.Namespace) -> int:
    from moesaic.engine import Sampling

    settings = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    Sampling(**settings)  # refused before anything is read
    if args.plain_text and (args.system or args.chat_format):
        raise InvalidRequest("--plain-text goes with neither --system nor --chat-format: it has no template")
    alone = args.message is None and sys.stdin.isatty()
    if alone and (args.json or args.stats):
        raise InvalidRequest("--json and --stats are for one answer: add -m TEXT, or pipe a message in")
    text = None if alone else _message(args.message)
    from moesaic.console.conversation import Conversation

    with _load(args) as llm:
        conversation = Conversation(llm, system=args.system, settings=settings, plain=args.plain_text)
        if text is None:
            from moesaic.console.session import Session

            known = args.model is None or Path(args.model).exists()  # a hub id's folder is named by a digest
            return Session(conversation, llm.name if known else args.model).run()
        from moesaic.console import one_shot

        one_shot.answer(conversation, text, as_json=args.json, stats=args.stats)
        return 0


def _message(given: str | None) -> str:
    from moesaic.console import one_shot

    if given is None:
        return one_shot.read_input()
    if not given.strip():
        raise InvalidRequest("the message is empty: there is nothing to answer")
    return given


def _load(args: argparse.Namespace) -> LLM:
    from moesaic.console.progress import bar
    from moesaic.llm import LLM, OWN_TEMPLATE
    from moesaic.text import chat

    if args.chat_format not in (None, OWN_TEMPLATE):
        chat.get_format(args.chat_format)  # before anything is fetched
    path = folder(args.model)
    with bar("loading") as progress:
        return LLM.load(
            path,
            dtype=args.dtype,
            format=args.format,
            device=args.device,
            context=args.context,
            kv_cache_dtype=args.kv_cache_dtype,
            chat_format=args.chat_format,
            progress=progress,
        )


# pull, convert


def _add_pull(commands: Commands) -> None:
    parser = add_command(
        commands,
        "pull",
        _pull,
        "fetch a model",
        "What was fetched before is not fetched again, and what was\ninterrupted goes on. Prints the folder.",
        "moesaic pull mistralai/Mixtral-8x7B-Instruct-v0.1",
        "moesaic pull https://models.example.org/mixtral-8x7b.tar --to ./mixtral --sha256 0123...",
    )
    parser.add_argument("source", metavar="SOURCE", help="org/name[@revision] on the hub, or the address of a .tar")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to make; default: the cache")
    parser.add_argument("--sha256", metavar="HEX", help="what the archive's digest must be")


def _pull(args: argparse.Namespace) -> int:
    from moesaic import pull
    from moesaic.console.progress import bar

    with bar(f"fetching {args.source}") as progress:
        print(pull.pull(args.source, args.to, sha256=args.sha256, progress=progress))
    return 0


def _add_convert(commands: Commands) -> None:
    parser = add_command(
        commands,
        "convert",
        _convert,
        "write a checkpoint in another layout",
        "Bits and dtypes stay as they are;\nthe new folder appears whole or not at all.",
        "moesaic convert ./mixtral ./mixtral-hf --to hf --shards 8",
    )
    parser.add_argument("src", metavar="SRC", type=Path, help="a checkpoint, in any layout")
    parser.add_argument("dst", metavar="DST", type=Path, help="a new folder")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="the layout")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="into how many files (default 1)")


def _convert(args: argparse.Namespace) -> int:
    from moesaic.console.progress import bar
    from moesaic.convert import convert

    with bar(f"converting to {args.to}") as progress:
        convert(args.src, args.dst, args.to, args.shards, progress)
    return 0


def _add_pack(commands: Commands) -> None:
    parser = add_command(
        commands,
        "pack",
        _pack,
        "quantize a model once, into a folder that loads at once",
        "The weights are laid out\n"
        "as the kernels read them and mapped ever after; the new folder appears whole or not at all.",
        "moesaic pack ./mixtral ./mixtral-q4 --format q4",
        "moesaic pack ./mixtral ./mixtral-small --format experts=int2,attention=int8",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or org/name on the hub")
    parser.add_argument("dst", metavar="DST", type=Path, help="a new folder")
    parser.add_argument("--format", metavar="F", required=True, help="q8, q4, q3, q2, a format, or role=format,...")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of activations and of what stays plain")


def _pack(args: argparse.Namespace) -> int:
    from moesaic import packed
    from moesaic.console.progress import bar

    path = folder(args.model)
    assert path is not None
    with bar("packing") as progress:
        packed.pack(path, args.dst, args.format, args.dtype, progress)
    return 0


# list


def _add_list(commands: Commands) -> None:
    parser = add_command(
        commands,
        "list",
        _list,
        "show what this build has",
        "For ops: which backend runs each on which device\nand weight format, and why others do not.",
        "moesaic list models",
        "moesaic list ops --json",
    )
    parser.add_argument("what", choices=LISTS)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _list(args: argparse.Namespace) -> int:
    from moesaic import inventory

    rows = inventory.rows(args.what)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(inventory.lines(rows)))
    return 0
