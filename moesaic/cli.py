"""The command ``moesaic``: one subcommand = one short function that imports what it needs when called.

Knows the flags, and how an error becomes one line and an exit code: 0 done, 2 refused or failed, 130
interrupted, 141 nobody reads the output any more. ``moesaic --help`` imports neither torch nor a terminal library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic import __version__
from moesaic.errors import InvalidRequest, MoesaicError

if TYPE_CHECKING:
    from moesaic.llm import LLM

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CACHE_DTYPES = (*DTYPES, "int8")
LAYOUTS = ("hf", "mistral", "meta")
LISTS = ("models", "formats", "ops", "checkpoints", "chat-formats")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's own) and return its exit code."""
    args = _parser().parse_args(argv)
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
    for add in (_add_chat, _add_pull, _add_convert, _add_pack, _add_list, _add_perplexity, _add_bench):
        add(commands)
    return parser


Commands = Any  # argparse's own name for what add_subparsers returns is private


def _command(commands: Commands, name: str, run: Any, about: str, more: str, *examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}. {more}",
        epilog="\n".join(["examples:" if len(examples) > 1 else "example:", *(f"  {line}" for line in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


# chat


def _add_chat(commands: Commands) -> None:
    parser = _command(
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
    _add_model(parser)
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
        help="int8: half the memory of bfloat16; default: --dtype",
    )
    how = parser.add_argument_group("sampling (default: what the checkpoint recommends)")
    how.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    how.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0: off")
    how.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that have this mass together")
    how.add_argument("--min-p", type=float, metavar="P", help="only tokens this times as likely as the likeliest")
    how.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: fewer repetitions")
    how.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer; default: as many as fit")
    how.add_argument("--seed", type=int, metavar="N", help="makes answers repeatable")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder, or org/name on the hub; default: built-in")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as the checkpoint is stored")
    parser.add_argument(
        "--format", metavar="F", help="quantize: q8, q4, q3, q2, a format, or experts=int2,attention=int8"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


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
        from moesaic.console import once

        once.answer(conversation, text, as_json=args.json, stats=args.stats)
        return 0


def _message(given: str | None) -> str:
    from moesaic.console import once

    if given is None:
        return once.read_input()
    if not given.strip():
        raise InvalidRequest("the message is empty: there is nothing to answer")
    return given


def _load(args: argparse.Namespace) -> LLM:
    from moesaic.console.progress import bar
    from moesaic.llm import LLM, OWN_TEMPLATE
    from moesaic.text import chat

    if args.chat_format not in (None, OWN_TEMPLATE):
        chat.get(args.chat_format)  # before anything is fetched
    path = _folder(args.model)
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


def _folder(model: str | None) -> Path | None:
    """Return the folder that MODEL means: itself, or where the hub's files are put; None for the built-in model."""
    from moesaic import pull
    from moesaic.console.progress import bar

    if model is None:
        return None
    if Path(model).exists() or not pull.HUB_ID.fullmatch(model) or model.startswith(("./", "../")):
        return Path(model)
    with bar(f"fetching {model}") as progress:
        return pull.pull(model, progress=progress)


# pull, convert


def _add_pull(commands: Commands) -> None:
    parser = _command(
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
    parser = _command(
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
    parser = _command(
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

    path = _folder(args.model)
    assert path is not None
    with bar("packing") as progress:
        packed.pack(path, args.dst, args.format, args.dtype, progress)
    return 0


# list


def _add_list(commands: Commands) -> None:
    parser = _command(
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

    rows = inventory.of(args.what)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(inventory.lines(rows)))
    return 0


# perplexity


def _add_perplexity(commands: Commands) -> None:
    parser = _command(
        commands,
        "perplexity",
        _perplexity,
        "measure how well a model predicts a text",
        "Prints perplexity per token\nand bits per byte. Each document is read in windows that do not overlap.",
        "moesaic perplexity held-out.jsonl.xz ./model --format q4",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help='.txt, or .jsonl or .jsonl.xz with a "text" per line')
    _add_model(parser)
    parser.add_argument(
        "--kv-cache-dtype", choices=CACHE_DTYPES, help="read keys and values from a cache; default: none"
    )
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens in a window (default 512)")
    parser.add_argument("--json", action="store_true", help="as a JSON object")


def _perplexity(args: argparse.Namespace) -> int:
    from moesaic.bench import quality
    from moesaic.console.progress import bar
    from moesaic.llm import BUILT_IN
    from moesaic.loading import cache_dtype, load_model
    from moesaic.text.tokenizer import Tokenizer

    texts = quality.read_texts(args.file)
    path = _folder(args.model) or BUILT_IN
    tokenizer = Tokenizer.open(path)
    with bar("loading") as progress:
        loaded = load_model(path, dtype=args.dtype, format=args.format, device=args.device, progress=progress)
    cache = cache_dtype(loaded.model, args.kv_cache_dtype) if args.kv_cache_dtype else None
    with bar("documents", count=True) as progress:
        found = quality.perplexity(loaded, tokenizer, texts, args.length, progress, cache)
    if args.json:
        numbers = {"documents": found.documents, "tokens": found.tokens, "bytes": found.bytes, "length": args.length}
        print(json.dumps(numbers | {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}))
    else:
        print(f"perplexity {found.perplexity:.4f} per token, {found.bits_per_byte:.4f} bits per byte")
        print(f"{found.documents:,} documents, {found.tokens:,} tokens, windows of {args.length}")
    return 0


# bench


def _add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure this machine and this build",
        description="Measure this machine and this build. Leave the machine alone meanwhile.",
        epilog="example:\n  moesaic bench kernels --format int4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds: Commands = parser.add_subparsers(metavar="WHAT", required=True)
    kernels = _command(
        kinds,
        "kernels",
        _bench_kernels,
        "the CPU kernels, op by op",
        "Speeds of Mixtral's shapes, beside\n"
        "the machine's read bandwidth and its fastest multiplication of bytes, measured first.",
        "moesaic bench kernels",
        "moesaic bench kernels --format int4,int2 --out kernels.json",
    )
    kernels.add_argument("--format", metavar="F,...", default="int8,int4,int3,int2", help="which formats")
    kernels.add_argument("--threads", type=int, metavar="N", help="default: as many as there are cores")
    kernels.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each figure (default 1)")
    kernels.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, as JSON")


def _bench_kernels(args: argparse.Namespace) -> int:
    from moesaic.bench import kernels, limits, report
    from moesaic.formats import load
    from moesaic.ops import native

    names = args.format.split(",")
    for name in names:
        load(name)
        if why := native.why_not("linear", "cpu", name):
            raise InvalidRequest(f"there is nothing to measure: {why}")
    if args.threads is not None:
        native.set_threads(args.threads)
    found = limits.measure(report=lambda line: print(line, flush=True))
    rows = []
    for row in chain(kernels.measure(found, names, seconds=args.seconds), kernels.measure_others(found, args.seconds)):
        rows.append(row)
        print(kernels.line(row), flush=True)
    if args.out:
        command = f"moesaic bench kernels --format {args.format}"
        report.write(args.out, report.record(command, kernels.figures(found, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
