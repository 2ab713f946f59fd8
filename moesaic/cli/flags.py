"""Helpers that several subcommands share: declare a command, add the model's flags, and find the model's folder.

This module imports nothing slow, because ``moesaic --help`` imports it.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import InvalidParameter
from moesaic.load_options import DTYPES, LoadOptions

if TYPE_CHECKING:
    from moesaic.plan import Plan

HELP_WIDTH = 79
MODEL_HELP = (
    "a folder, a GGUF file, org/name[:quantization] on the Hugging Face hub, or a built-in model: smollm2 or tales"
)

DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
"""Seconds of the units that ``duration`` reads."""

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
        help=f"{MODEL_HELP}; default: smollm2",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of activations; default: as the checkpoint is stored"
    )
    about = (
        "quantize the weights: q8, q4, q3, q2, a format of `moesaic list formats`, or experts=int2,attention=int8; "
        "auto: the first that fits in memory"
    )
    if formats:
        parser.add_argument("--format", metavar="F", action="append", help=f"{about}; may be repeated")
    else:
        parser.add_argument("--format", metavar="F", help=about)
    add_requantize(parser)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def add_requantize(parser: argparse._ActionsContainer) -> None:
    """Add the flag that lets --format round weights that are quantized already."""
    parser.add_argument(
        "--requantize", action="store_true", help="let --format round weights that the file has quantized already"
    )


def add_speculation(parser: argparse._ActionsContainer) -> None:
    """Add the flag that chooses how tokens are proposed."""
    from moesaic.engine.speculation import KINDS

    parser.add_argument(
        "--speculation",
        choices=KINDS,
        help="verify several tokens in a step where text repeats and this is faster; answers stay the same "
        "(default ngram)",
    )


def add_show_plan(parser: argparse._ActionsContainer) -> None:
    """Add the flag that prints how a model will be loaded."""
    parser.add_argument(
        "--plan", action="store_true", help="first print how the model is loaded, its memory and the speed to expect"
    )


def show_plan(args: argparse.Namespace, plan: Plan) -> None:
    """Print the plan to standard error if the flag asks for it."""
    if args.plan:
        from moesaic.hardware import this_machine
        from moesaic.planner import text

        machine = this_machine.describe(str(plan.device))
        print("\n".join(text.loading_lines(plan, machine)), file=sys.stderr, flush=True)


def duration(text: str) -> float:
    """Return the seconds of a duration such as ``90``, ``90s``, ``15m`` or ``2h``, for argparse.

    Raises:
        argparse.ArgumentTypeError: the text is no duration above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    seconds = float(match[1]) * DURATION_UNITS[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no duration: write seconds, or 90s, 15m, 2h, 1d")
    return seconds


def load_options(args: argparse.Namespace, **changes: Any) -> LoadOptions:
    """Return the options of the flags that load a model, with ``changes``; a command may have only some of the flags.

    Raises:
        InvalidParameter: a value is out of range.
    """
    given = {name: getattr(args, name) for name in LoadOptions.__dataclass_fields__ if hasattr(args, name)}
    return LoadOptions(**(given | changes))


def numbers(name: str, text: str | None, kind: type[Any]) -> list[Any]:
    """Return the numbers in the value of the flag ``name``, which are separated by commas; none if it is not given.

    Raises:
        InvalidParameter: a part is no number of this kind.
    """
    if text is None:
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidParameter(name, f"is {text!r}, expected numbers separated by commas, such as 1,4,16") from error


def folder(model: str) -> Path:
    """Return the folder or file of the model that the argument MODEL names; download it if it is a name on the hub.

    A path that exists comes before the name of a built-in model, and before one on the hub.

    Raises:
        NotInstalled: the package of the built-in model is not installed.
    """
    from moesaic import builtin, pull
    from moesaic.console.progress import bar
    from moesaic.hub_files import HubName

    named = builtin.find(model)
    if named is not None:
        return named
    if Path(model).exists() or HubName.parse(model) is None:
        return Path(model)
    with bar(f"fetching {model}") as progress:
        return pull.pull(model, progress=progress)
