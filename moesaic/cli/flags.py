"""What several subcommands have in common: how one is declared, and how it names a model.

Imports nothing slow: ``moesaic --help`` reads this.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
CACHE_DTYPES = (*DTYPES, "int8")

Commands = Any  # argparse's own name for what add_subparsers returns is private


def add_command(
    commands: Commands, name: str, run: Any, about: str, more: str, *examples: str
) -> argparse.ArgumentParser:
    """Add a subcommand that ``run`` does, with its help and examples, and return its parser."""
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


def add_model(parser: argparse.ArgumentParser, *, formats: bool = False) -> None:
    """Add what says which model, and how it is held; with ``formats``, in several formats one after the other."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder, or org/name on the hub; default: built-in")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as the checkpoint is stored")
    about = "quantize: q8, q4, q3, q2, a format, or experts=int2,attention=int8"
    if formats:
        parser.add_argument("--format", metavar="F", action="append", help=f"{about}; may be repeated")
    else:
        parser.add_argument("--format", metavar="F", help=about)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def folder(model: str | None) -> Path | None:
    """Return the folder that MODEL means: itself, or where the hub's files are put; None for the built-in model."""
    from moesaic import pull
    from moesaic.console.progress import bar

    if model is None:
        return None
    if Path(model).exists() or not pull.HUB_ID.fullmatch(model) or model.startswith(("./", "../")):
        return Path(model)
    with bar(f"fetching {model}") as progress:
        return pull.pull(model, progress=progress)
