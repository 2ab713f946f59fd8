"""Runs one peer in a process of its own; requests and answers are lines of JSON on its standard streams.

    python -P _child.py PEER.py

Imports the standard library and the peer's file only: the interpreter may be one that has nothing but
the peer. ``-P`` keeps this folder, whose files are named like the libraries, off the search path.
What a peer prints goes to standard error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

WARM_UP = 2
"""Steps before those that are timed."""
SALTS = 1_000_000


class Server:
    """Answers requests, each a method by its name with the request's other fields as arguments."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._peer: Any = None
        self._vocab = 0
        self._prompts = 0

    def hello(self) -> dict[str, Any]:
        """Return what is missing, or the versions of what is there."""
        missing = [name for name in self._module.MODULES if importlib.util.find_spec(name) is None]
        versions = {} if missing else {name: importlib.metadata.version(name) for name in self._module.PACKAGES}
        return {"missing": missing, "versions": {"python": platform.python_version()} | versions}

    def make(self, source: str, folder: str, format: str) -> str:
        """Make what ``load`` loads; return where it is."""
        return str(self._module.make(Path(source), Path(folder), format))

    def load(self, vocab: int, path: str, **setup: Any) -> dict[str, Any]:
        """Start the engine."""
        begin = time.perf_counter()
        self._peer, self._vocab = self._module.Peer(Path(path), **setup), vocab
        experts, rest = self._peer.weights
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "about": self._peer.about, "expert_bytes": experts, "other_bytes": rest}

    def likeliest(self, tokens: int, count: int) -> list[int]:
        """Return the likeliest continuations of a prompt that is the same for every peer."""
        return [int(id) for id in self._peer.likeliest(self._ids(tokens, 0), count)]

    def prefill(self, tokens: int) -> float:
        """Return the seconds that one prompt takes; never the same prompt twice, since engines remember."""
        self._prompts += 1
        ids = self._ids(tokens, self._prompts)
        begin = time.perf_counter()
        self._peer.prefill(ids)
        return time.perf_counter() - begin

    def fill(self, sequences: int, context: int) -> None:
        """Hold this many prompts of ``context`` tokens."""
        self._prompts += 1
        self._peer.fill([self._ids(context, SALTS * self._prompts + place) for place in range(sequences)])

    def decode(self, batch: int, steps: int) -> float:
        """Return the seconds of one step, the mean of ``steps``."""
        tokens = self._steps(batch)
        self._peer.begin(batch, WARM_UP + steps)
        for _ in range(WARM_UP):
            self._peer.step(next(tokens))
        begin = time.perf_counter()
        for _ in range(steps):
            self._peer.step(next(tokens))
        seconds = time.perf_counter() - begin
        self._peer.end()
        return seconds / steps

    def peak(self) -> int | None:
        """Return the most memory this process ever had, in bytes; None where the system does not say."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    def _ids(self, count: int, salt: int) -> list[int]:
        """Return tokens that look random and are the same in every process; the first three ids are special."""
        return random.Random(salt).choices(range(3, self._vocab), k=count)

    def _steps(self, batch: int) -> Iterator[list[int]]:
        draw = random.Random(batch)
        while True:
            yield draw.choices(range(3, self._vocab), k=batch)


def load(path: Path) -> ModuleType:
    """Return the peer's file as a module, under a name that no library has."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    server = Server(load(Path(sys.argv[1])))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(server, request.pop("do"))(**request)}
        except Exception as error:  # whatever the library raises, the other side must hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
