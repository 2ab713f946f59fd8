"""A gateway that takes any fence for the newest: the kill harness must find what comes of it, or it finds nothing.

python -m tests.cluster.unfenced gateway ...
"""

from __future__ import annotations

import sys

from moesaic import cli
from moesaic.cluster import leases
from moesaic.cluster.store import _operations

if __name__ == "__main__":
    _operations._holds = lambda job, fence: job.state == "leased"
    leases._is_whose = lambda seen, worker, lease_token: True
    leases.LeaseManager._is_here = lambda self, worker, lease_token: lease_token.id in self.lives  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[1:]))
