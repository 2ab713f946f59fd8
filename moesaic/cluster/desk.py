"""What a gateway is to its two kinds of visitors: those who bring jobs and come back for them, and those who do them.

``backend.Backend`` is for an API whose client waits while it is answered. A ``Desk`` is for one whose client leaves
with a number and asks later. ``Labour`` is for workers, whichever protocol they speak: ours over ``/worker/…``, AIME's
over ``/worker_job_request``. The gateway is all three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moesaic.backend import Event, Finished, GenerationRequest, ModelInfo, ModelStats, ResponseStream
from moesaic.cluster.jobs import Held, Hold, Lease, State
from moesaic.errors import MoesaicError

LEASE_SECONDS = 10.0
"""A lease that is not renewed for so long is lost."""
RENEWS = 0.2
"""Workers renew after this part of a lease."""
STALL_SECONDS = 30.0
"""A worker with work whose step counter stands still for so long is taken to hang."""


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    id: str
    model: str
    state: State
    ahead: int = 0
    """Of a queued job: how many go before it."""
    estimate: float | None = None
    """Seconds until it is done, as far as can be told."""
    texts: tuple[str, ...] = ()
    """Of each answer, all that there is of its text."""
    tokens: tuple[int, ...] = ()
    """Of each answer, how many were generated."""
    prompt_tokens: int = 0
    ended: tuple[Finished, ...] = ()
    """The ends of those answers that have ended, once the job is done."""
    error: MoesaicError | None = None
    """Of a job that failed, was cancelled or is dead."""
    submitted: float = 0.0
    """When, in seconds since the epoch, as this gateway's clock had it; 0: not known any more."""
    begun: float = 0.0
    finished: float = 0.0


class Desk(Protocol):
    """Takes jobs in and tells how far they are. Raises NotFound for a job that is not there, or another tenant's."""

    async def submit(self, request: GenerationRequest) -> str:
        """Take a request in, durably; return its job's id."""
        ...

    async def progress(self, id: str, tenant: str) -> Progress:
        """Return how far a job is. An ended one is known until it is dropped, however often it is asked for."""
        ...

    async def follow(self, id: str, tenant: str) -> ResponseStream:
        """Return a job's events from the first on, those to come too. Leaving it does not cancel the job."""
        ...

    async def withdraw(self, id: str, tenant: str) -> State:
        """Cancel a job unless it has ended; return its state then."""
        ...

    def workers(self, model: str) -> int:
        """Return how many workers offer a model now."""
        ...


@dataclass(frozen=True)
class Recruit:
    """A worker that offers itself."""

    name: str
    """Unique among those that are there; one of the same name replaces it, and what that had is lost if it does not
    have it."""
    cards: tuple[ModelInfo, ...]
    """What it offers."""
    slots: int = 1
    """How many jobs it runs at once."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Machine, versions, backend: for administrators only."""
    owner: str = ""
    """The name of the key it came with."""
    run: str = ""
    """Another in each process of that name: one that comes again was not lost with what it does not know of."""


@dataclass(frozen=True)
class Orders:
    """What a worker is to do next."""

    leases: tuple[Lease, ...] = ()
    stop: tuple[str, ...] = ()
    """Jobs it has that it is to stop: cancelled, or somebody else's now."""


class Labour(Protocol):
    """Hands work out and takes it in. Raises NotFound if the worker is not known (any more): it enlists again."""

    async def enlist(self, recruit: Recruit, holds: Sequence[Hold] = ()) -> Mapping[str, tuple[int, int] | None]:
        """Let a worker in, which still has these leases; say of each what ``take`` would: None if it is lost."""
        ...

    async def lease(self, worker: str, free: int, wait: float) -> Orders:
        """Wait up to ``wait`` seconds for something to do, or to stop.

        At most ``free`` jobs are given, and never more than the worker's slots hold with those it has: 0 is for one
        that is about to go.
        """
        ...

    async def renew(self, worker: str, holds: Sequence[Hold], load: Mapping[str, ModelStats]) -> Mapping[str, Held]:
        """Keep leases, and tell how the worker's models are: their step counters show whether it makes progress."""
        ...

    async def take(
        self, worker: str, parts: Mapping[Hold, tuple[int, Sequence[Event]]]
    ) -> Mapping[str, tuple[int, int] | None]:
        """Take events in, which begin at number ``start`` of each job's log.

        Return of each how many events are known, and how many of them are on disk: the worker goes on behind the first,
        and may forget up to the second. None: the lease is lost.
        """
        ...

    async def finish(
        self,
        worker: str,
        hold: Hold,
        start: int,
        events: Sequence[Event],
        outcome: Any = None,
        error: MoesaicError | None = None,
    ) -> bool:
        """End a job with its last events, or with what was asked for, or an error; return whether it counted."""
        ...

    async def release(self, worker: str, holds: Sequence[Hold], *, leave: bool = False) -> None:
        """Take leases back, without blame; with ``leave`` the worker is given nothing any more."""
        ...

    async def dismiss(self, worker: str) -> None:
        """Let a worker go; what it still has is lost."""
        ...
