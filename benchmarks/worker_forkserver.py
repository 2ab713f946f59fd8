"""Fork server for worker processes: it imports the worker's modules once, then forks a worker per line of its input.

    python -m benchmarks.worker_forkserver URL,URL SLOTS SECONDS LOG [STALL]

Each line of standard input is the name of a worker to start: a letter and a number. The server prints the worker's
process id. A worker whose number is odd ignores orders to stop a job. A worker ends if its engine makes no step for
STALL seconds. All workers end with the fork server. ``MOESAIC_WORKER_KEY`` is the workers' API key.
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

from benchmarks.fake_backend import FakeBackend
from moesaic.cluster.protocols import STALL_SECONDS
from moesaic.cluster.worker.agent import Worker
from moesaic.errors import MoesaicError
from moesaic.serve import logs

PR_SET_PDEATHSIG = 1


class Stubborn(Worker):
    """Worker that ignores orders to stop a job, so that only the check of the fence refuses its late results."""

    def _cancel(self, job_id: str) -> None:
        pass


class WorkerForkServer:
    """Starts and signals worker processes; they end when it is closed."""

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
        """Start the fork server.

        Args:
            url: the gateways' addresses, separated by commas.
            log: file to which all workers append their logs.
            slots: number of jobs that a worker runs at the same time.
            seconds: seconds that a worker's model takes for a token.
            stall: a worker ends if its engine makes no step for this number of seconds.
            key: the workers' API key; None means MOESAIC_WORKER_KEY of this process's environment.
        """
        self.log = log
        arguments = [url, str(slots), str(seconds), str(log), str(stall)]
        command = [sys.executable, "-m", "benchmarks.worker_forkserver", *arguments]
        environment = os.environ | ({"MOESAIC_WORKER_KEY": key} if key else {})
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.pids: dict[str, int] = {}

    def spawn(self, name: str) -> int:
        """Start a worker with this name; return its process id."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        self.pids[name] = int(self._process.stdout.readline())
        return self.pids[name]

    def signal(self, name: str, which: signal.Signals) -> None:
        """Send a signal to a worker, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[name], which)

    def lives(self, name: str) -> bool:
        """Return whether the process of a worker exists."""
        try:
            os.kill(self.pids[name], 0)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """Kill all workers and the fork server."""
        for name in self.pids:
            self.signal(name, signal.SIGKILL)
        self._process.kill()
        self._process.communicate()


def run_worker(urls: list[str], name: str, slots: int, seconds: float, log: str, stall: float) -> None:
    """Run a worker of the gateways ``urls`` in this process until it ends. Its log is appended to the file ``log``."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
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
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os.close(0)
            run_worker(urls, line.strip(), slots, seconds, log, stall)
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
