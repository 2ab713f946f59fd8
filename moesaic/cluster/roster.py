"""Who may work: what administrators have said about workers, which holds until they take it back.

It holds by name, also when a worker has been away meanwhile, and ends with this process; another gateway on the same
store knows nothing of it. Knows workers. Does not know jobs, nor HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moesaic.cluster.jobs import Lease, LeaseToken
from moesaic.cluster.leases import LeaseManager
from moesaic.cluster.protocols import WorkerInfo
from moesaic.cluster.workers import WorkerSession
from moesaic.errors import Forbidden, NotFound

log = logging.getLogger("moesaic.cluster")


class Roster(LeaseManager):
    """A foreman who is told who works."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.drained: set[str] = set()
        """Workers that are given nothing more."""
        self.dismissed: set[str] = set()
        """Workers that are not let in."""
        self.waited: Callable[[str, float], None] = lambda _model, _seconds: None
        """Told of each job, when it is first leased here, its model and how long that took."""

    async def register(
        self, info: WorkerInfo, leases: Sequence[LeaseToken] = ()
    ) -> Mapping[str, tuple[int, int] | None]:
        if info.name in self.dismissed:
            raise Forbidden("this worker was dismissed: an administrator of the gateway can let it in again")
        known = await super().register(info, leases)
        self._mark(info.name)
        return known

    def drain_worker(self, name: str) -> None:
        """Give a worker nothing more; it ends what it has.

        Raises:
            NotFound: there is no such worker.
        """
        self._known(name)
        self.drained.add(name)
        self._mark(name)
        log.info("a worker is drained", extra={"worker": name})

    def resume_worker(self, name: str) -> None:
        """Give a worker work again, and let one in again that was dismissed.

        Raises:
            NotFound: there is no such worker, and nothing was said of one.
        """
        self._known(name)
        self.drained.discard(name)
        self.dismissed.discard(name)
        self._mark(name)
        log.info("a worker may work again", extra={"worker": name})

    async def dismiss_worker(self, name: str) -> None:
        """Send a worker away and do not let it in again; others do what it had, blamelessly.

        Raises:
            NotFound: there is no such worker.
        """
        self._known(name)
        self.dismissed.add(name)
        session = self.crew.get(name)
        if session is not None:
            session.drained = True  # else it would be given back at once what it is to give up
            await self.release(name, [LeaseToken(id, fence) for id, fence in session.leases.items()])
        await self.dismiss(name)

    def _known(self, name: str) -> None:
        if name not in self.crew and name not in self.drained | self.dismissed:
            raise NotFound(f"there is no worker {name!r:.140}: `moesaic admin workers` names those that there are")

    def _mark(self, name: str) -> None:
        session = self.crew.get(name)
        if session is not None:
            session.drained = name in self.drained
            session.wake.set()

    def _leased(self, session: WorkerSession, lease: Lease) -> Lease:
        live = self.lives.get(lease.job.id)
        first = live is not None and live.submitted > 0 and not live.begun
        given = super()._leased(session, lease)
        if live is not None and first:
            self.waited(live.model, max(0.0, live.begun - live.submitted))
        return given
