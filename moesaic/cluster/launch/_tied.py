"""Runs a command that is told to stop when whoever started it dies: ``python -m moesaic.cluster.launch._tied COMMAND``.

The command is the child itself, not a child of it. Linux only; elsewhere it just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # which execve keeps
        if os.getppid() != int(sys.argv[1]):  # too late: it is dead already
            sys.exit(0)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
