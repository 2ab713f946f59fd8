"""A peer's process as this side sees it: start it, ask it, end it; and a neighbour that keeps a core busy.

Knows the protocol of ``_child.py``. Does not know what is measured.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

PATIENCE = 1800.0
"""Seconds without an answer after which a peer counts as hanging; a prompt or a conversion may take long."""

SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile True: pass"


class PeerFailed(Exception):
    """A peer's process ended, hung, or could not do what it was asked; one line says which."""


class Process(AbstractContextManager["Process"]):
    """One peer in an interpreter of its own.

    Args:
        peer: its file as a module; of it, only the path and ``environment`` are used here.
        python: the interpreter.
        threads: how many the peer may compute with.
        log: the file that gets what the peer prints.

    Raises:
        PeerFailed: there is no such interpreter.
    """

    def __init__(self, peer: ModuleType, python: Path, threads: int, log: Path) -> None:
        assert peer.__file__ is not None
        self._log, self._rest = log, b""
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if hasattr(peer, "environment"):
            environment |= peer.environment(python)
        command = [str(python), "-P", str(Path(__file__).with_name("_child.py")), peer.__file__]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            try:
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=os.environ | environment,
                    bufsize=0,
                )
            except OSError as error:
                raise PeerFailed(f"{python} cannot be started: {error.strerror}") from error

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return what the peer answers.

        Raises:
            PeerFailed: it complains, or is gone, or says nothing for ``PATIENCE`` seconds.
        """
        assert self._child.stdin is not None
        try:
            os.write(self._child.stdin.fileno(), json.dumps({"do": do} | arguments).encode() + b"\n")
        except OSError as error:
            raise self._ended(do) from error
        answer: Mapping[str, Any] = json.loads(self._line(do))
        if "error" in answer:
            raise PeerFailed(f"{do} failed: {answer['error']}")
        return answer["ok"]

    def __exit__(self, *exception: object) -> None:
        """End the process, whatever it does."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.kill()
        self._child.wait()

    def _line(self, do: str) -> bytes:
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([pipe], [], [], PATIENCE)[0]:
                raise PeerFailed(f"{do} gave no answer for {PATIENCE:.0f} s and was ended")
            data = os.read(pipe, 1 << 16)
            if not data:
                raise self._ended(do)
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _ended(self, do: str) -> PeerFailed:
        code = self._child.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return PeerFailed(f"its process ended {how} during {do}" + (f"; it last said: {said[-1]}" if said else ""))


@contextmanager
def neighbour() -> Iterator[int]:
    """Keep the last of this process's cores busy with work that is not ours; yields the id of the process."""
    core = max(os.sched_getaffinity(0))
    spinning = subprocess.Popen([sys.executable, "-c", SPIN, str(core)], stdout=subprocess.PIPE)
    try:
        assert spinning.stdout is not None
        spinning.stdout.readline()  # it spins from here on
        yield spinning.pid
    finally:
        spinning.kill()
        spinning.communicate()
