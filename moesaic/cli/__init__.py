"""The command ``moesaic``: each subcommand is a function that imports its modules when it runs.

This module parses the flags and turns an error into one line and an exit code: 0 success, 2 error, 130 interrupted,
141 the reader of the output has closed it. ``moesaic --help`` imports neither torch nor a terminal library.
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

from moesaic import __version__, registry
from moesaic.cli.admin import add_admin
from moesaic.cli.batch import add_batch
from moesaic.cli.bench import add_bench
from moesaic.cli.cluster import add_gateway, add_worker
from moesaic.cli.flags import (
    Commands,
    add_command,
    add_model,
    add_show_plan,
    add_speculation,
    folder,
    load_options,
    show_plan,
)
from moesaic.cli.keys import add_keys
from moesaic.cli.launch import add_launch
from moesaic.cli.loading import collection_paused
from moesaic.cli.plan import add_plan
from moesaic.cli.quality import add_eval, add_perplexity
from moesaic.cli.quantize import add_pack, add_quantize
from moesaic.cli.run import add_run, split_arguments
from moesaic.cli.serving import add_serve
from moesaic.cli.train import add_train
from moesaic.errors import InvalidRequest, MoesaicError
from moesaic.load_options import CACHE_DTYPES

if TYPE_CHECKING:
    from moesaic.llm import LLM

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed")
QUANTIZATIONS = ("compressed-tensors", "gptq")
"""Targets of ``convert`` that are no layouts: methods of quantization in the layout hf."""
INVENTORIES = ("models", "formats", "ops", "checkpoints", "chat-formats")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, passed_on = split_arguments(words)
    args = _parser().parse_args(own)
    args.arguments, args.main = passed_on, main  # ``run`` runs another command
    # Benchmarks record the command line, without the folders of this machine.
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
        # Python flushes standard output again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moesaic",
        description="Run sparse mixture-of-experts chat models (Mixtral), and dense models of the same families.",
        epilog="examples:\n  moesaic chat\n  moesaic chat --help    show the flags of a command",
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
        add_plan,
        add_run,
        _add_pull,
        _add_convert,
        add_pack,
        add_quantize,
        add_train,
        _add_list,
        add_perplexity,
        add_eval,
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
        "chat with a model in the terminal",
        "If standard input is not a terminal, its whole text is the message, and the command prints only the answer.",
        "moesaic chat",
        "moesaic chat mistralai/Mixtral-8x7B-Instruct-v0.1 --temperature 0.7 --top-p 0.9",
        'echo "What is the capital of Germany?" | moesaic chat',
        'moesaic chat tales -m "Tell me a story about a rabbit."',
        'moesaic chat ./model -m "Hello!" --json',
    )
    add_model(parser)
    chat = parser.add_argument_group("conversation")
    chat.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    chat.add_argument(
        "--chat-format", metavar="NAME", help="see `moesaic list chat-formats`; or FILE.jinja; default: the model's own"
    )
    chat.add_argument("--plain-text", action="store_true", help="use no chat format: the model continues your text")
    chat.add_argument("-m", "--message", metavar="TEXT", help="send this message, print the answer and exit")
    chat.add_argument("--json", action="store_true", help="print the answer as JSON; requires -m or piped input")
    chat.add_argument(
        "--stats",
        action="store_true",
        help="print token counts and times on standard error; requires -m or piped input",
    )
    chat.add_argument("--context", type=int, metavar="N", help="maximum tokens of prompt and answer together")
    chat.add_argument(
        "--kv-cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="int8 takes half the memory of bfloat16; default: the data type of activations",
    )
    add_speculation(chat)
    add_show_plan(chat)
    sampling = parser.add_argument_group("sampling (default: the checkpoint's recommendation)")
    sampling.add_argument("--temperature", type=float, metavar="T", help="randomness; 0: always the most likely token")
    sampling.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens; 0: off")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most likely tokens with total probability P"
    )
    sampling.add_argument(
        "--min-p", type=float, metavar="P", help="drop tokens less than P times as likely as the most likely token"
    )
    sampling.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1: make repeated tokens less likely"
    )
    sampling.add_argument(
        "--max-tokens", type=int, metavar="N", help="maximum tokens of an answer; default: as many as fit"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="seed of the random generator; repeats an answer")


def _chat(args: argparse.Namespace) -> int:
    from moesaic.engine import Sampling

    settings = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    Sampling(**settings)  # check the values before the model is loaded
    if args.plain_text and (args.system or args.chat_format):
        raise InvalidRequest("--plain-text excludes --system and --chat-format: plain text has no template")
    interactive = args.message is None and sys.stdin.isatty()
    if interactive and (args.json or args.stats):
        raise InvalidRequest("--json and --stats need a single message: pass -m TEXT, or pipe a message in")
    with collection_paused():
        text = None if interactive else _message(args.message)
        llm = _load(args)
    from moesaic.console.conversation import Conversation

    with llm:
        conversation = Conversation(llm, system=args.system, settings=settings, plain=args.plain_text)
        if text is None:
            from moesaic.console.session import Session

            local = Path(args.model).exists()  # the folder of a hub model is named by a digest
            return Session(conversation, llm.name if local else args.model).run()
        from moesaic.console import one_shot

        one_shot.answer(conversation, text, as_json=args.json, stats=args.stats)
        return 0


def _message(argument: str | None) -> str:
    """Return the message of -m, or all of standard input."""
    from moesaic.console import one_shot

    if argument is None:
        return one_shot.read_input()
    if not argument.strip():
        raise InvalidRequest("the message is empty: pass a text to -m")
    return argument


def _load(args: argparse.Namespace) -> LLM:
    from moesaic import builtin
    from moesaic.console.progress import bar
    from moesaic.llm import LLM
    from moesaic.plan import make_plan
    from moesaic.text import chat_choice

    if args.chat_format is not None:
        chat_choice.check_name(args.chat_format)  # before a model is fetched
    args.model = args.model or builtin.default()
    path, options = folder(args.model), load_options(args)
    with bar("loading") as progress:
        plan = make_plan(path, options)
        show_plan(args, plan)
        engine = {"chat_format": args.chat_format, "speculation": args.speculation or "ngram"}
        return LLM.from_plan(plan, path.name, progress=progress, **engine)


# pull, convert


def _add_pull(commands: Commands) -> None:
    parser = add_command(
        commands,
        "pull",
        _pull,
        "download a model",
        "Files that are already there are not downloaded again, and an interrupted download continues. The command "
        "prints the model's folder, or its GGUF file. Of a repository with several GGUF models, name one by its "
        "quantization or by its file.",
        "moesaic pull mistralai/Mixtral-8x7B-Instruct-v0.1",
        "moesaic pull bartowski/SmolLM2-135M-Instruct-GGUF:Q4_K_M",
        "moesaic pull https://models.example.org/mixtral-8x7b.tar --to ./mixtral --sha256 0123...",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="org/name[@revision][:choice] on the Hugging Face hub, or the URL of a .tar"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="new folder for the model; default: in the cache")
    parser.add_argument("--sha256", metavar="HEX", help="expected SHA-256 digest of the archive")


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
        "convert a checkpoint to another layout",
        "Values do not change, unless an adapter is added to them. Quantized weights keep their codes in gguf, "
        "compressed-tensors and gptq, and become float32 in the other layouts. What a layout cannot hold exactly is "
        "refused. The new folder appears only when it is complete.",
        "moesaic convert ./mixtral ./mixtral-hf --to hf --shards 8",
        "moesaic convert ./mixtral-gptq mixtral.gguf --to gguf",
        "moesaic convert mixtral.Q4_0.gguf ./mixtral-w4a16 --to compressed-tensors",
        "moesaic convert smollm2 tuned.gguf --to gguf --adapter ./my-adapter --decode",
    )
    parser.add_argument("src", metavar="SRC", help="folder or GGUF file of a checkpoint, a packed folder, or smollm2")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to create; with --to gguf also a file NAME.gguf")
    targets = [*registry.names("checkpoints"), *QUANTIZATIONS]
    parser.add_argument("--to", choices=targets, required=True, help="the new layout")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of weight files (default 1)")
    parser.add_argument(
        "--decode",
        action="store_true",
        help="write quantized weights that the layout cannot hold exactly as float32, instead of refusing them",
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="add an adapter (LoRA) to the weights")


def _convert(args: argparse.Namespace) -> int:
    from moesaic.console.progress import bar
    from moesaic.convert import convert

    with bar(f"converting to {args.to}") as progress:
        convert(folder(args.src), args.dst, args.to, args.shards, progress, decode=args.decode, adapter=args.adapter)
    return 0


# list


def _add_list(commands: Commands) -> None:
    parser = add_command(
        commands,
        "list",
        _list,
        "list the models, formats, ops, checkpoint layouts or chat formats of this build",
        "For ops, it shows which backend runs each op on each device and weight format, and why others do not.",
        "moesaic list models",
        "moesaic list ops --json",
    )
    parser.add_argument("what", choices=INVENTORIES, help="what to list")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _list(args: argparse.Namespace) -> int:
    from moesaic import inventory

    rows = inventory.rows(args.what)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(inventory.lines(rows)))
    return 0
