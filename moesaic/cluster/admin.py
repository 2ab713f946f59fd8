"""A gateway's routes for administrators: who works, what waits, what was set aside, and what to do about it.

docs/how-to/administer.md has them. Nothing here shows a prompt but ``show`` of a dead job whose body was asked for: it
is needed to find out what kills workers. Knows HTTP and messages. Does not know how jobs are kept.
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
"""Jobs in one list."""


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which worker is meant: by its name as ``workers`` shows it, which begins with its key's."""

    name: str


class Overview(msgspec.Struct, frozen=True):
    """A gateway at a glance. ``seconds`` is what a job takes, a running mean; the last three count since the start."""

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
    """A worker that is here. ``since`` is in seconds since the epoch, ``heard`` in seconds before now."""

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
    """All that are here, and the names of which something was said, whether they are here or not."""

    workers: list[Worker]
    drained: list[str]
    banned: list[str]


class Queue(msgspec.Struct, frozen=True):
    """What waits and runs of one model; ``cost`` is about how many tokens what is queued may take."""

    model: str
    workers: int
    slots: int
    queued: int
    leased: int
    suspects: int
    cost: int


class Queues(msgspec.Struct, frozen=True):
    """Those of all models."""

    queues: list[Queue]


class Job(msgspec.Struct, frozen=True):
    """A job without what was asked and answered. ``attempts``: how often it was leased; ``crashes``: and lost."""

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
    """Jobs of one state, the newest first."""

    state: JobState
    jobs: list[Job]


class Shown(msgspec.Struct, frozen=True, omit_defaults=True):
    """One job, how it ended, and of a dead one its request, if that was asked for."""

    job: Job
    error: wire.ErrorInfo | None = None
    request: msgspec.Raw | None = None


class Done(msgspec.Struct, frozen=True):
    """What is so now."""

    name: str
    state: str


class KeyShown(msgspec.Struct, frozen=True):
    """A key's name and limits. Neither the key nor its digest is ever shown."""

    name: str
    kind: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent: int | None
    priority: int
    models: tuple[str, ...]


class KeyList(msgspec.Struct, frozen=True):
    """All keys that are let in."""

    keys: list[KeyShown]


def endpoints(gateway: Gateway) -> tuple[Endpoint, ...]:
    """Return the routes of a gateway for those with an admin's key."""
    workers, jobs = _WorkerRoutes(gateway), _JobRoutes(gateway)

    def route(method: str, path: str, run: Any, summary: str, **more: Any) -> Endpoint:
        return Endpoint(
            f"/admin/{path}", run, openai_failure, method=method, admin=True, summary=f"Admins: {summary}", **more
        )

    listing = {"state": {"enum": list(STATES)}, "most": {"type": "integer", "minimum": 1, "maximum": MAX_JOBS}}
    return (
        route("GET", "status", workers.status, "the gateway at a glance."),
        route("POST", "drain", _drain, "take no new requests; what is queued is done."),
        route("POST", "resume", _resume, "take requests again."),
        route("GET", "workers", workers.listed, "who works."),
        route("POST", "workers/drain", workers.drain, "give a worker nothing more.", body=Named),
        route("POST", "workers/resume", workers.resume, "take that back.", body=Named),
        route("POST", "workers/ban", workers.ban, "ban a worker.", body=Named),
        route("GET", "queues", jobs.queues, "what waits and runs, by model."),
        route("GET", "jobs", jobs.listed, "jobs of a state.", query=listing),
        route("GET", "jobs/{id}", jobs.show, "one job.", query={"request": {"enum": ["true", "false"]}}),
        route("DELETE", "jobs/{id}", jobs.cancel, "cancel a job, whosever it is."),
        route("POST", "jobs/{id}/revive", jobs.revive, "queue a dead job again."),
        route("GET", "keys", _keys, "names and limits."),
        route("POST", "keys/reload", _reload, "read the keys again."),
    )


async def _drain(context: RequestContext) -> AnyResponse:
    context.services.state.draining = True
    return Response(Done("", "draining"))


async def _resume(context: RequestContext) -> AnyResponse:
    if context.services.state.stopping:
        raise Conflict("the gateway is stopping: there is no taking that back")
    context.services.state.draining = False
    return Response(Done("", "serving"))


async def _keys(context: RequestContext) -> AnyResponse:
    return Response(KeyList([_key(each) for each in context.services.keys.accepted]))


async def _reload(context: RequestContext) -> AnyResponse:
    context.services.keys.reload()
    return await _keys(context)


def _key(key: Key) -> KeyShown:
    kind = "worker" if key.worker else "admin" if key.admin else "client"
    limits = (key.requests_per_minute, key.tokens_per_minute, key.concurrent)
    return KeyShown(key.name, kind, *limits, key.priority, key.models)


class _WorkerRoutes:
    """About workers."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def status(self, context: RequestContext) -> AnyResponse:
        gateway, state = self._gateway, context.services.state
        depths = (await gateway.store.depths()).values()
        return Response(
            Overview(
                __version__,
                "stopping" if state.stopping else "draining" if state.draining else "serving",
                state.running - 1,  # without this one
                len(gateway.workers.sessions),
                gateway.workers.slots(),
                sum(each.queued for each in depths),
                sum(each.leased for each in depths),
                sum(each.suspects for each in depths),
                gateway.leases.mean_job_seconds,
                gateway.leases.expired,
                gateway.leases.fenced,
                gateway.leases.dead,
            )
        )

    async def listed(self, _: RequestContext) -> AnyResponse:
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
        return Response(Done(context.body.name, "drained"))

    async def resume(self, context: RequestContext) -> AnyResponse:
        self._gateway.workers.resume(context.body.name)
        return Response(Done(context.body.name, "working"))

    async def ban(self, context: RequestContext) -> AnyResponse:
        await self._gateway.leases.ban(context.body.name)
        return Response(Done(context.body.name, "banned"))


class _JobRoutes:
    """About jobs."""

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

    async def listed(self, context: RequestContext) -> AnyResponse:
        given = context.query
        state, most = given.get("state", "dead"), given.get("most", "100")
        if state not in STATES:
            raise InvalidParameter("state", f"is {state!r:.40}, expected one of {', '.join(STATES)}")
        if not (most.isascii() and most.isdigit() and len(most) < 6 and 0 < int(most) <= MAX_JOBS):
            raise InvalidParameter("most", f"is {most!r:.20}, expected 1 to {MAX_JOBS}")
        return Response(Jobs(state, [_job(each) for each in await self._gateway.store.list_jobs(state, int(most))]))

    async def show(self, context: RequestContext) -> AnyResponse:
        seen = await self._look(context)
        asked = context.query.get("request") == "true"
        if asked and seen.state != "dead":
            raise Conflict("what was asked is shown of dead jobs alone")
        result = msgspec.json.decode(seen.result, type=wire.JobResult) if seen.result else wire.JobResult()
        return Response(Shown(_job(seen), result.error, msgspec.Raw(seen.job.body) if asked else None))

    async def cancel(self, context: RequestContext) -> AnyResponse:
        seen = await self._look(context)
        return Response(Done(seen.job.id, await self._gateway.cancel(seen.job.id, seen.job.tenant)))

    async def revive(self, context: RequestContext) -> AnyResponse:
        seen = await self._look(context)
        if not await self._gateway.revive(seen.job.id, seen.job.model):
            raise Conflict(f"the job is {seen.state}: only dead ones can be revived")
        return Response(Done(seen.job.id, "queued"))

    async def _look(self, context: RequestContext) -> JobSnapshot:
        id = context.path_parameters["id"]
        seen = await self._gateway.store.snapshot(id)
        if seen is None:
            raise NotFound(f"there is no job {id!r:.60}")
        return seen


def _job(seen: JobSnapshot) -> Job:
    job = seen.job
    return Job(
        job.id,
        job.model,
        job.kind,
        job.tenant,
        seen.state,
        job.cost,
        job.priority,
        seen.worker,
        seen.attempts,
        seen.crashes,
        seen.logged,
        seen.queue_position,
    )
