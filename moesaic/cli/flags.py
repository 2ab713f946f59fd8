"""Helpers that several subcommands share: declare a command, add the model's flags, and find the model's folder.

This module imports nothing slow, because ``moesaic --help`` imports it.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
CACHE_DTYPES = (*DTYPES, "int8")
HELP_WIDTH = 79
BUILT_IN_NAME = "tales"
"""Name of the built-in model on the command line."""
MODEL_HELP = "a folder, a GGUF file, org/name[:quantization] on the Hugging Face hub, or tales, the built-in model"

Commands = Any
"""What ``ArgumentParser.add_subparsers`` returns; argparse gives its type no public name."""


def add_command(
    commands: Commands, name: str, run: Any, about: str, more: str, *examples: str
) -> argparse.ArgumentParser:
    """Add a subcommand and return its parser.

    Args:
        commands: the parsers of all subcommands.
        name: the subcommand.
        run: function that runs the command: it takes the parsed arguments and returns the exit code.
        about: what the command does, in a phrase; the list of commands shows it.
        more: further sentences of the command's description; a paragraph that has line breaks keeps them.
        examples: command lines to show at the end of the help.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=_wrapped(f"{about[0].upper()}{about[1:]}. {more}"),
        epilog="\n".join(["examples:" if len(examples) > 1 else "example:", *(f"  {line}" for line in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _wrapped(text: str) -> str:
    paragraphs = text.split("\n\n")
    return "\n\n".join(part if "\n" in part else textwrap.fill(part, HELP_WIDTH) for part in paragraphs)


def add_model(parser: argparse.ArgumentParser, *, formats: bool = False) -> None:
    """Add the argument MODEL and the flags of how to load it; with ``formats``, --format may be repeated."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=f"{MODEL_HELP} (default)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of activations; default: as the checkpoint is stored"
    )
    about = "quantize the weights: q8, q4, q3, q2, a format of `moesaic list formats`, or experts=int2,attention=int8"
    if formats:
        parser.add_argument("--format", metavar="F", action="append", help=f"{about}; may be repeated")
    else:
        parser.add_argument("--format", metavar="F", help=about)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def folder(model: str | None) -> Path | None:
    """Return the folder or file of the model that the argument MODEL names, after a download if it is on the hub.

    Without an argument, return None.

    A path that exists comes before the name of the built-in model, and before one on the hub.
    """
    from moesaic import pull
    from moesaic.console.progress import bar
    from moesaic.hub_files import HubName

    if model is None:
        return None
    if model == BUILT_IN_NAME and not Path(model).exists():
        from moesaic.llm import BUILT_IN

        return BUILT_IN
    if Path(model).exists() or HubName.parse(model) is None or model.startswith(("./", "../")):
        return Path(model)
    with bar(f"fetching {model}") as progress:
        return pull.pull(model, progress=progress)
