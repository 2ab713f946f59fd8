"""Makes worker processes fast: it has imported what they need, and forks. Lines of standard input name them.

    python -m tests.support.worker_pool URL,URL SLOTS SECONDS LOG [STALL]

A worker is forked for each name that is read, w and a number, and its process number printed; those of odd numbers do
not stop when they are told to. One whose engine makes no step for STALL seconds ends. All end with this process.
Their key is in ``MOESAIC_WORKER_KEY``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from moesaic.cluster.protocols import STALL_SECONDS
from moesaic.cluster.worker.agent import Worker
from moesaic.errors import MoesaicError
from moesaic.serve import logs
from tests.support.backend import FakeBackend

DEATH = 1  # PR_SET_PDEATHSIG


class Stubborn(Worker):
    """Does not stop when it is told to: only the fence stands between its late results and the job."""

    def _cancel(self, job_id: str) -> None:
        pass


class Nursery:
    """Makes workers for a test, and ends with them."""

    def __init__(
        self,
        url: str,
        log: Path,
        *,
        slots: int = 4,
        seconds: float = 0.0,
        stall: float = STALL_SECONDS,
        key: str | None = None,
    ) -> None:
        self.log = log
        arguments = [url, str(slots), str(seconds), str(log), str(stall)]
        command = [sys.executable, "-m", "tests.support.worker_pool", *arguments]
        environment = os.environ | ({"MOESAIC_WORKER_KEY": key} if key else {})
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.made: dict[str, int] = {}

    def spawn(self, name: str) -> int:
        """Make a worker; return its process number."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        self.made[name] = int(self._process.stdout.readline())
        return self.made[name]

    def signal(self, name: str, which: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.made[name], which)

    def lives(self, name: str) -> bool:
        try:
            os.kill(self.made[name], 0)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        for name in self.made:
            self.signal(name, signal.SIGKILL)
        self._process.kill()
        self._process.communicate()


def work(urls: list[str], name: str, slots: int, seconds: float, log: str, stall: float) -> None:
    ctypes.CDLL(None).prctl(DEATH, signal.SIGKILL)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    logs.set_up("debug", as_json=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    try:
        kind = Stubborn if int(name[1:]) % 2 else Worker
        backend, key = FakeBackend(seconds=seconds), os.environ.get("MOESAIC_WORKER_KEY")
        asyncio.run(kind(backend, urls, name=name, key=key, slots=slots, stall_seconds=stall).run())
    except MoesaicError as error:
        print(error, file=sys.stderr)


def main() -> None:
    urls, slots, seconds, log = sys.argv[1].split(","), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    stall = float(sys.argv[5]) if len(sys.argv) > 5 else STALL_SECONDS
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.close(0)
            work(urls, line.strip(), slots, seconds, log, stall)
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main()
