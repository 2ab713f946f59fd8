"""Interfaces of the gateway: ``JobService`` for clients that poll, ``WorkerService`` for workers.

``backend.Backend`` serves an API whose client waits for the answer. ``JobService`` serves an API whose client gets a
job id and polls. ``WorkerService`` serves workers of every protocol: ours over ``/worker/...``, AIME's over
``/worker_job_request``.
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
"""Workers renew their leases after this fraction of a lease."""
STALL_SECONDS = 30.0
"""A worker with work is stalled when its step counter has not changed for this time."""

LogPosition = tuple[int, int]
"""Numbers of a job's events that a gateway has received, and that are on disk."""


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job."""

    id: str
    model: str
    state: JobState
    queue_position: int = 0
    """Of a queued job: the number of jobs that go first."""
    estimate: float | None = None
    """Estimated number of seconds until the job is done; None if unknown."""
    texts: tuple[str, ...] = ()
    """The text so far of each answer."""
    tokens: tuple[int, ...] = ()
    """The number of generated tokens of each answer."""
    prompt_tokens: int = 0
    finished: tuple[Finished, ...] = ()
    """The ``Finished`` events of the answers, once the job is done."""
    error: MoesaicError | None = None
    """The error of a job that failed, was cancelled or is dead."""
    submitted_at: float = 0.0
    """Seconds since the epoch by this gateway's clock; 0 if unknown."""
    started_at: float = 0.0
    """Seconds since the epoch; 0 if unknown."""
    finished_at: float = 0.0
    """Seconds since the epoch; 0 if unknown."""


class JobService(Protocol):
    """Submission and polling of jobs. A method raises NotFound for an unknown job and for another tenant's job."""

    async def submit(self, request: GenerationRequest) -> str:
        """Store a request durably; return its job id."""
        ...

    async def progress(self, job_id: str, tenant: str) -> JobProgress:
        """Return the progress of a job. An ended job can be polled until the store drops it."""
        ...

    async def follow(self, job_id: str, tenant: str) -> ResponseStream:
        """Return all events of a job, past and future. Cancelling the stream does not cancel the job."""
        ...

    async def cancel(self, job_id: str, tenant: str) -> JobState:
        """Cancel a job unless it has ended; return its state afterwards."""
        ...

    def worker_count(self, model: str) -> int:
        """Return the number of connected workers that offer a model."""
        ...


@dataclass(frozen=True)
class WorkerInfo:
    """The registration of a worker."""

    name: str
    """Unique among connected workers. A worker with the same name replaces it, and leases that it does not list
    expire."""
    models: tuple[ModelInfo, ...]
    """The models that it offers."""
    slots: int = 1
    """Maximum number of concurrent jobs."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Machine, versions and backend, for administrators only."""
    owner: str = ""
    """The name of the worker's key."""
    instance: str = ""
    """Random id of the worker's process: the same process that registers again has lost only its connection."""
    answers_queries: bool = False
    """Whether it answers the queries in ``Assignment.queries``."""


@dataclass(frozen=True)
class Query:
    """A question to a worker that is not stored on disk, such as the tokens of a prompt."""

    id: str
    model: str
    kind: str
    """The operation: "tokenize" or "detokenize"."""
    body: bytes


@dataclass(frozen=True)
class Assignment:
    """The response to a worker's long poll."""

    leases: tuple[Lease, ...] = ()
    """New jobs to run."""
    cancel: tuple[str, ...] = ()
    """Ids of its jobs that it must stop: they were cancelled, or leased to another worker."""
    queries: tuple[Query, ...] = ()


class WorkerService(Protocol):
    """The worker side of the gateway. A method raises NotFound for an unregistered worker, which registers again."""

    async def register(self, info: WorkerInfo, leases: Sequence[LeaseToken] = ()) -> Mapping[str, LogPosition | None]:
        """Register a worker that still has ``leases``; return each job's log position, or None if it lost the lease.

        Raises:
            Forbidden: an administrator has banned the worker.
        """
        ...

    async def lease(self, worker: str, free_slots: int, wait_seconds: float) -> Assignment:
        """Wait up to ``wait_seconds`` for jobs to run, jobs to cancel, or queries.

        At most ``free_slots`` jobs are leased, and never more than the worker's unused slots. A draining worker passes
        0.
        """
        ...

    async def renew(
        self, worker: str, leases: Sequence[LeaseToken], stats: Mapping[str, ModelStats]
    ) -> Mapping[str, RenewState]:
        """Renew leases and report the worker's engine statistics; their step counters show that it makes progress."""
        ...

    async def append_events(
        self, worker: str, batches: Mapping[LeaseToken, tuple[int, Sequence[Event]]]
    ) -> Mapping[str, LogPosition | None]:
        """Receive events of jobs, each batch with the number of its first event in the job's log.

        Return each job's log position: the worker continues behind the received events and may forget the persisted
        ones. None means that the worker has lost the lease.
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
        """Finish a job with its last events, an outcome or an error; return whether the result was accepted."""
        ...

    async def answer_query(
        self, worker: str, query_id: str, outcome: Any = None, error: MoesaicError | None = None
    ) -> None:
        """Receive the answer to a query. The answer to an unknown query is ignored."""
        ...

    async def release(self, worker: str, leases: Sequence[LeaseToken], *, leaving: bool = False) -> None:
        """Give leases back without counting a crash; a ``leaving`` worker gets no further jobs."""
        ...

    async def unregister(self, worker: str) -> None:
        """Remove a worker; its remaining leases expire."""
        ...
