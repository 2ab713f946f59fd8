"""Makes worker processes fast: it has imported what they need, and forks. Lines of standard input name them.

    python -m tests.cluster.nursery URL,URL SLOTS SECONDS LOG

A worker is forked for each name that is read, w and a number, and its process number printed; those of odd numbers do
not stop when they are told to. All end with this process. Their key is in ``MOESAIC_WORKER_KEY``.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys

from moesaic.cluster.worker import Worker
from moesaic.errors import MoesaicError
from moesaic.serve import logs
from tests.cluster.fake import Fake

DEATH = 1  # PR_SET_PDEATHSIG


class Stubborn(Worker):
    """Does not stop when it is told to: only the fence stands between its late results and the job."""

    def _stop(self, id: str) -> None:
        pass


def work(urls: list[str], name: str, slots: int, seconds: float, log: str) -> None:
    ctypes.CDLL(None).prctl(DEATH, signal.SIGKILL)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    logs.set_up("debug", as_json=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    try:
        kind = Stubborn if int(name[1:]) % 2 else Worker
        key = os.environ.get("MOESAIC_WORKER_KEY")
        asyncio.run(kind(Fake(seconds=seconds), urls, name=name, key=key, slots=slots).run())
    except MoesaicError as error:
        print(error, file=sys.stderr)


def main() -> None:
    urls, slots, seconds, log = sys.argv[1].split(","), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.close(0)
            work(urls, line.strip(), slots, seconds, log)
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main()
