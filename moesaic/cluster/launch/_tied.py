"""Run a command that gets SIGTERM when its parent process dies.

Usage: ``python -m moesaic.cluster.launch._tied PARENT_PID COMMAND...``. The command replaces this process. On systems
other than Linux, the command runs without this protection.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # execve keeps this setting
        if os.getppid() != int(sys.argv[1]):  # the parent died before the call of prctl
            sys.exit(0)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
