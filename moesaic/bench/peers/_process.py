"""Starts the process of one engine (a peer), sends it requests and ends it.

It can also start a process that keeps a core busy. This module knows the protocol of ``_child.py``. It does not know
what is measured.
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

ANSWER_TIMEOUT_SECONDS = 1800.0
"""Seconds without an answer after which the process of an engine counts as hanging; a prompt or a conversion may take
minutes."""

BUSY_LOOP = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile True: pass"


INSTRUCTION_SET = "MOESAIC_BENCH_INSTRUCTION_SET"
"""Environment variable that names the instruction set of Moesaic's kernels to ``peers/_ours.py``."""


class PeerFailed(Exception):
    """The process of an engine ended, hung or reported an error; the message is one line."""


class Process(AbstractContextManager["Process"]):
    """Process of one engine, which is killed at the end of the ``with`` block.

    Args:
        peer: the engine's module in ``bench/peers``, of which only the path and ``environment`` are used.
        python: Python interpreter of the process.
        threads: number of threads that the engine may use.
        log: file for the output of the engine.
        instruction_set: what Moesaic's kernels use; None: all that the processor has.

    Raises:
        PeerFailed: the interpreter cannot be started.
    """

    def __init__(
        self, peer: ModuleType, python: Path, threads: int, log: Path, instruction_set: str | None = None
    ) -> None:
        assert peer.__file__ is not None
        self._log, self._rest = log, b""
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if instruction_set is not None:
            environment[INSTRUCTION_SET] = instruction_set
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

    def ask(self, command: str, **arguments: Any) -> Any:
        """Call the method ``command`` of ``_child.Server`` in the process, and return its result.

        Raises:
            PeerFailed: the engine reports an error, its process has ended, or there is no answer for
                ``ANSWER_TIMEOUT_SECONDS``.
        """
        assert self._child.stdin is not None
        try:
            os.write(self._child.stdin.fileno(), json.dumps({"do": command} | arguments).encode() + b"\n")
        except OSError as error:
            raise self._ended(command) from error
        answer: Mapping[str, Any] = json.loads(self._line(command))
        if "error" in answer:
            raise PeerFailed(f"{command} failed: {answer['error']}")
        return answer["ok"]

    def __exit__(self, *exception: object) -> None:
        """Kill the engine's process."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.kill()
        self._child.wait()

    def _line(self, command: str) -> bytes:
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([pipe], [], [], ANSWER_TIMEOUT_SECONDS)[0]:
                raise PeerFailed(
                    f"{command} gave no answer for {ANSWER_TIMEOUT_SECONDS:.0f} s, so its process was ended"
                )
            data = os.read(pipe, 1 << 16)
            if not data:
                raise self._ended(command)
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _ended(self, command: str) -> PeerFailed:
        code = self._child.wait()
        reason = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        output = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return PeerFailed(
            f"its process ended {reason} during {command}" + (f"; its last output: {output[-1]}" if output else "")
        )


@contextmanager
def neighbour() -> Iterator[int]:
    """Return a context in which another process keeps one core busy: the last one that this process may use.

    The value of the context is the id of the other process.
    """
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", BUSY_LOOP, str(core)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # the loop has started
        yield process.pid
    finally:
        process.kill()
        process.communicate()
