"""A gateway that accepts every fence as the newest. The kill harness must notice the damage, or it proves nothing.

python -m tests.support.unfenced_gateway gateway ...
"""

from __future__ import annotations

import sys

from moesaic import cli
from moesaic.cluster import jobs, leases
from moesaic.cluster.store import _operations

if __name__ == "__main__":
    _operations._holds = lambda job, fence: job.state == "leased"
    jobs.JobSnapshot.held_by = lambda self, worker, lease_token: True  # type: ignore[method-assign]
    leases.LeaseManager._is_local = lambda self, worker, lease_token: lease_token.id in self._jobs.jobs  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[1:]))
