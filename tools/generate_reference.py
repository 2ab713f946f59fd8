"""Write docs/reference/ from the code: commands, settings, environment, routes, metrics, errors, modules, and more.

    python -m tools.generate_reference            write the pages
    python -m tools.generate_reference --check    exit with 1 if a page is not current

Routes and metrics come from a gateway and a server that are started for this on free ports of loopback: a gateway
serves nearly every route of `moesaic serve`, and its own.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from moesaic import cli, errors, registry
from tools.markdown import page, prose, table
from tools.reference_http import http_api, metrics, surface

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs/reference"

SETTINGS = {
    "The server and the gateway": ("moesaic.serve.settings", "Settings"),
    "TGI's routes": ("moesaic.serve.settings", "TgiBounds"),
    "The engine": ("moesaic.engine", "Limits"),
    "The job store": ("moesaic.cluster.jobs", "StoreLimits"),
    "Loading a model": ("moesaic.load_options", "LoadOptions"),
    "Sampling": ("moesaic.engine", "Sampling"),
}
"""The headings of the page of settings, each with the module and name of the dataclass that it shows."""

READ_HERE = {
    "MOESAIC_ADMIN_KEY": "The administrator's key for `moesaic admin`.",
    "MOESAIC_API_KEY": "The key that the Python client and `moesaic bench serving` send.",
    "MOESAIC_API_KEYS": "Client keys for a server or a gateway, separated by commas, instead of a file.",
    "MOESAIC_BENCH_INSTRUCTION_SET": "`moesaic bench peers --instruction-set` sets it for the processes it starts.",
    "MOESAIC_BASE_URL": "The address of the server that the Python client asks.",
    "MOESAIC_WORKER_KEY": "The key that `moesaic worker` sends to its gateway, or to the AIME API server.",
    "NO_COLOR": "If set, `moesaic chat` prints no colours.",
    "RAY_ADDRESS": "The Ray cluster for `moesaic launch ray`, unless `--address` is given.",
    "RAY_AUTH_MODE": "`moesaic launch ray` needs `token` here unless Ray is on loopback.",
    "TERM": "`dumb` makes `moesaic chat` print no colours.",
    "XDG_CACHE_HOME": "Downloaded models are stored in `moesaic/` below it. Default: `~/.cache`.",
    "XDG_STATE_HOME": "Chat history and the gateway's default job file are in `moesaic/` below it. "
    "Default: `~/.local/state`.",
}
"""Environment variables that the code looks up, and their meanings. ``environment`` fails if it looks up others."""
READ_BY_LIBRARIES = {
    "CUDA_VISIBLE_DEVICES": "PyTorch: the GPUs that a process sees.",
    "HF_HUB_CACHE": "huggingface_hub: its own cache folder.",
    "HF_TOKEN": "huggingface_hub: the token for gated models.",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "OpenTelemetry: the collector that `--otel` sends traces to.",
    "OTEL_SERVICE_NAME": "OpenTelemetry: the name of the service in traces.",
    "RAY_AUTH_TOKEN": "Ray: the token of the cluster.",
    "RAY_AUTH_TOKEN_PATH": "Ray: a file with the token.",
}
HIDDEN = (argparse._SubParsersAction, argparse._HelpAction)
INTERNAL = {"OMP_NUM_THREADS", "LD_LIBRARY_PATH"}
"""Variables that are passed on to child processes and change nothing for users."""


# commands


def commands() -> str:
    parts = [
        "Every command explains itself: `moesaic COMMAND --help`. Exit codes: 0 done, 1 finished with failures, "
        "2 refused or failed, 70 (workers) the engine was lost, 130 interrupted."
    ]
    for name, command in subcommands(cli._parser()).items():
        parts += command_parts(f"moesaic {name}", command)
    return page("Commands", *parts)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def command_parts(name: str, parser: argparse.ArgumentParser, level: int = 2) -> Iterator[str]:
    yield f"{'#' * level} {name}"
    yield " ".join((parser.description or "").split())
    examples = [line.strip() for line in (parser.epilog or "").splitlines()[1:]]
    if examples:
        yield "```console\n" + "\n".join(f"$ {line.partition('    ')[0]}" for line in examples) + "\n```"
    rows = [
        (f"`{invocation(action)}`", help_of(action))
        for action in parser._actions
        if action.help is not argparse.SUPPRESS and not isinstance(action, HIDDEN)
    ]
    if rows:
        yield table(("argument", "meaning"), rows)
    for inner, child in subcommands(parser).items():
        yield from command_parts(f"{name} {inner}", child, level + 1)


def invocation(action: argparse.Action) -> str:
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = str(action.metavar or choices or (action.dest.upper() if action.option_strings else action.dest))
    if not action.option_strings:
        return f"[{value}]" if action.nargs in ("?", "*") else value
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {value}"


def help_of(action: argparse.Action) -> str:
    about, default = action.help or "", action.default
    if "%(default)" in about:
        return about % {"default": default}
    unsaid = default not in (None, False, argparse.SUPPRESS, "") and not isinstance(default, list)
    return f"{about} (default {default})".strip() if unsaid and "default" not in about else about


# settings


def settings() -> str:
    parts = [
        "These values bound a server, its engine and its job store. Times are in seconds, sizes in bytes. "
        "[Commands](commands.md) lists the flags that change them; the others are set in Python."
    ]
    for heading, (module, name) in SETTINGS.items():
        kind = getattr(importlib.import_module(module), name)
        about = prose((inspect.getdoc(kind) or "").partition("\n\n")[0])
        docs = field_docs(kind)
        simple = (item for item in fields(kind) if not is_dataclass(item.default))
        rows = [(f"`{item.name}`", default_of(item), prose(docs.get(item.name, ""))) for item in simple]
        parts += [f"## {heading}", f"`{module}.{name}`: {about}", table(("name", "default", "meaning"), rows)]
    return page("Settings", *parts)


def default_of(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return f"`{field.default!r}`"
    return "" if field.default_factory is MISSING else "none"


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, by the name of the field."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        match before, after:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str(text))):
                docs[name] = text
    return docs


# environment


def environment() -> str:
    used = {name for path in (ROOT / "moesaic").rglob("*.py") for name in variables(path.read_text())} - INTERNAL
    if used != set(READ_HERE):
        raise SystemExit(
            f"READ_HERE must name the variables that the code looks up; difference: {sorted(used ^ set(READ_HERE))}"
        )
    rows = {head: sorted(names.items()) for head, names in (("here", READ_HERE), ("libraries", READ_BY_LIBRARIES))}
    return page(
        "Environment variables",
        "A flag on the command line takes precedence over a variable.",
        table(("variable", "meaning"), [(f"`{name}`", about) for name, about in rows["here"]]),
        "## Variables that libraries read",
        table(("variable", "library and meaning"), [(f"`{name}`", about) for name, about in rows["libraries"]]),
        "## Variables of TGI's launcher",
        "`moesaic serve` understands the variables of `text-generation-launcher` too: "
        "see [Migrate from TGI](../how-to/migrate-from-tgi.md#launcher-flags).",
    )


def variables(source: str) -> Iterator[str]:
    """Yield the environment variables that a module looks up, by name or by a constant of the module."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"MOESAIC_[A-Z_]+", str(node.value)):
            yield str(node.value)
        looked_up = None
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
            looked_up = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            looked_up = node.slice
        if isinstance(looked_up, ast.Constant):
            yield str(looked_up.value)
        elif isinstance(looked_up, ast.Name) and isinstance(constants.get(looked_up.id), str):
            yield constants[looked_up.id]


# errors, supported models and formats, modules


def error_page() -> str:
    def rows(kind: type[errors.MoesaicError], depth: int = 0) -> Iterator[tuple[str, int, str]]:
        about = (inspect.getdoc(kind) or "").partition("\n\n")[0]
        yield "&nbsp;" * 4 * depth + f"`{kind.__name__}`", kind.status, prose(about)
        for child in kind.__subclasses__():
            if child.__module__ == errors.__name__:
                yield from rows(child, depth + 1)

    return page(
        "Errors",
        "All errors are in `moesaic.errors`. The status is the HTTP status of a server's response. The Python client "
        "raises the same class for it. An indented class is a subclass of the one above.",
        table(("class", "status", "meaning"), list(rows(errors.MoesaicError))),
    )


def supported() -> str:
    def rows(category: str) -> list[Sequence[object]]:
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            cli.main(["list", category, "--json"])
        return [(f"`{row['name']}`", prose(row["about"])) for row in json.loads(shown.getvalue())]

    def files(folder: str) -> list[Sequence[object]]:
        names = registry.names(folder)
        docs = (inspect.getdoc(registry.load(folder, name)) or "" for name in names)
        return [(f"`{name}`", prose(about.partition("\n")[0])) for name, about in zip(names, docs, strict=True)]

    lists = {
        "Models": rows("models"),
        "Checkpoint layouts": rows("checkpoints"),
        "Weight formats": rows("formats"),
        "Chat formats": rows("chat-formats"),
        "Kernel backends": files("ops"),
        "APIs of the server": files("serve/dialects"),
        "APIs that `moesaic bench serving` measures": files("bench/endpoints"),
        "Launchers": files("cluster/launch"),
    }
    parts = [part for heading, found in lists.items() for part in (f"## {heading}", table(("name", "meaning"), found))]
    return page(
        "Supported models, formats and APIs", "`moesaic list` prints the first of these for an installation.", *parts
    )


def modules() -> str:
    """Return the page with the first line of each module's docstring, read from the sources without importing them."""
    folders: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((ROOT / "moesaic").rglob("*.py")):
        about = prose((ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0])
        folder = str(path.parent.relative_to(ROOT))
        folders.setdefault(folder, []).append((f"`{path.name}`", about))
    parts = [part for folder, rows in folders.items() for part in (f"## {folder}/", table(("file", "meaning"), rows))]
    return page(
        "Modules",
        "Each file of the package in one line. [Architecture](../architecture.md) explains the parts.",
        *parts,
    )


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    description, figures = surface()
    return {
        "commands.md": commands(),
        "environment.md": environment(),
        "errors.md": error_page(),
        "http-api.md": http_api(description),
        "metrics.md": metrics(figures),
        "modules.md": modules(),
        "settings.md": settings(),
        "supported.md": supported(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/reference/ from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not current")
    check = parser.parse_args().check
    stale = {name: text for name, text in pages().items() if not is_current(name, text)}
    FOLDER.mkdir(exist_ok=True)
    for name, text in stale.items():
        print(f"docs/reference/{name}: {'not current, run `make reference`' if check else 'written'}")
        if not check:
            (FOLDER / name).write_text(text)
    return 1 if check and stale else 0


def is_current(name: str, text: str) -> bool:
    file = FOLDER / name
    return file.is_file() and file.read_text() == text


if __name__ == "__main__":
    raise SystemExit(main())
