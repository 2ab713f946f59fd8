"""AIME's routes for its own workers: they come for jobs, tell how far they are, and bring results.

What their interface cannot bear is never sent: no null, no 500, no status but 503 where it is to try again, and
``cmd: error`` only where it is to end. Follows AIME's API server 0.9.6 and its worker interface 0.8 to 0.14.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.cluster.aime.aime_worker import AimeJob, AimeWorker
from moesaic.cluster.aime.aime_worker_pool import AimeWorkerPool
from moesaic.cluster.aime.credentials import worker_key
from moesaic.cluster.aime.settings import Definition
from moesaic.cluster.protocols import LEASE_SECONDS, JobService, WorkerService
from moesaic.cluster.routes import MESSAGE_BYTES
from moesaic.errors import InvalidRequest, Unauthorized, Unavailable
from moesaic.serve.context import RequestContext
from moesaic.serve.endpoint import AnyResponse, Endpoint, Failure, Response

WAIT_FRACTION = 0.75
"""Of the time after which a worker gives up a request for jobs: then it is told that there is none."""
SERVER_VERSION = "0.9.6"
"""The version of AIME's server that workers are told."""
MAX_SLOTS = 4096
"""Jobs that one worker may have."""
OK = {"cmd": "ok", "success": True}
PARAMETERS = ("gpu_name", "num_gpus", "framework", "framework_version", "pytorch_version", "version", "worker_version")


class WorkerRoutes:
    """What all routes share."""

    def __init__(
        self, service: WorkerService, jobs: JobService, definitions: Sequence[Definition], lease_seconds: float
    ) -> None:
        self._pool = AimeWorkerPool(service, jobs.worker_count, lease_seconds)
        self._definitions = definitions

    def endpoints(self) -> list[Endpoint]:
        """Return all routes."""
        return [
            _route("/worker_check_server_status", self.status, "Whether a worker is known (AIME)."),
            _route("/worker_login", self.login, "Offer oneself as a worker (AIME)."),
            _route("/worker_job_request", self.jobs, "Wait for jobs (AIME)."),
            _route("/worker_job_progress", self.progress, "Tell how far jobs are (AIME).", body=Any),
            _route("/worker_job_result", self.result, "Bring a job's result (AIME)."),
        ]

    def _of_type(self, job_type: Any) -> list[Definition]:
        return [each for each in self._definitions if each.job_type == job_type]

    async def status(self, context: RequestContext) -> AnyResponse:
        """Tell a worker whether it is known, and its job type. One with a name is let in here."""
        body = context.body
        definitions = self._of_type(body.get("job_type"))
        member, valid = None, False
        if definitions:
            try:
                owner = worker_key(context, body.get("auth_key"), definitions).name
                valid = True
                if name := _name(body.get("auth")):  # it may have begun under an earlier process of this gateway
                    known = [each for each in self._pool.find(name, definitions[0].job_type) if each.owner == owner]
                    member = known[0] if known else await self._admit(definitions, name, owner, body, legacy=False)
            except Unauthorized:
                pass
        shown = {"logged_in": member is not None, "job_type_present": bool(definitions), "key_valid": valid}
        return Response(OK | shown)

    async def login(self, context: RequestContext) -> AnyResponse:
        """Let a worker in."""
        body = _object(context.body.get("worker_parameters"))
        definitions = self._of_type(body.get("job_type"))
        name = _name(body.get("auth"))
        if not definitions or not name:
            return Response({"success": False, "error_msg": _unfit(str(body.get("job_type")), name)})
        try:
            owner = worker_key(context, body.get("auth_key"), definitions).name
        except Unauthorized as error:
            return Response({"success": False, "error_msg": str(error)})
        about = {"model": _object(context.body.get("model_parameters"))}
        await self._admit(definitions, name, owner, body, legacy=False, about=about)
        told = {"request_timeout": definitions[0].request_timeout, "api_server_version": SERVER_VERSION}
        return Response(OK | told)

    async def _admit(
        self,
        definitions: Sequence[Definition],
        name: str,
        owner: str,
        body: Mapping[str, Any],
        *,
        legacy: bool,
        about: Mapping[str, Any] | None = None,
    ) -> AimeWorker:
        shown = {key: body[key] for key in PARAMETERS if key in body} | {"protocol": "aime"} | dict(about or {})
        slots = _count(body.get("max_batch_size", body.get("max_job_batch")))
        return await self._pool.admit(AimeWorker(name, definitions, slots, owner, legacy, shown, time.monotonic()))

    async def jobs(self, context: RequestContext) -> AnyResponse:
        """Wait for jobs."""
        if context.services.state.draining:
            raise Unavailable("the server is about to stop: ask another, or try again later")
        body = context.body
        try:
            member = await self._member(context, body)
        except (Unauthorized, InvalidRequest) as error:
            return Response({"cmd": "error", "msg": str(error)})
        timeout = min(member.definition.request_timeout, _seconds(body.get("request_timeout")))
        found = await self._pool.give(member, _count(body.get("max_job_batch")), timeout * WAIT_FRACTION)
        if not found:
            return Response({"cmd": "no_job"})
        own = member.definition
        return Response(
            {
                "cmd": "job",
                "endpoint_name": own.name,
                "input_descriptions": {each.name: dict(each.written) for each in own.inputs},
                "progress_output_descriptions": own.progress,
                "final_output_descriptions": own.outputs,
                "job_data": [_data(running) for running in found],
            }
        )

    async def _member(self, context: RequestContext, body: Mapping[str, Any]) -> AimeWorker:
        """Return the worker that asks.

        Raises:
            Unauthorized: its key is wrong. InvalidRequest: its job type is not known. Both are for good.
            Unavailable: it is not known, and has to log in first.
        """
        name, job_type = _name(body.get("auth")), str(body.get("job_type") or "")
        for member in self._pool.find(name, job_type):
            if worker_key(context, body.get("auth_key"), member.definitions).name == member.owner:
                return member
        definitions = self._of_type(job_type)
        if not job_type:
            raise Unavailable("not logged in: log in again")
        if not definitions or not name:
            raise InvalidRequest(_unfit(job_type, name))
        owner = worker_key(context, body.get("auth_key"), definitions).name
        return await self._admit(definitions, name, owner, body, legacy=True)

    async def progress(self, context: RequestContext) -> AnyResponse:
        """Take in how far jobs are: a list, or one."""
        several = isinstance(context.body, list)
        entries = [_object(each) for each in (context.body if several else [context.body])]
        for entry in entries:
            try:
                self._check(context, entry)
            except Unauthorized as error:
                return Response({"success": False, "error_msg": str(error)})
        updates = [(str(entry.get("job_id")), _object(entry.get("progress_data"))) for entry in entries]
        answers = await self._pool.progress(updates)
        return Response(answers if several else answers[0])

    def _check(self, context: RequestContext, entry: Mapping[str, Any]) -> None:
        """Raise Unauthorized unless whoever sends this has the job that it is about, or could have it."""
        member = self._pool.worker_of(str(entry.get("job_id")))
        if definitions := member.definitions if member else self._of_type(entry.get("job_type")):
            key = worker_key(context, entry.get("auth_key"), definitions)
            if member and key.name != member.owner:
                raise Unauthorized("this is the job of another key's worker")

    async def result(self, context: RequestContext) -> AnyResponse:
        """Take a result in; the same one again is no fault."""
        body = context.body
        try:
            self._check(context, body)
        except Unauthorized as error:
            return Response({"success": False, "error_msg": str(error)})
        job = str(body.get("job_id"))
        if await self._pool.result(job, body):
            return Response(OK)
        told = f"Job with job id {job[:80]} not found in worker {str(body.get('auth'))[:80]}!"
        return Response({"cmd": "warning", "msg": told})


def _data(running: AimeJob) -> dict[str, Any]:
    now = time.time()
    return {**running.data, "job_id": running.id, "start_time": now, "start_time_compute": now}


def _unfit(job_type: str, name: str) -> str:
    """Return why a worker cannot be let in."""
    return f"There is no job type {job_type[:80]}: see the endpoints" if name else "A worker needs a name (auth)"


def _name(given: Any) -> str:
    return given if isinstance(given, str) and len(given) <= 256 and given.isprintable() else ""


def _object(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}


def _count(given: Any) -> int:
    return min(MAX_SLOTS, max(1, given)) if type(given) is int else 1


def _seconds(given: Any) -> float:
    return max(1.0, given) if type(given) in (int, float) else 60.0


def failure(reason: Failure) -> Any:
    """Return an error as their interface bears it: 503 where it is to come again."""
    status = reason.status if reason.status in (400, 404, 405, 413, 415) else 503
    return Response({"cmd": "warning", "success": False, "error_msg": reason.message, "msg": reason.message}, status)


def endpoints(
    service: WorkerService, jobs: JobService, definitions: Sequence[Definition], lease_seconds: float = LEASE_SECONDS
) -> list[Endpoint]:
    """Return AIME's routes for its workers; a lease that is not renewed for ``lease_seconds`` is lost."""
    return WorkerRoutes(service, jobs, definitions, lease_seconds).endpoints()


def _route(path: str, run: Any, summary: str, *, body: Any = dict[str, Any]) -> Endpoint:
    """Return a route that looks at keys itself, since they come in the body."""
    return Endpoint(path, run, failure, body=body, public=True, worker=True, body_bytes=MESSAGE_BYTES, summary=summary)
