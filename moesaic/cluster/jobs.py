"""Jobs, and what keeps them: every store under ``queue/`` offers the same, and is tested by the same tests.

A job is *accepted* once ``submit`` returns: it is on disk, and ends exactly once, whatever dies meanwhile. It may be
computed more than once: whoever leases it gets a *fence*, a number that only grows, and only the newest fence may write
(M. Kleppmann, "How to do distributed locking", 2016). It grows when a lease is given and when one is taken away.

    queued -> leased -> done | failed | cancelled | dead         a lost lease goes back to queued

No clock of the wall decides anything. A lease lives as long as its *beat* goes on rising, which a gateway watches by
its own monotonic clock; how long ended jobs are kept is counted in *ticks* of the store, which gateways drive.

Knows jobs and leases. Does not know what is asked in a job, nor HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

State = Literal["queued", "leased", "done", "failed", "cancelled", "dead"]
Held = Literal["ok", "cancelled", "fenced"]

TICK_SECONDS = 10.0
"""How often a gateway calls ``Store.tick``."""


@dataclass(frozen=True)
class Job:
    """What is submitted."""

    id: str
    """Chosen by the gateway; nobody can guess it."""
    model: str
    """Only workers that offer this model lease it."""
    kind: str = "ask"
    """What is to be done with ``body``."""
    body: bytes = b""
    tenant: str = ""
    """Whose it is."""
    cost: int = 1
    """About how many tokens it may take: what tenants share fairly."""
    priority: int = 0
    """The lower number goes first, whosever it is."""
    once: str = ""
    """A name under which the same tenant may submit it again and gets the job that there is; "": none."""
    digest: str = ""
    """Of what was asked under that name, so that another question under the same name is refused."""


@dataclass(frozen=True)
class Bounds:
    """What a store takes in, and for how long it keeps what has ended."""

    queued: int = 10_000
    """Jobs that may wait; more are refused (``Unavailable``)."""
    queued_per_tenant: int = 2_000
    """The same for one tenant (``Overloaded``)."""
    queued_cost: int = 100_000_000
    """Their cost together (``Unavailable``)."""
    crashes: int = 3
    """A job that alone took its worker with it, and was there when so many were lost, is dead."""
    kept_ticks: int = 90
    """Ended jobs keep their log and result for so many ticks (15 minutes), ..."""
    kept: int = 100_000
    """... and at most so many jobs do, the oldest go first, ..."""
    once_ticks: int = 8640
    """... and are known by their ``once`` for so many (a day)."""


@dataclass(frozen=True)
class Record:
    """A part of a job's log: ``count`` entries from number ``start`` on, as whoever wrote them encodes them."""

    start: int
    count: int
    blob: bytes


@dataclass(frozen=True)
class Lease:
    """A job that is somebody's to do now."""

    job: Job
    fence: int
    log: tuple[Record, ...] = ()
    """What earlier leases have written, without gaps: the work goes on behind it."""


@dataclass(frozen=True)
class Hold:
    """A claim to a lease: valid while the store has the same fence."""

    id: str
    fence: int


@dataclass(frozen=True)
class Beat:
    """A live lease as a gateway watches it."""

    hold: Hold
    worker: str
    beat: int
    """Rises with every ``renew``, ``append`` and ``lease``."""


@dataclass(frozen=True)
class Seen:
    """A job as it stands."""

    job: Job
    state: State
    fence: int = 0
    worker: str = ""
    """Who has it, or had it last."""
    attempts: int = 0
    """How often it was leased."""
    crashes: int = 0
    """How often it was lost together with its worker."""
    logged: int = 0
    """Entries in its log."""
    result: bytes = b""
    """Of an ended job."""
    ahead: int = 0
    """Of a queued job: how many of its model go before it."""


@dataclass(frozen=True)
class Depth:
    """How much waits and runs of one model."""

    queued: int = 0
    leased: int = 0
    suspects: int = 0
    """Of those queued: lost with a worker, and to be run apart from others."""
    cost: int = 0
    """Of those queued, together."""


News = Callable[[Sequence[str]], None]
"""Called, on the gateway's loop and after the commit, with ids of jobs that changed; "" stands for new work."""


class Store(Protocol):
    """What keeps jobs. What a call has returned is on disk, and stays. Used on one event loop.

    Raises, from every method: Unavailable when the store cannot be reached or has no room left
    (``StorageFull``); then nothing of that call has happened, or all of it has, and repeating it does no harm.
    """

    shared: bool
    """Whether other gateways may use it at the same time."""

    def listen(self, news: News) -> None:
        """Have this called with what changes, also by other gateways on the same store. It may come late, twice, or not
        at all when a connection breaks: whoever waits for a job looks again every second or so."""
        ...

    async def submit(self, job: Job) -> str:
        """Take a job in; return its id, or that of the one that is there under the same tenant and ``once``.

        The same job again, by its id, is the one that is there too. The job under a ``once`` may have
        been dropped already: then ``look`` knows nothing of the id returned.

        Raises:
            Conflict: there is one, of another ``digest``.
            Overloaded: this tenant has as many queued as it may. Unavailable: there are too many altogether.
            InvalidParameter: text with a character 0 or a lone surrogate, a cost below 0, a number beyond 2**40.
        """
        ...

    async def lease(self, worker: str, models: Sequence[str], most: int, *, suspects: bool = False) -> list[Lease]:
        """Lease up to ``most`` queued jobs of these models: by priority, then fairly among tenants, then in order.

        Fair: start-time fair queueing by cost (Goyal et al., SIGCOMM 1996): a tenant who asks little does not wait
        behind one who asks much. Models share a worker that offers several.

        After Unavailable there may be leases that nobody was told of: ``beats`` has them, ``release`` them. Left alone
        they would look like those of a worker that was lost.

        Args:
            worker: who leases.
            models: what it offers.
            most: how many it can take.
            suspects: lease suspects instead, of one group only (the oldest): the caller gives such a worker
                nothing else until it is done with them. A group of more than ``most`` is parted.
        """
        ...

    async def renew(self, holds: Sequence[Hold]) -> Mapping[str, Held]:
        """Raise the beats of leases; say for each id whether it still holds. "cancelled" still holds, but stop."""
        ...

    async def append(self, parts: Mapping[Hold, Record]) -> Mapping[str, int | None]:
        """Append to logs; return for each id how many entries its log now has, or None where the hold does not hold.

        A record is written if it begins at the log's end, else not: the number returned says where to begin. So the
        same record may be sent again, and one that grew between the two times is cut by whoever sends it.
        """
        ...

    async def finish(
        self, hold: Hold, state: Literal["done", "failed"], result: bytes, last: Record | None = None
    ) -> bool:
        """End a job, its last entries included, in one transaction; return whether this fence has ended it.

        The same call again is True again, whatever it says now: the first end counts. False: the hold does not hold,
        the job is somebody else's or cancelled.
        ``last`` must meet the log's end, or lie within it.

        Raises:
            ValueError: it does not; nothing was written.
        """
        ...

    async def release(self, holds: Sequence[Hold]) -> None:
        """Give leases back, blamelessly: the jobs are queued again, in their old places."""
        ...

    async def lose(self, beats: Sequence[Beat]) -> list[str]:
        """Take leases from a worker that was lost with all of these at once; return the ids of those that are now dead.

        Only leases whose fence *and beat* are still as given are lost. Their jobs are queued again as suspects, in two
        groups, the halves of what was lost together, so that one job that kills its workers is found in log2 steps.
        A job that was lost alone, for the ``Bounds.crashes``th time that it was lost at all, is dead.
        """
        ...

    async def absolve(self, holds: Sequence[Hold]) -> None:
        """Take back one crash of each job whose lease this was and is no more: whoever had it lives, and was lost by
        the network's doing. One that is to blame for nothing any more is no suspect.
        """
        ...

    async def cancel(self, id: str) -> State | None:
        """End a job that has not ended: who has it leased is told so by ``renew``, and can write no more.

        Return its state then; None: there is no such job.
        """
        ...

    async def look(self, id: str) -> Seen | None:
        """Return a job as it stands, or None if it is not there (any more)."""
        ...

    async def log(self, id: str, start: int = 0) -> list[Record]:
        """Return the log's records from entry ``start`` on; the first may begin before it."""
        ...

    async def beats(self) -> list[Beat]:
        """Return all live leases."""
        ...

    async def depths(self) -> Mapping[str, Depth]:
        """Return how much waits and runs, by model."""
        ...

    async def listed(self, state: State, most: int = 100) -> list[Seen]:
        """Return jobs of a state, the newest first, without their bodies and results."""
        ...

    async def revive(self, id: str) -> bool:
        """Queue a dead job again, its crashes forgotten; return whether there was one."""
        ...

    async def tick(self, seen: int) -> int:
        """Advance the store's count of ticks by one unless another gateway did since ``seen``; drop what has been kept
        long enough (so many whole ticks); return the count. The first time, ``seen`` is -1, and nothing is advanced.
        """
        ...

    async def check(self) -> str:
        """Return "ok", or what the database says is wrong with it."""
        ...

    async def close(self) -> None:
        """End it; what waits is done first. May be called again."""
        ...
