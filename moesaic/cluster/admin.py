"""Admin routes of a gateway: workers, queues, jobs, dead letters and keys.

docs/how-to/administer.md describes the routes. Only ``GET /admin/jobs/{id}?request=true`` shows a prompt, and only of a
dead job: it helps to find out why workers crash. This module does not depend on how jobs are stored.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from moesaic import __version__
from moesaic.backend import ModelStats
from moesaic.cluster import wire
from moesaic.cluster.gateway import Gateway
from moesaic.cluster.jobs import JobSnapshot, JobState, QueueDepth
from moesaic.cluster.workers import WorkerSession
from moesaic.errors import Conflict, InvalidParameter, NotFound
from moesaic.serve.context import RequestContext
from moesaic.serve.endpoint import AnyResponse, Endpoint, Response, openai_failure
from moesaic.serve.keys import Key

STATES: tuple[JobState, ...] = get_args(JobState)
MAX_JOBS = 1000
"""Maximum number of jobs in one list."""


class WorkerName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The name of a worker, as ``GET /admin/workers`` shows it. It begins with the name of the worker's key."""

    name: str


class Overview(msgspec.Struct, frozen=True):
    """Summary of a gateway's state.

    ``suspects`` are queued jobs that crashed with a worker. ``seconds`` is the running mean of a job's duration. Three
    numbers count since the gateway's start: ``lost`` expired leases, ``fenced`` results and event batches whose lease
    was not valid, and ``dead`` jobs that became dead letters.
    """

    version: str
    state: str
    running: int
    workers: int
    slots: int
    queued: int
    leased: int
    suspects: int
    seconds: float
    lost: int
    fenced: int
    dead: int


class Worker(msgspec.Struct, frozen=True):
    """A connected worker.

    It connected at ``since``, in seconds since the epoch, and sent its last request ``heard`` seconds ago. ``key`` is
    the name of its API key. A quarantined worker runs only suspects: jobs that crashed with a worker.
    """

    name: str
    key: str
    models: tuple[str, ...]
    slots: int
    jobs: tuple[str, ...]
    load: dict[str, ModelStats]
    about: dict[str, Any]
    since: float
    heard: float
    drained: bool
    quarantined: bool


class Workers(msgspec.Struct, frozen=True):
    """The connected workers, and the names of all drained and all banned workers, connected or not."""

    workers: list[Worker]
    drained: list[str]
    banned: list[str]


class Queue(msgspec.Struct, frozen=True):
    """Counts of one model's queued and leased jobs, and of the workers that offer it and their slots.

    ``cost`` is the estimated number of tokens of the queued jobs. ``suspects`` are queued jobs that crashed with a
    worker.
    """

    model: str
    workers: int
    slots: int
    queued: int
    leased: int
    suspects: int
    cost: int


class Queues(msgspec.Struct, frozen=True):
    """The queues of all models."""

    queues: list[Queue]


class Job(msgspec.Struct, frozen=True):
    """A job without its request and its answer.

    ``key`` is the name of the client's API key, and ``cost`` the estimated number of tokens. ``attempts`` is the number
    of leases, ``crashes`` the number of those that expired because their worker was lost. ``events`` is the length of
    the job's log.
    """

    id: str
    model: str
    kind: str
    key: str
    state: JobState
    cost: int
    priority: int
    worker: str
    attempts: int
    crashes: int
    events: int
    queue_position: int


class Jobs(msgspec.Struct, frozen=True):
    """The jobs that are in the state ``state``, newest first."""

    state: JobState
    jobs: list[Job]


class JobDetails(msgspec.Struct, frozen=True, omit_defaults=True):
    """A job, its error if it failed, and the request of a dead job if the administrator asked for it."""

    job: Job
    error: wire.ErrorInfo | None = None
    request: msgspec.Raw | None = None


class StateChange(msgspec.Struct, frozen=True):
    """The new state of the worker or job ``name``; if ``name`` is empty, of the gateway."""

    name: str
    state: str


class KeyInfo(msgspec.Struct, frozen=True):
    """The name and limits of an API key. Responses never contain the key itself or its digest."""

    name: str
    kind: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent: int | None
    priority: int
    models: tuple[str, ...]


class KeyList(msgspec.Struct, frozen=True):
    """All API keys that the gateway accepts."""

    keys: list[KeyInfo]


def endpoints(gateway: Gateway) -> tuple[Endpoint, ...]:
    """Return the admin routes of a gateway. They require an administrator's key."""
    workers, jobs = _WorkerRoutes(gateway), _JobRoutes(gateway)

    def route(method: str, path: str, handler: Any, summary: str, **options: Any) -> Endpoint:
        return Endpoint(
            f"/admin/{path}",
            handler,
            openai_failure,
            method=method,
            admin=True,
            summary=f"Admins: {summary}",
            **options,
        )

    listing = {"state": {"enum": list(STATES)}, "most": {"type": "integer", "minimum": 1, "maximum": MAX_JOBS}}
    return (
        route("GET", "status", workers.status, "return the gateway's state and counters."),
        route("POST", "drain", _drain, "accept no new requests, complete the queued ones."),
        route("POST", "resume", _resume, "accept requests again."),
        route("GET", "workers", workers.list_workers, "list the connected workers."),
        route("POST", "workers/drain", workers.drain, "give a worker no more jobs.", body=WorkerName),
        route("POST", "workers/resume", workers.resume, "reverse a worker's drain or ban.", body=WorkerName),
        route("POST", "workers/ban", workers.ban, "ban a worker.", body=WorkerName),
        route("GET", "queues", jobs.queues, "return the queue of each model."),
        route("GET", "jobs", jobs.list_jobs, "list the jobs in one state.", query=listing),
        route("GET", "jobs/{id}", jobs.show, "return a job.", query={"request": {"enum": ["true", "false"]}}),
        route("DELETE", "jobs/{id}", jobs.cancel, "cancel a job of any client."),
        route("POST", "jobs/{id}/revive", jobs.revive, "queue a dead job again."),
        route("GET", "keys", _keys, "list the names and limits of keys."),
        route("POST", "keys/reload", _reload, "reload the keys."),
    )


async def _drain(context: RequestContext) -> AnyResponse:
    context.services.state.draining = True
    return Response(StateChange("", "draining"))


async def _resume(context: RequestContext) -> AnyResponse:
    if context.services.state.stopping:
        raise Conflict("the gateway is stopping and cannot resume")
    context.services.state.draining = False
    return Response(StateChange("", "serving"))


async def _keys(context: RequestContext) -> AnyResponse:
    return Response(KeyList([_key(key) for key in context.services.keys.accepted]))


async def _reload(context: RequestContext) -> AnyResponse:
    context.services.keys.reload()
    return await _keys(context)


def _key(key: Key) -> KeyInfo:
    kind = "worker" if key.worker else "admin" if key.admin else "client"
    limits = (key.requests_per_minute, key.tokens_per_minute, key.concurrent)
    return KeyInfo(key.name, kind, *limits, key.priority, key.models)


class _WorkerRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def status(self, context: RequestContext) -> AnyResponse:
        gateway, state = self._gateway, context.services.state
        depths = (await gateway.store.depths()).values()
        return Response(
            Overview(
                __version__,
                "stopping" if state.stopping else "draining" if state.draining else "serving",
                state.running - 1,  # without this request
                len(gateway.workers.sessions),
                gateway.workers.slots(),
                sum(depth.queued for depth in depths),
                sum(depth.leased for depth in depths),
                sum(depth.suspects for depth in depths),
                gateway.leases.mean_job_seconds,
                gateway.leases.expired,
                gateway.leases.fenced,
                gateway.leases.dead,
            )
        )

    async def list_workers(self, _: RequestContext) -> AnyResponse:
        registry = self._gateway.workers
        workers = [self._worker(session) for _, session in sorted(registry.sessions.items())]
        return Response(Workers(workers, sorted(registry.drained), sorted(registry.banned)))

    def _worker(self, session: WorkerSession) -> Worker:
        info = session.info
        return Worker(
            info.name,
            info.owner,
            session.models,
            info.slots,
            tuple(session.leases),
            dict(session.stats),
            dict(info.about),
            session.connected_at,
            max(0.0, self._gateway.workers.clock() - session.last_seen),
            session.drained,
            session.quarantined,
        )

    async def drain(self, context: RequestContext) -> AnyResponse:
        self._gateway.workers.drain(context.body.name)
        return Response(StateChange(context.body.name, "drained"))

    async def resume(self, context: RequestContext) -> AnyResponse:
        self._gateway.workers.resume(context.body.name)
        return Response(StateChange(context.body.name, "working"))

    async def ban(self, context: RequestContext) -> AnyResponse:
        await self._gateway.leases.ban(context.body.name)
        return Response(StateChange(context.body.name, "banned"))


class _JobRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def queues(self, _: RequestContext) -> AnyResponse:
        depths = await self._gateway.store.depths()
        return Response(
            Queues([self._queue(name, depths.get(name)) for name in sorted({*self._gateway.workers.models, *depths})])
        )

    def _queue(self, model: str, depth: QueueDepth | None) -> Queue:
        workers = self._gateway.workers.offering(model)
        depth, slots = depth or QueueDepth(), self._gateway.workers.slots(model)
        return Queue(model, len(workers), slots, depth.queued, depth.leased, depth.suspects, depth.cost)

    async def list_jobs(self, context: RequestContext) -> AnyResponse:
        state, limit = context.query.get("state", "dead"), context.query.get("most", "100")
        if state not in STATES:
            raise InvalidParameter("state", f"is {state!r:.40}, expected one of {', '.join(STATES)}")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 0 < int(limit) <= MAX_JOBS):
            raise InvalidParameter("most", f"is {limit!r:.20}, expected 1 to {MAX_JOBS}")
        snapshots = await self._gateway.store.list_jobs(state, int(limit))
        return Response(Jobs(state, [_job(snapshot) for snapshot in snapshots]))

    async def show(self, context: RequestContext) -> AnyResponse:
        snapshot = await self._snapshot(context)
        with_request = context.query.get("request") == "true"
        if with_request and snapshot.state != "dead":
            raise Conflict(f"the job is {snapshot.state}: only the requests of dead jobs are shown")
        result = msgspec.json.decode(snapshot.result, type=wire.JobResult) if snapshot.result else wire.JobResult()
        request = msgspec.Raw(snapshot.job.body) if with_request else None
        return Response(JobDetails(_job(snapshot), result.error, request))

    async def cancel(self, context: RequestContext) -> AnyResponse:
        job = (await self._snapshot(context)).job
        return Response(StateChange(job.id, await self._gateway.cancel(job.id, job.tenant)))

    async def revive(self, context: RequestContext) -> AnyResponse:
        snapshot = await self._snapshot(context)
        if not await self._gateway.revive(snapshot.job.id, snapshot.job.model):
            raise Conflict(f"the job is {snapshot.state}: only dead jobs can be revived")
        return Response(StateChange(snapshot.job.id, "queued"))

    async def _snapshot(self, context: RequestContext) -> JobSnapshot:
        job_id = context.path_parameters["id"]
        snapshot = await self._gateway.store.snapshot(job_id)
        if snapshot is None:
            raise NotFound(f"there is no job {job_id!r:.60}")
        return snapshot


def _job(snapshot: JobSnapshot) -> Job:
    job = snapshot.job
    return Job(
        job.id,
        job.model,
        job.kind,
        job.tenant,
        snapshot.state,
        job.cost,
        job.priority,
        snapshot.worker,
        snapshot.attempts,
        snapshot.crashes,
        snapshot.logged,
        snapshot.queue_position,
    )
