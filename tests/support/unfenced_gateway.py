"""A gateway that takes any fence for the newest: the kill harness must find what comes of it, or it finds nothing.

python -m tests.support.unfenced_gateway gateway ...
"""

from __future__ import annotations

import sys

from moesaic import cli
from moesaic.cluster import foreman
from moesaic.cluster.queue import _operations

if __name__ == "__main__":
    _operations._holds = lambda job, fence: job.state == "leased"
    foreman._is_whose = lambda seen, worker, hold: True
    foreman.Foreman._is_here = lambda self, worker, hold: hold.id in self.lives  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[1:]))
