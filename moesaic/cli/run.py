"""``moesaic run``: choose the files of a model that fit, download and quantize them, and chat or serve."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli.flags import MODEL_HELP, Commands, add_command
from moesaic.errors import InvalidRequest, NotFound
from moesaic.published import CONFIGURATIONS

if TYPE_CHECKING:
    from moesaic.planner.hub import Choice


def add_run(commands: Commands) -> None:
    parser = add_command(
        commands,
        "run",
        _run,
        "choose, download and quantize what fits of a model, then chat with it",
        "Of a repository with several GGUF models, the largest is taken that fits in memory and answers as fast as "
        "people read. Weights that are not quantized are, if they have to be, and the result is kept in the cache. One "
        "question is asked before anything is downloaded. Arguments after -- go to `moesaic chat`, or with --serve to "
        "`moesaic serve`.",
        "moesaic run mixtral-8x7b",
        "moesaic run bartowski/Meta-Llama-3-8B-Instruct-GGUF --yes --serve -- --port 8080",
    )
    parser.usage = "moesaic run [FLAGS] MODEL [-- ARGUMENTS]"
    names = ", ".join(CONFIGURATIONS)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or a published model: {names}")
    parser.add_argument("--serve", action="store_true", help="serve the model instead of chatting")
    parser.add_argument("--yes", action="store_true", help="download without asking")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a prompt and its answer (default 8192)")


def split_arguments(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return a command line without what ``run`` passes on, and that: all after the first ``--``.

    Argparse cannot do this: it stops reading positional arguments at the first flag.
    """
    if words[:1] != ["run"] or "--" not in words:
        return words, ()
    end = words.index("--")
    return words[:end], words[end + 1 :]


def _run(args: argparse.Namespace) -> int:
    path = _local(args.model) or _prepared(args)
    if path is None:
        print("nothing was downloaded", file=sys.stderr)
        return 1
    context = [] if args.context is None else ["--context", str(args.context)]
    code: int = args.main(["serve" if args.serve else "chat", str(path), *_automatic(path), *context, *args.arguments])
    return code


def _automatic(path: Path) -> list[str]:
    """Return the flag that chooses a format by the free memory, which a packed folder does not take."""
    from moesaic import packed

    return [] if packed.is_packed(path) else ["--format", "auto"]


def _local(model: str) -> Path | None:
    """Return the path of a model that is here already; None if it has to be fetched.

    Raises:
        NotFound: the name is none of a model on the hub.
    """
    from moesaic import builtin
    from moesaic.hub_files import HubName

    found = builtin.find(model)
    if found is not None or Path(model).exists():
        return found or Path(model)
    if model not in CONFIGURATIONS and HubName.parse(model) is None:
        raise NotFound(f"{model}: no such folder or file, and not org/name on the hub; see `moesaic run --help`")
    return None


def _prepared(args: argparse.Namespace) -> Path | None:
    """Choose, download and quantize the model; return its path, or None if the user does not want it."""
    from moesaic import pull
    from moesaic.console.progress import bar
    from moesaic.hardware import this_machine
    from moesaic.planner import Wish, hub, text

    with bar(f"looking at {args.model}") as progress:
        choice = hub.choose(args.model, this_machine.describe(), Wish(context=args.context), progress)
    print("\n".join([*text.lines(choice.report), "", *hub.choice_lines(choice)]), file=sys.stderr)
    if not (args.yes or _agreed(choice)):
        return None
    with bar(f"fetching {choice.source}") as progress:
        path = pull.pull(choice.source, progress=progress)
    return path if choice.format is None else _packed(path, choice, choice.format)


def _agreed(choice: Choice) -> bool:
    """Ask whether to download.

    Raises:
        InvalidRequest: there is no terminal to ask.
    """
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{choice.nbytes / 1e9:.1f} GB would be downloaded: add --yes to agree without a terminal")
    return input("Go on? [Y/n] ").strip().lower() in ("", "y", "yes")


def _packed(path: Path, choice: Choice, chosen: str) -> Path:
    """Return the folder in the cache with the downloaded model in a format; quantize it unless it is there."""
    import hashlib

    from moesaic import packed, pull
    from moesaic.console.progress import bar

    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    folder = pull.cache_folder() / "packed" / f"{choice.source.replace('/', '--')}-{chosen}-{digest}"
    if not packed.is_packed(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with bar(f"quantizing to {chosen}") as progress:
            packed.pack(path, folder, chosen, progress=progress)
    return folder
