"""Interfaces of the gateway: ``JobService`` for clients that poll, ``WorkerService`` for workers.

``backend.Backend`` serves an API whose client waits for the answer. ``JobService`` serves an API whose client gets a
job id and polls. ``WorkerService`` serves workers of every protocol: Moesaic's over ``/worker/...``, and that of the
AIME API server over ``/worker_job_request``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moesaic.backend import Event, Finished, GenerationRequest, ModelInfo, ModelStats, ResponseStream
from moesaic.cluster.jobs import JobState, Lease, LeaseToken, RenewState
from moesaic.errors import MoesaicError

LEASE_SECONDS = 10.0
"""A lease expires when it has not been renewed for this time."""
RENEW_FRACTION = 0.2
"""A worker renews its leases at intervals of this fraction of the lease's duration."""
STALL_SECONDS = 30.0
"""A worker with running jobs is stalled when its engine's step counter has not changed for this time."""

LogPosition = tuple[int, int]
"""The number of a job's events that the gateway has received, and the number of those that are on disk."""


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job, as a poll returns it."""

    id: str
    model: str
    state: JobState
    queue_position: int = 0
    """Number of queued jobs that are leased before this one; 0 if this one is not queued."""
    estimate: float | None = None
    """Estimated number of seconds until the job is done; None if unknown."""
    texts: tuple[str, ...] = ()
    """The text so far of each of the request's answers."""
    tokens: tuple[int, ...] = ()
    """The number of tokens generated so far for each of the request's answers."""
    prompt_tokens: int = 0
    finished: tuple[Finished, ...] = ()
    """The ``Finished`` events of the answers, once the job is done."""
    error: MoesaicError | None = None
    """The error of a job that failed, was cancelled or is dead."""
    submitted_at: float = 0.0
    """Time of the submission in seconds since the epoch, by this gateway's clock; 0 if unknown."""
    started_at: float = 0.0
    """Time of the newest lease in seconds since the epoch; 0 if unknown."""
    finished_at: float = 0.0
    """Time of the end in seconds since the epoch; 0 if unknown."""


class JobService(Protocol):
    """The gateway's interface for clients that poll. It raises NotFound for an unknown job and another tenant's job."""

    async def submit(self, request: GenerationRequest) -> str:
        """Store a request durably; return its job id."""
        ...

    async def progress(self, job_id: str, tenant: str) -> JobProgress:
        """Return the progress of a job of this tenant. An ended job can be polled until the store drops it."""
        ...

    async def follow(self, job_id: str, tenant: str) -> ResponseStream:
        """Return a stream of all events of a job, past and future. Cancelling the stream does not cancel the job."""
        ...

    async def cancel(self, job_id: str, tenant: str) -> JobState:
        """Cancel a job unless it has ended; return its state afterwards."""
        ...

    def worker_count(self, model: str) -> int:
        """Return the number of connected workers that offer a model."""
        ...


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker tells a gateway about itself when it registers."""

    name: str
    """Unique among connected workers. A new worker replaces an old one of the same name. The old one's leases expire if
    the new worker does not list them."""
    models: tuple[ModelInfo, ...]
    """The models that the worker offers."""
    slots: int = 1
    """Maximum number of concurrent jobs."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Machine, versions and backend, for administrators only."""
    owner: str = ""
    """The name of the worker's API key."""
    instance: str = ""
    """Random id of the worker's process. If it registers again with the same id, it has lost only its connection."""
    answers_queries: bool = False
    """Whether the worker answers the queries in ``Assignment.queries``."""


@dataclass(frozen=True)
class Query:
    """A short operation for a worker, such as tokenizing a prompt. Unlike a job, it is not stored on disk."""

    id: str
    model: str
    kind: str
    """The operation: "tokenize" or "detokenize"."""
    body: bytes


@dataclass(frozen=True)
class Assignment:
    """The response to a worker's long poll for work."""

    leases: tuple[Lease, ...] = ()
    """New jobs to run."""
    cancel: tuple[str, ...] = ()
    """Ids of jobs that the worker must stop: they were cancelled, or leased to another worker."""
    queries: tuple[Query, ...] = ()


class WorkerService(Protocol):
    """The gateway's interface for workers. It raises NotFound for an unregistered worker, which must register again."""

    async def register(self, info: WorkerInfo, leases: Sequence[LeaseToken] = ()) -> Mapping[str, LogPosition | None]:
        """Register a worker that still has ``leases``; return the log position of each job, by id.

        It is None if the worker has lost the lease of the job.

        Raises:
            Forbidden: an administrator has banned the worker.
        """
        ...

    async def lease(self, worker: str, free_slots: int, wait_seconds: float) -> Assignment:
        """Wait up to ``wait_seconds`` for jobs to run, jobs to cancel, or queries.

        At most ``free_slots`` jobs are leased, and never more than the worker's unused slots. A worker that drains
        passes 0, and still gets cancellations and queries.
        """
        ...

    async def renew(
        self, worker: str, leases: Sequence[LeaseToken], stats: Mapping[str, ModelStats]
    ) -> Mapping[str, RenewState]:
        """Renew leases; return their states by job id, as ``Store.renew`` does.

        ``stats`` are the engine statistics by model. Their step counters show that the worker makes progress.
        """
        ...

    async def append_events(
        self, worker: str, batches: Mapping[LeaseToken, tuple[int, Sequence[Event]]]
    ) -> Mapping[str, LogPosition | None]:
        """Receive new events of jobs; return the log position of each job, by id.

        A batch is the number of its first event in the job's log, and the events. The worker next sends the events
        after those received, and may forget those on disk. None means that the worker has lost the lease.
        """
        ...

    async def finish(
        self,
        worker: str,
        lease_token: LeaseToken,
        start: int,
        events: Sequence[Event],
        outcome: Any = None,
        error: MoesaicError | None = None,
    ) -> bool:
        """End a job with its last events, and an outcome or an error; return whether the lease was valid.

        ``start`` is the number of the first of ``events`` in the job's log.
        """
        ...

    async def answer_query(
        self, worker: str, query_id: str, outcome: Any = None, error: MoesaicError | None = None
    ) -> None:
        """Receive the outcome or the error of a query. The answer to an unknown query is ignored."""
        ...

    async def release(self, worker: str, leases: Sequence[LeaseToken], *, leaving: bool = False) -> None:
        """Give a worker's leases back without counting a crash. A ``leaving`` worker gets no further jobs."""
        ...

    async def unregister(self, worker: str) -> None:
        """Remove a worker; its remaining leases expire."""
        ...
