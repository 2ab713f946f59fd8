"""Runs one engine of the benchmark (a peer) in a process of its own.

Requests and answers are lines of JSON on standard input and output.

    python -P _child.py PEER.py

This file imports only the standard library and the engine's file, because the interpreter may have nothing but the
engine installed. ``-P`` keeps this folder, whose files have the names of libraries, off the module search path. Output
of the engine goes to standard error.
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

WARM_UP_STEPS = 2
"""Number of decoding steps before the measured steps."""
PROMPTS_PER_FILL = 1_000_000
"""Distance between the random seeds of two calls of ``fill``, so that no two prompts have the same seed."""


class Server:
    """Answers requests of the parent process. Each names a method of this class and gives its arguments."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._peer: Any = None
        self._vocab = 0
        self._prompts = 0

    def hello(self) -> dict[str, Any]:
        """Return the engine's modules that are not installed, and the versions of Python and of the engine's packages.

        If a module is missing, only Python's version is returned.
        """
        missing = [name for name in self._module.MODULES if importlib.util.find_spec(name) is None]
        versions = {} if missing else {name: importlib.metadata.version(name) for name in self._module.PACKAGES}
        return {"missing": missing, "versions": {"python": platform.python_version()} | versions}

    def make(self, source: str, folder: str, weight_format: str) -> str:
        """Return the path of the model in a weight format, for ``load``.

        Its files are created inside ``folder`` from the Hugging Face checkpoint ``source`` if they do not exist.
        """
        return str(self._module.make(Path(source), Path(folder), weight_format))

    def load(self, vocab: int, path: str, **setup: Any) -> dict[str, Any]:
        """Load the model at ``path`` into the engine.

        Return the duration in seconds, the engine's description, and the bytes of experts and of other weights.
        ``vocab`` is the number of token ids to choose prompts from. ``setup`` has the other arguments of ``Peer``.
        """
        start = time.perf_counter()
        self._peer, self._vocab = self._module.Peer(Path(path), **setup), vocab
        expert_bytes, other_bytes = self._peer.weights
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "about": self._peer.about, "expert_bytes": expert_bytes, "other_bytes": other_bytes}

    def likeliest(self, tokens: int, count: int) -> list[int]:
        """Return the ids of the ``count`` most likely next tokens after a prompt of ``tokens`` tokens.

        The prompt is the same for every engine.
        """
        return [int(token_id) for token_id in self._peer.likeliest(self._ids(tokens, 0), count)]

    def prefill(self, tokens: int) -> float:
        """Compute a random prompt of ``tokens`` tokens; return the duration in seconds.

        No prompt is used twice, because engines cache prefixes.
        """
        self._prompts += 1
        ids = self._ids(tokens, self._prompts)
        start = time.perf_counter()
        self._peer.prefill(ids)
        return time.perf_counter() - start

    def fill(self, sequences: int, context: int) -> None:
        """Compute ``sequences`` random prompts of ``context`` tokens each; keep their keys and values."""
        self._prompts += 1
        self._peer.fill([self._ids(context, PROMPTS_PER_FILL * self._prompts + index) for index in range(sequences)])

    def decode(self, batch: int, steps: int) -> float:
        """Decode ``batch`` of the stored prompts for ``steps`` steps; return the mean duration of a step in seconds."""
        tokens = self._steps(batch)
        self._peer.begin(batch, WARM_UP_STEPS + steps)
        for _ in range(WARM_UP_STEPS):
            self._peer.step(next(tokens))
        start = time.perf_counter()
        for _ in range(steps):
            self._peer.step(next(tokens))
        seconds = time.perf_counter() - start
        self._peer.end()
        return seconds / steps

    def peak(self) -> int | None:
        """Return the peak resident memory of this process in bytes; None if the system does not provide it."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    def _ids(self, count: int, salt: int) -> list[int]:
        """Return ``count`` random token ids for the random seed ``salt``, without the special tokens 0, 1 and 2."""
        return random.Random(salt).choices(range(3, self._vocab), k=count)

    def _steps(self, batch: int) -> Iterator[list[int]]:
        generator = random.Random(batch)
        while True:
            yield generator.choices(range(3, self._vocab), k=batch)


def load(path: Path) -> ModuleType:
    """Import the file of an engine under a module name that no library has."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    server = Server(load(Path(sys.argv[1])))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(server, request.pop("do"))(**request)}
        except Exception as error:  # any error of the library is reported to the parent
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
