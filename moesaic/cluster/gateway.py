"""The gateway: a backend without a model. Requests become jobs in a store, and workers run them.

A client reads from a ``Subscription``, whether the job's worker is connected to this gateway or, with a shared store,
to another one. An accepted job survives the death of any process. This module does not depend on HTTP or on how jobs
are stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import msgspec

from moesaic.backend import Delta, Finished, GenerationRequest, ModelInfo, ModelStats, PromptDone, TokenInfo
from moesaic.cluster import wire
from moesaic.cluster.active_job import ActiveJob, Subscription
from moesaic.cluster.active_jobs import POLL_SECONDS, ActiveJobs
from moesaic.cluster.jobs import TICK_SECONDS, Job, JobState, QueueDepth, Store
from moesaic.cluster.leases import LeaseManager
from moesaic.cluster.protocols import LEASE_SECONDS, STALL_SECONDS, JobProgress
from moesaic.cluster.queries import WorkerQueries
from moesaic.cluster.tasks import BackgroundTasks
from moesaic.cluster.workers import WorkerRegistry
from moesaic.errors import NotFound, Overloaded, Unavailable

DEFAULT_COST_TOKENS = 512
"""Estimated number of tokens of an answer without a token limit."""
EMBEDDED_TEXTS = 128
"""Maximum number of texts that one job embeds, so that its outcome fits into a worker's message."""

Pack = Callable[[GenerationRequest], bytes]
"""Function that returns the body of the job or query for a request."""


class Gateway:
    """A backend whose models run in workers. Implements ``backend.Backend`` and ``protocols.JobService``.

    It creates the components of the gateway and starts their periodic tasks. Create it on its event loop.
    """

    def __init__(
        self,
        store: Store,
        models: Sequence[str] = (),
        lease_seconds: float = LEASE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start a gateway.

        Args:
            store: the store of jobs.
            models: names of models that are known before a worker offers them.
            lease_seconds: a lease expires when it has not been renewed for this time.
            stall_seconds: if a worker's engine makes no step for this time, the worker's leases expire.
            clock: monotonic clock, in seconds.
        """
        self.store = store
        self.tasks = BackgroundTasks()
        self.workers = WorkerRegistry(models, clock)
        self.jobs = ActiveJobs(store, self.workers, self.tasks, clock)
        self.leases = LeaseManager(
            self.workers,
            store,
            self.jobs,
            self.tasks,
            lease_seconds=lease_seconds,
            stall_seconds=stall_seconds,
            clock=clock,
        )
        self.queries = WorkerQueries(self.workers)
        self.depths: Mapping[str, QueueDepth] = {}
        """Counts of queued and leased jobs by model, a few hundred milliseconds old."""
        self._ticks = -1
        self._start_timers()

    def _start_timers(self) -> None:
        self.store.listen(self.jobs.on_store_changed)
        self.tasks.start(self._update_depths())
        for seconds, function in (
            (0.0, self.jobs.refresh_changed),
            (self.jobs.flush_interval, self.jobs.flush_due),
            (POLL_SECONDS / 4, self.jobs.sweep),
            (POLL_SECONDS / 4, self._update_depths),
            (min(1.0, self.leases.lease_seconds / 5), self.leases.expire_silent),
            (TICK_SECONDS, self._tick),
        ):
            self.tasks.start_periodic(seconds, function)

    async def _update_depths(self) -> None:
        self.depths = await self.store.depths()
        self.leases.suspect_models = {model for model, depth in self.depths.items() if depth.suspects}
        self.workers.add_models(self.depths)  # models of jobs that an earlier gateway accepted

    async def _tick(self) -> None:
        self._ticks = await self.store.tick(self._ticks)

    async def close(self) -> None:
        await self.tasks.close()
        await self.jobs.close()
        await self.store.close()

    # Backend

    def models(self) -> Sequence[ModelInfo]:
        return list(self.workers.models.values())

    def stats(self) -> Mapping[str, ModelStats]:
        queued = {name: depth.queued for name, depth in self.depths.items()}
        waiting = {name: ModelStats(waiting=count) for name, count in queued.items()}
        running = self.workers.stats().items()
        return waiting | {name: replace(stats, waiting=stats.waiting + queued.get(name, 0)) for name, stats in running}

    async def generate(self, request: GenerationRequest) -> Subscription:
        job, replayed = await self._submit("generate", request, wire.pack_request)
        job.resumable = bool(request.idempotency_key)
        return self.jobs.follow(job, replayed=replayed)

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        outcome = await self._query("tokenize", request, wire.pack_request)
        return msgspec.convert(outcome, list[TokenInfo])

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return str(await self._query("detokenize", GenerationRequest(model), _constant(list(ids))))

    async def embed(
        self, model: str, texts: Sequence[str | Sequence[int]], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        vectors: list[list[float]] = []
        total = 0
        for begin in range(0, len(texts), EMBEDDED_TEXTS):
            body = wire.EmbedBody(texts[begin : begin + EMBEDDED_TEXTS], truncate)
            outcome = await self._run("embed", GenerationRequest(model), _constant(body))
            part, tokens = msgspec.convert(outcome, tuple[list[list[float]], int])
            vectors += part
            total += tokens
        return vectors, total

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        outcome = await self._run("classify", GenerationRequest(model), _constant(list(texts)))
        return msgspec.convert(outcome, list[Mapping[str, float]])

    async def _query(self, kind: str, request: GenerationRequest, pack: Pack) -> Any:
        """Send a query to a connected worker; return its answer.

        If no worker of this gateway answers queries, but workers of another gateway or protocol may, run a job instead.

        Raises:
            Unavailable: no worker offers the model, or the worker was lost.
        """
        model = self.workers.find_model(request.model).name
        session = await self.queries.find_worker(model)
        if session is not None:
            return await self.queries.ask(session, model, kind, pack(replace(request, model=model)))
        if self.store.shared or self.workers.offering(model):
            return await self._run(kind, request, pack)
        raise Unavailable(f"no worker of model {model!r:.120} is connected: try again later")

    async def _run(self, kind: str, request: GenerationRequest, pack: Pack) -> Any:
        """Run a job that has no events, such as ``embed``; return its outcome."""
        job, _ = await self._submit(kind, request, pack)
        subscription = self.jobs.follow(job)
        try:
            async for _ in subscription:
                pass
        finally:
            subscription.cancel()
        return job.outcome

    async def _submit(self, kind: str, request: GenerationRequest, pack: Pack) -> tuple[ActiveJob, bool]:
        """Store a job for a request; return it, and whether it existed already under the request's idempotency key."""
        model = self.workers.find_model(request.model).name
        stored = replace(request, model=model, idempotency_key="", sampling=dict(request.sampling))
        digest = hashlib.sha256(kind.encode() + pack(stored)).hexdigest() if request.idempotency_key else ""
        if kind == "generate" and stored.sampling.get("seed") is None:  # so that another worker can continue the answer
            stored = replace(stored, sampling={**stored.sampling, "seed": secrets.randbits(63)})
        if kind == "generate" and stored.messages is not None:  # the same date in the prompt on each worker
            stored = replace(stored, now=datetime.now().isoformat(timespec="seconds"))
        job = Job(
            _new_id(),
            model,
            kind,
            pack(stored),
            request.tenant,
            _cost(request),
            request.priority,
            request.idempotency_key,
            digest,
        )
        active = self.jobs.add(job.id, model, request.tenant)
        try:
            job_id = await self.store.submit(job)
        except BaseException as error:
            self.jobs.remove(job.id)
            if isinstance(error, asyncio.CancelledError) and not request.idempotency_key:
                self.tasks.start(self.store.cancel(job.id))  # it may have been stored, and its client is gone
            if isinstance(error, Overloaded | Unavailable) and error.retry_after is None:
                error.retry_after = self._retry_after()
            raise
        if job_id == job.id:
            self.workers.wake(model)
            return active, False
        self.jobs.remove(job.id)
        return await self.jobs.find(job_id, request.tenant), True

    def _retry_after(self) -> float:
        """Return the seconds until the queue may have room, randomised so that clients do not all return together."""
        queued = sum(depth.queued for depth in self.depths.values())
        seconds = 0.1 * queued * self.leases.mean_job_seconds / max(1, self.workers.slots())
        return max(1.0, min(60.0, seconds)) * random.uniform(0.8, 1.4)

    # JobService

    async def submit(self, request: GenerationRequest) -> str:
        job, _ = await self._submit("generate", request, wire.pack_request)
        job.resumable = True
        job.unread_since = float("inf")  # the client polls in its own time
        return job.id

    async def follow(self, job_id: str, tenant: str) -> Subscription:
        return self.jobs.follow(await self.jobs.find(job_id, tenant), replayed=True, cancel=False)

    async def cancel(self, job_id: str, tenant: str) -> JobState:
        return await self.jobs.cancel(await self.jobs.find(job_id, tenant))

    async def progress(self, job_id: str, tenant: str) -> JobProgress:
        job = await self.jobs.find(job_id, tenant)
        snapshot = await self.store.snapshot(job_id)
        if snapshot is None:
            raise NotFound(f"there is no job {job_id!r:.60}")
        answers = 1 + max((event.index for event in job.events), default=0)
        texts, tokens = [""] * answers, [0] * answers
        for event in job.events:
            if isinstance(event, Delta):
                texts[event.index] += event.text
                tokens[event.index] += len(event.tokens)
        finished = tuple(event for event in job.events if isinstance(event, Finished))
        prompt_tokens = (event.prompt_tokens for event in job.events if isinstance(event, PromptDone))
        slots = self.workers.slots(job.model)
        estimate = self.leases.mean_job_seconds * (1 + snapshot.queue_position / slots) if slots else None
        return JobProgress(
            id=job_id,
            model=job.model,
            state=snapshot.state,
            queue_position=snapshot.queue_position,
            estimate=0.0 if job.ended else estimate,
            texts=tuple(texts),
            tokens=tuple(tokens),
            prompt_tokens=next(prompt_tokens, 0),
            finished=finished if job.ended else (),
            error=job.error,
            submitted_at=job.submitted_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
        )

    def worker_count(self, model: str) -> int:
        return len(self.workers.offering(model))

    # Administration

    async def revive(self, job_id: str, model: str) -> bool:
        """Queue the job again if it is dead; return whether it was dead."""
        revived = await self.store.revive(job_id)
        if revived:
            self.jobs.remove(job_id)  # later subscribers must wait for the new end
            self.workers.wake(model)
        return revived


def _new_id() -> str:
    """Return a random job id. It never begins with a hyphen: a command line would take it for a flag."""
    while (job_id := secrets.token_urlsafe(18)).startswith("-"):
        pass
    return job_id


def _constant(value: Any) -> Pack:
    return lambda _: msgspec.json.encode(value)


def _cost(request: GenerationRequest) -> int:
    """Return an estimate of the number of tokens of a request: its prompt and all its answers."""
    if isinstance(request.prompt, str):
        prompt_tokens = len(request.prompt) // 4
    elif request.prompt is not None:
        prompt_tokens = len(request.prompt)
    else:
        prompt_tokens = sum(len(str(message.get("content", ""))) for message in request.messages or ()) // 4
    limit, answers = request.sampling.get("max_tokens"), request.sampling.get("n")
    answer_tokens = limit if isinstance(limit, int) else DEFAULT_COST_TOKENS
    return 1 + prompt_tokens + answer_tokens * (answers if isinstance(answers, int) else 1)
