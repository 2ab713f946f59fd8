"""Imports and sizes, read from the source. Imports inside functions and under TYPE_CHECKING count as well."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "moesaic"
EVERYONE = {"errors", "registry", ""}
MAY = {
    "formats": set(),
    "ops": {"formats"},
    "config_keys": set(),
    "gguf": set(),
    "builtin": set(),
    "models": {"ops", "formats", "config_keys"},
    "checkpoints": {"formats", "config_keys", "gguf"},
    "text": {"gguf"},
    "engine": {"ops", "formats"},
    "hub_files": {"gguf"},
    "hub_access": {"hub_files"},
    "pull": {"hub_access", "hub_files"},
    "convert": {"packed", "adapters", "checkpoints", "models", "formats", "text", "gguf"},
    "memory": set(),
    "packed": {"memory", "checkpoints", "models", "formats"},
    "weight_report": {"checkpoints", "models", "ops", "formats"},
    "load_options": set(),
    "published": set(),
    "text_tables": set(),
    "text_files": set(),
    "hardware": {"memory", "ops"},
    "model_spec": {"models", "formats"},
    "model_sizes": {"model_spec", "models", "ops", "formats"},
    "plan": {
        "load_options",
        "model_spec",
        "model_sizes",
        "packed",
        "weight_report",
        "checkpoints",
        "models",
        "memory",
        "ops",
        "formats",
    },
    "planner": {
        "plan",
        "model_spec",
        "model_sizes",
        "hardware",
        "published",
        "load_options",
        "models",
        "formats",
        "hub_files",
        "outline",
        "hub_access",
        "text_tables",
    },
    "outline": {"hub_access", "hub_files", "gguf"},
    "loading": {
        "plan",
        "model_spec",
        "packed",
        "weight_report",
        "checkpoints",
        "config_keys",
        "models",
        "ops",
        "formats",
    },
    "adapters": {"models", "checkpoints", "ops", "formats"},
    "train": {"adapters", "memory", "models", "checkpoints", "ops", "formats", "text", "text_files"},
    "reply": {"engine", "text"},
    "embedding": {"models", "text", "ops", "formats"},
    "backend": set(),
    "client": set(),
    "local_backend": {"backend", "local_stream", "llm", "reply", "engine", "text"},
    "local_stream": {"backend", "engine", "reply", "text"},
    "classifier_backend": {"backend", "local_backend", "local_stream", "classifier"},
    "serve": {"backend"},
    "token_rows": {"text"},
    "sampling_defaults": {"engine"},
    "llm": {
        "builtin",
        "reply",
        "embedding",
        "sampling_defaults",
        "token_rows",
        "load_options",
        "plan",
        "loading",
        "engine",
        "text",
        "models",
        "ops",
        "formats",
    },
    "calibration": {
        "llm",
        "load_options",
        "plan",
        "packed",
        "memory",
        "token_rows",
        "checkpoints",
        "models",
        "ops",
        "formats",
        "text",
    },
    "classifier": {"load_options", "plan", "loading", "text", "token_rows", "ops"},
    "bench": {
        "builtin",
        "hardware",
        "published",
        "text_tables",
        "text_files",
        "model_spec",
        "client",
        "llm",
        "load_options",
        "plan",
        "loading",
        "packed",
        "memory",
        "token_rows",
        "sampling_defaults",
        "reply",
        "engine",
        "text",
        "checkpoints",
        "models",
        "ops",
        "formats",
    },
    "console": {"llm", "engine", "text"},
    "inventory": {"models", "checkpoints", "ops", "formats", "text"},
    "cluster": {"backend", "serve"},
    "cli": {"*"},
    "errors": set(),
    "registry": set(),
    "": {"engine", "load_options", "llm", "classifier", "text"},  # the public names
}
"""The parts that each part may import, in addition to ``errors`` and ``registry``; docs/architecture.md draws them."""
WITHIN = {"cluster.store": {"cluster.jobs"}, "cluster.launch": set()}
"""The modules of its own part that a folder may import, in addition to the folder itself."""
ALONE = ("cluster.launch",)
"""Folders that import no other part: a launcher depends on neither models nor servers."""
ONLY = {("cluster", "serve"): ("cluster.routes", "cluster.admin", "cluster.aime")}
"""The only modules of a part that may import another part: jobs and workers do not depend on the HTTP server."""
REGISTRIES = (
    "formats",
    "ops",
    "ops.triton.tiles",
    "models",
    "checkpoints",
    "bench.endpoints",
    "serve.dialects",
    "cluster.store",
    "cluster.launch",
)


MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 420


def part_of(module: str) -> str:
    """Return the part of the package that a module ``moesaic.…`` belongs to; "" is the package itself."""
    names = module.split(".")
    return names[1] if len(names) > 1 else ""


def imports(source: str) -> set[str]:
    """Return the modules of moesaic that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {
                f"{node.module}.{alias.name}" if exists(node, alias) else f"{node.module}" for alias in node.names
            }
    return {name for name in found if name.split(".")[0] == "moesaic"}


def exists(node: ast.ImportFrom, alias: ast.alias) -> bool:
    """Return whether what is imported is itself a module, not a name in one."""
    path = ROOT.parent.joinpath(*(node.module or "").split("."), alias.name)
    return path.with_suffix(".py").is_file() or path.is_dir()


def module_of(path: Path) -> str:
    names = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def entry_of(module: str, folder: str) -> str:
    """Return the entry of a registry folder that a module belongs to; "" if to none."""
    return module.removeprefix(folder).split(".")[0] if module.startswith(folder) else ""


def under(module: str, folders: list[str]) -> bool:
    """Return whether a module is one of those, or in one."""
    return any(f"{module}.".startswith(f"{folder}.") for folder in folders)


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the modules among ``sources`` that each of them imports."""
    out = {}
    for module, source in sources.items():
        names = {name if name in sources else name.rpartition(".")[0] for name in imports(source)}
        out[module] = names & sources.keys() - {module}
    return out


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that import each other, directly or through others (Tarjan, 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in edges[module]:
            if target not in order:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], order[target])
        if lowest[module] == order[module]:
            group = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(group)

    for module in edges:
        if module not in order:
            visit(module)
    return groups


def long_functions(source: str) -> list[str]:
    """Return the names of functions that are too long, asynchronous ones included."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= MAX_FUNCTION_LINES]


FILES = sorted(ROOT.rglob("*.py"))


def offences(module: str, source: str) -> list[str]:
    part = part_of(module)
    allowed = MAY[part]
    found = []
    for name in imports(source):
        target = part_of(name)
        if target not in allowed | EVERYONE | {part} and "*" not in allowed:
            found.append(f"{module} imports {name}")
        for folder, known in WITHIN.items():
            inside = [f"moesaic.{each}" for each in (folder, *known)]
            if under(module, inside[:1]) and target == part and not under(name, inside):
                found.append(f"{module} imports {name}")
        if target not in EVERYONE | {part} and under(module, [f"moesaic.{each}" for each in ALONE]):
            found.append(f"{module} imports {name}")
        some = ONLY.get((part, target))
        if some is not None and not under(module, [f"moesaic.{each}" for each in some]):
            found.append(f"{module} imports {name}")
        for registry in REGISTRIES:
            entry, sibling = (entry_of(each, f"moesaic.{registry}.") for each in (module, name))
            if entry and not entry.startswith("_") and sibling not in ("", entry) and not sibling.startswith("_"):
                found.append(f"{module} imports its sibling {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downwards(path):
    assert offences(module_of(path), path.read_text()) == []


def test_an_upward_import_is_found_also_inside_a_function():
    assert offences("moesaic.ops.native", "def f():\n    from moesaic.models import mixtral\n")
    assert offences("moesaic.models.llama", "from moesaic.models import mixtral\n")
    assert offences("moesaic.text.chat", "import moesaic.llm\n")
    assert offences("moesaic.bench.endpoints.tgi", "from moesaic.bench.endpoints.openai import Dialect\n")
    assert offences("moesaic.cluster.store.postgres", "from moesaic.cluster.store import sqlite\n")
    assert offences("moesaic.cluster.store._sql_store", "import moesaic.cluster.gateway\n")
    assert offences("moesaic.cluster.jobs", "from moesaic.serve import app\n")
    assert offences("moesaic.cluster.launch.ray", "from moesaic.backend import Load\n")
    assert offences("moesaic.cluster.launch.ray", "from moesaic.cluster.worker.agent import Worker\n")
    assert offences("moesaic.cluster.launch.ray", "from moesaic.cluster.launch import slurm\n")
    assert not offences("moesaic.cluster.launch.ray", "from moesaic.cluster.launch import Plan\n")
    assert not offences("moesaic.cluster.routes", "from moesaic.serve import app\n")
    assert not offences("moesaic.cluster.store.sqlite", "from moesaic.cluster.jobs import Store\n")
    assert not offences("moesaic.bench.endpoints.tgi", "from moesaic.bench.endpoints import _http, Ask\n")
    assert not offences("moesaic.models.llama", "from moesaic.models import _layers\n")
    assert not offences("moesaic.ops.triton._attention", "from moesaic.ops.triton._pointwise import readable\n")
    assert offences("moesaic.ops.triton._attention", "from moesaic.ops.native import argmax\n")
    assert offences("moesaic.ops.triton.tiles.int4", "from moesaic.ops.triton.tiles.int8 import read\n")


def test_modules_do_not_import_in_circles():
    sources = {module_of(path): path.read_text() for path in FILES}
    assert circles(graph(sources)) == []


def test_a_circle_is_found_also_inside_a_part():
    inside_a_function = {
        "moesaic.serve": "",
        "moesaic.serve.app": "from moesaic.serve import guard\n",
        "moesaic.serve.guard": "from moesaic.serve.keys import Keys\n",
        "moesaic.serve.keys": "def f():\n    from moesaic.serve.app import App\n",
        "moesaic.serve.logs": "from moesaic.serve import app\n",
    }
    assert circles(graph(inside_a_function)) == [{"moesaic.serve.app", "moesaic.serve.guard", "moesaic.serve.keys"}]
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moesaic.serve.app import App\n"
    pair = {"moesaic.serve.app": "import moesaic.serve.guard\n", "moesaic.serve.guard": for_types}
    assert circles(graph(pair)) == [pair.keys()]
    tree = {"moesaic.a": "import moesaic.b, moesaic.c\n", "moesaic.b": "import moesaic.c\n", "moesaic.c": ""}
    assert circles(graph(tree)) == []
    package = {"moesaic.a": "from moesaic.a import b\n", "moesaic.a.b": "from moesaic.a import Name\n"}
    assert circles(graph(package)) == []  # moesaic/a/b.py does not exist, so b is a name in moesaic.a


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES
    assert long_functions(source) == []


def test_a_long_function_is_found_also_if_it_is_asynchronous():
    body = "".join(f"    x = {n}\n" for n in range(MAX_FUNCTION_LINES))
    assert long_functions(f"def f():\n{body}") == ["f"]
    assert long_functions(f"class C:\n  async def f(self):\n{body}") == ["f"]
    assert long_functions("async def f():\n    pass\n") == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_unpickles(path):
    """Pickles are read in one place, a child process; no other module imports a package that unpickles."""
    banned = {"pickle", "cloudpickle", "marshal", "shelve", "dill"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not banned & {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in banned
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.jit.load"):
            assert path.name == "_torchfile_child.py"
            assert "weights_only=True" in ast.unparse(node)
