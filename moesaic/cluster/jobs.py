"""Jobs, leases, and the interface of job stores.

A job is *accepted* once ``submit`` returns: it is on disk and ends exactly once. It may be computed more than once.
Each lease has a *fence*, a number that only grows, and only the holder of the newest fence may write (M. Kleppmann,
"How to do distributed locking", 2016). The fence grows when a lease is given and when one is taken away.

    queued -> leased -> done | failed | cancelled | dead         an expired lease puts the job back to queued

No decision depends on the wall clock. A lease is alive while its *heartbeat* counter rises; each gateway watches the
counters with its own monotonic clock. Retention of ended jobs is counted in *ticks* of the store, which gateways
advance.

This module does not depend on HTTP or on the content of a job. Every store under ``store/`` implements ``Store`` and
runs the same tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

JobState = Literal["queued", "leased", "done", "failed", "cancelled", "dead"]
RenewState = Literal["ok", "cancelled", "fenced"]

TICK_SECONDS = 10.0
"""Seconds between two calls of ``Store.tick`` by a gateway."""


@dataclass(frozen=True)
class Job:
    """A job as a client submitted it: a request and what a queue must know about it."""

    id: str
    """Unguessable id, chosen by the gateway."""
    model: str
    """Only workers that offer this model lease the job."""
    kind: str = "generate"
    """The operation: "generate", "embed", "classify", "tokenize" or "detokenize"."""
    body: bytes = b""
    """The encoded request; stores do not read it."""
    tenant: str = ""
    """The name of the API key that submitted the job."""
    cost: int = 1
    """Estimated number of tokens. Tenants share the workers by the sums of their jobs' costs."""
    priority: int = 0
    """Jobs with a lower number are leased first, whichever tenant they belong to."""
    idempotency_key: str = ""
    """A tenant that submits this key again gets the existing job; "" means no key."""
    digest: str = ""
    """Hash of the request. A request with a used idempotency key and another digest is refused."""


@dataclass(frozen=True)
class StoreLimits:
    """Limits on queued jobs and on retention."""

    queued: int = 10_000
    """Maximum number of queued jobs; more are refused with ``Unavailable``."""
    queued_per_tenant: int = 2_000
    """Maximum number of queued jobs of one tenant; more are refused with ``Overloaded``."""
    queued_cost: int = 100_000_000
    """Maximum total cost of queued jobs; more are refused with ``Unavailable``."""
    crashes: int = 3
    """A job is dead when it has crashed this number of times or more, the last time as its worker's only lost job."""
    retention_ticks: int = 90
    """Number of ticks for which an ended job keeps its log and result (90 ticks are 15 minutes)."""
    max_ended: int = 100_000
    """Maximum number of ended jobs that are kept; the oldest are dropped first."""
    idempotency_ticks: int = 8640
    """Number of ticks for which an idempotency key is remembered after the job has ended (one day)."""


@dataclass(frozen=True)
class LogRecord:
    """A part of a job's log: ``count`` entries (events) from number ``start`` on, encoded in ``blob``."""

    start: int
    count: int
    blob: bytes


@dataclass(frozen=True)
class LeaseToken:
    """Identifies a lease of a job. The lease is valid while the job has the same fence in the store."""

    id: str
    """The job's id."""
    fence: int


@dataclass(frozen=True)
class Lease:
    """A job that has been leased to a worker."""

    job: Job
    fence: int
    log: tuple[LogRecord, ...] = ()
    """The job's log so far, without gaps. The worker continues the answer behind it."""

    @property
    def token(self) -> LeaseToken:
        """The token that the worker sends with every message about this job."""
        return LeaseToken(self.job.id, self.fence)


@dataclass(frozen=True)
class LeaseStatus:
    """An active lease and its heartbeat counter."""

    lease_token: LeaseToken
    worker: str
    heartbeat: int
    """Counter that rises with every ``renew`` and ``append`` of this lease, and when the job is leased."""


@dataclass(frozen=True)
class JobSnapshot:
    """The current state of a job in the store."""

    job: Job
    state: JobState
    fence: int = 0
    worker: str = ""
    """The worker that has the job's newest lease, or had it; "" if there was none."""
    attempts: int = 0
    """Number of leases so far."""
    crashes: int = 0
    """Number of leases that expired because their worker was lost."""
    logged: int = 0
    """Number of entries in the job's log."""
    result: bytes = b""
    """The encoded result of an ended job; empty before the end."""
    queue_position: int = 0
    """Number of queued jobs of the same model that are leased before this one; 0 if this one is not queued."""

    def held_by(self, worker: str, lease_token: LeaseToken) -> bool:
        """Return whether the job's newest lease has, or had, this token and belongs to this worker."""
        return (self.worker, self.fence) == (worker, lease_token.fence)


@dataclass(frozen=True)
class QueueDepth:
    """Counts of the queued and leased jobs of one model."""

    queued: int = 0
    """Number of queued jobs, including suspects."""
    leased: int = 0
    suspects: int = 0
    """Number of queued jobs that crashed with a worker. They run in quarantine: their worker gets no other jobs."""
    cost: int = 0
    """Total cost of the queued jobs."""


ChangeListener = Callable[[Sequence[str]], None]
"""Function called on the gateway's loop, after a commit, with ids of changed jobs; "" stands for new queued work."""


class Store(Protocol):
    """Durable storage of jobs. When a method returns, its effect is on disk. Used from one event loop.

    Every method raises Unavailable when the store is unreachable or has no room left (``StorageFull``). The call then
    had either no effect or its whole effect, and it is safe to repeat it.
    """

    @property
    def shared(self) -> bool:
        """Whether several gateways may use this store at the same time."""
        ...

    def listen(self, listener: ChangeListener) -> None:
        """Have ``listener`` called when jobs change, also when another gateway on the same store changes them.

        A notification may be late, repeated, or missing after a broken connection. A gateway must therefore also poll.
        """
        ...

    async def submit(self, job: Job) -> str:
        """Store a job; return its id, or the id of the existing job of the same tenant and idempotency key.

        Submitting the same job id again returns that id. The existing job may have been dropped already; ``snapshot``
        then returns None for the returned id.

        Raises:
            Conflict: the existing job has another ``digest``.
            Overloaded: the tenant has too many queued jobs. Unavailable: there are too many queued jobs altogether.
            InvalidParameter: a text has a NUL or a lone surrogate, the cost is negative, or a number exceeds 2**40.
        """
        ...

    async def lease(self, worker: str, models: Sequence[str], limit: int, *, suspects: bool = False) -> list[Lease]:
        """Lease up to ``limit`` queued jobs of these models: by priority, then fairly among tenants, then in order.

        Tenants share by start-time fair queueing over cost (Goyal et al., SIGCOMM 1996), so a small request does not
        wait behind a large backlog of another tenant. A worker that offers several models divides its time among them.

        After Unavailable, leases may exist that no worker has received. ``active_leases`` lists them; ``release`` them,
        or they expire and count as crashes.

        Args:
            worker: name of the worker.
            models: models that the worker offers.
            limit: maximum number of jobs to lease.
            suspects: whether to lease only suspects (jobs that crashed with a worker), those of the oldest group. The
                caller gives this worker nothing else until it has finished them. A group of more than ``limit`` jobs is
                split.
        """
        ...

    async def renew(self, leases: Sequence[LeaseToken]) -> Mapping[str, RenewState]:
        """Raise the heartbeats of valid leases; return the state of each lease by job id.

        "ok": the lease is valid. "cancelled": the job was cancelled under this lease, and the worker must stop it.
        "fenced": the lease is not valid for another reason.
        """
        ...

    async def append(self, parts: Mapping[LeaseToken, LogRecord]) -> Mapping[str, int | None]:
        """Append records to the logs of jobs; return each log's length by job id, or None if the lease is not valid.

        A record is written only if it begins at the log's end. The returned length tells the caller where its next
        record must begin. A record may therefore be sent again.
        """
        ...

    async def finish(
        self, lease_token: LeaseToken, state: Literal["done", "failed"], result: bytes, last: LogRecord | None = None
    ) -> bool:
        """Finish a job and write its last log entries in one transaction; return whether this lease finished it.

        Repeating the call returns True again and changes nothing. False means that the lease is not valid: the job was
        cancelled or leased again. ``last`` must begin at the log's end or lie within the log.

        Raises:
            ValueError: ``last`` does not fit the log; nothing was written.
        """
        ...

    async def release(self, leases: Sequence[LeaseToken]) -> None:
        """Give leases back without counting a crash: the jobs are queued again in their old positions."""
        ...

    async def expire(self, statuses: Sequence[LeaseStatus]) -> list[str]:
        """Expire leases of one worker, which was lost; return the ids of the jobs that are dead because of it.

        A lease expires only if it still has the given fence *and heartbeat*. The jobs are queued again as suspects, in
        two groups, each one half of what was lost together. A job that kills its workers is thus found in log2 steps.
        A job that was lost alone, for at least the ``StoreLimits.crashes``th time, is dead.
        """
        ...

    async def forgive_crash(self, leases: Sequence[LeaseToken]) -> None:
        """Subtract one crash from each job that had one of these leases and lost it.

        Called when the worker turns out to be alive: the network was at fault. A job without crashes is not a suspect.
        """
        ...

    async def cancel(self, job_id: str) -> JobState | None:
        """Cancel a job unless it has ended; return its state afterwards, or None if there is no such job.

        The holder of its lease can no longer write, and gets "cancelled" from ``renew``.
        """
        ...

    async def snapshot(self, job_id: str) -> JobSnapshot | None:
        """Return the current state of a job, or None if the store does not have it."""
        ...

    async def log(self, job_id: str, start: int = 0) -> list[LogRecord]:
        """Return the records of a job's log from entry ``start`` on. The first record may begin before ``start``."""
        ...

    async def active_leases(self) -> list[LeaseStatus]:
        """Return the leases of all jobs that are leased now."""
        ...

    async def depths(self) -> Mapping[str, QueueDepth]:
        """Return the counts of queued and leased jobs, by model."""
        ...

    async def list_jobs(self, state: JobState, limit: int = 100) -> list[JobSnapshot]:
        """Return up to ``limit`` jobs in this state, the newest first, without bodies and results."""
        ...

    async def revive(self, job_id: str) -> bool:
        """If the job is dead, queue it again with no crashes; return whether it was dead."""
        ...

    async def tick(self, seen: int) -> int:
        """Advance the store's tick count unless another gateway has advanced it since ``seen``; return the count.

        ``seen`` is the count from the caller's last call; -1 the first time, when nothing is advanced. Each advance
        drops jobs and idempotency keys whose retention has ended.
        """
        ...

    async def check(self) -> str:
        """Return "ok", or a description of the damage in the database."""
        ...

    async def close(self) -> None:
        """Finish pending operations and close the store. A second call does nothing."""
        ...
