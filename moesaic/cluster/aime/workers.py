"""Routes for workers of the AIME API server: login, job requests, progress and results.

AIME's worker interface cannot handle some responses, and these routes never send them. No response has null values. A
temporary error is always status 503, never 500. ``cmd: error`` makes a worker exit, so only permanent errors use it.
The routes follow the AIME API server 0.9.6 and its worker interface 0.8 to 0.14.
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
"""Fraction of a worker's request timeout after which the gateway responds that there is no job."""
MIN_REQUEST_SECONDS = 1.0
"""Minimum of the timeout that a worker can choose for its request for jobs, in seconds."""
SERVER_VERSION = "0.9.6"
"""The version of the AIME API server that workers are told they are connected to."""
MAX_SLOTS = 4096
"""Maximum number of jobs that one worker runs at a time."""
OK = {"cmd": "ok", "success": True}
WORKER_PARAMETERS = (
    "gpu_name",
    "num_gpus",
    "framework",
    "framework_version",
    "pytorch_version",
    "version",
    "worker_version",
)


class WorkerRoutes:
    """Routes for AIME API workers, with their common state."""

    def __init__(
        self, service: WorkerService, jobs: JobService, definitions: Sequence[Definition], lease_seconds: float
    ) -> None:
        self._pool = AimeWorkerPool(service, jobs.worker_count, lease_seconds)
        self._definitions = definitions

    def endpoints(self) -> list[Endpoint]:
        """Return all routes."""
        return [
            _route("/worker_check_server_status", self.status, "Check whether a worker is logged in (AIME)."),
            _route("/worker_login", self.login, "Log in as a worker (AIME)."),
            _route("/worker_job_request", self.jobs, "Wait for jobs (AIME)."),
            _route("/worker_job_progress", self.progress, "Report the progress of jobs (AIME).", body=Any),
            _route("/worker_job_result", self.result, "Report the result of a job (AIME)."),
        ]

    def _of_type(self, job_type: Any) -> list[Definition]:
        return [definition for definition in self._definitions if definition.job_type == job_type]

    async def status(self, context: RequestContext) -> AnyResponse:
        """Respond whether the worker is logged in with a valid job type and key. Register it if it sends a name."""
        body = context.body
        definitions = self._of_type(body.get("job_type"))
        worker, valid = None, False
        if definitions:
            try:
                owner = worker_key(context, body.get("auth_key"), definitions).name
                valid = True
                # The worker may have logged in before this gateway was restarted.
                if name := _name(body.get("auth")):
                    matches = [item for item in self._pool.find(name, definitions[0].job_type) if item.owner == owner]
                    worker = (
                        matches[0] if matches else await self._register(definitions, name, owner, body, legacy=False)
                    )
            except Unauthorized:
                pass
        status = {"logged_in": worker is not None, "job_type_present": bool(definitions), "key_valid": valid}
        return Response(OK | status)

    async def login(self, context: RequestContext) -> AnyResponse:
        """Handle a worker's login: register the worker."""
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
        await self._register(definitions, name, owner, body, legacy=False, about=about)
        server = {"request_timeout": definitions[0].request_timeout, "api_server_version": SERVER_VERSION}
        return Response(OK | server)

    async def _register(
        self,
        definitions: Sequence[Definition],
        name: str,
        owner: str,
        body: Mapping[str, Any],
        *,
        legacy: bool,
        about: Mapping[str, Any] | None = None,
    ) -> AimeWorker:
        details = (
            {key: body[key] for key in WORKER_PARAMETERS if key in body} | {"protocol": "aime"} | dict(about or {})
        )
        slots = _count(body.get("max_batch_size", body.get("max_job_batch")))
        return await self._pool.register(AimeWorker(name, definitions, slots, owner, legacy, details, time.monotonic()))

    async def jobs(self, context: RequestContext) -> AnyResponse:
        """Handle a long poll: wait for jobs, and respond with them."""
        if context.services.state.draining:
            raise Unavailable("the server is stopping: use another one, or try again later")
        body = context.body
        try:
            worker = await self._worker(context, body)
        except (Unauthorized, InvalidRequest) as error:
            return Response({"cmd": "error", "msg": str(error)})
        timeout = min(worker.definition.request_timeout, _seconds(body.get("request_timeout")))
        jobs = await self._pool.lease(worker, _count(body.get("max_job_batch")), timeout * WAIT_FRACTION)
        if not jobs:
            return Response({"cmd": "no_job"})
        definition = worker.definition
        return Response(
            {
                "cmd": "job",
                "endpoint_name": definition.name,
                "input_descriptions": {parameter.name: dict(parameter.written) for parameter in definition.inputs},
                "progress_output_descriptions": definition.progress,
                "final_output_descriptions": definition.outputs,
                "job_data": [_job_data(job) for job in jobs],
            }
        )

    async def _worker(self, context: RequestContext, body: Mapping[str, Any]) -> AimeWorker:
        """Return the worker that sent a request; register a legacy worker at its first request.

        Raises:
            Unauthorized: the worker's key is wrong.
            InvalidRequest: the job type is unknown.
            Unavailable: the worker must log in first.
        """
        name, job_type = _name(body.get("auth")), str(body.get("job_type") or "")
        for worker in self._pool.find(name, job_type):
            if worker_key(context, body.get("auth_key"), worker.definitions).name == worker.owner:
                return worker
        definitions = self._of_type(job_type)
        if not job_type:
            raise Unavailable("not logged in: log in again")
        if not definitions or not name:
            raise InvalidRequest(_unfit(job_type, name))
        owner = worker_key(context, body.get("auth_key"), definitions).name
        return await self._register(definitions, name, owner, body, legacy=True)

    async def progress(self, context: RequestContext) -> AnyResponse:
        """Handle the progress of jobs. The body is one update, or a list of updates; so is the response."""
        is_list = isinstance(context.body, list)
        entries = [_object(entry) for entry in (context.body if is_list else [context.body])]
        for entry in entries:
            try:
                self._check(context, entry)
            except Unauthorized as error:
                return Response({"success": False, "error_msg": str(error)})
        updates = [(str(entry.get("job_id")), _object(entry.get("progress_data"))) for entry in entries]
        replies = await self._pool.progress(updates)
        return Response(replies if is_list else replies[0])

    def _check(self, context: RequestContext, entry: Mapping[str, Any]) -> None:
        """Raise Unauthorized unless the sender's key is the one of the worker that holds the job."""
        worker = self._pool.worker_of(str(entry.get("job_id")))
        if definitions := worker.definitions if worker else self._of_type(entry.get("job_type")):
            key = worker_key(context, entry.get("auth_key"), definitions)
            if worker and key.name != worker.owner:
                raise Unauthorized("the job belongs to a worker with another key")

    async def result(self, context: RequestContext) -> AnyResponse:
        """Handle the result of a job. A repeated result is accepted."""
        body = context.body
        try:
            self._check(context, body)
        except Unauthorized as error:
            return Response({"success": False, "error_msg": str(error)})
        job_id = str(body.get("job_id"))
        if await self._pool.result(job_id, body):
            return Response(OK)
        message = f"Job with job id {job_id[:80]} not found in worker {str(body.get('auth'))[:80]}!"
        return Response({"cmd": "warning", "msg": message})


def _job_data(job: AimeJob) -> dict[str, Any]:
    now = time.time()
    return {**job.data, "job_id": job.id, "start_time": now, "start_time_compute": now}


def _unfit(job_type: str, name: str) -> str:
    """Return the message why a worker with this job type and name cannot be registered."""
    return f"There is no job type {job_type[:80]}: see the endpoints" if name else "A worker needs a name (auth)"


def _name(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 256 and value.isprintable() else ""


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return min(MAX_SLOTS, max(1, value)) if type(value) is int else 1


def _seconds(value: Any) -> float:
    return max(MIN_REQUEST_SECONDS, value) if type(value) in (int, float) else 60.0


def failure(reason: Failure) -> Any:
    """Return the error response that AIME API workers expect; status 503 makes the worker try again."""
    status = reason.status if reason.status in (400, 404, 405, 413, 415) else 503
    return Response({"cmd": "warning", "success": False, "error_msg": reason.message, "msg": reason.message}, status)


def endpoints(
    service: WorkerService, jobs: JobService, definitions: Sequence[Definition], lease_seconds: float = LEASE_SECONDS
) -> list[Endpoint]:
    """Return the routes for AIME API workers. Leases expire after ``lease_seconds`` without a renewal."""
    return WorkerRoutes(service, jobs, definitions, lease_seconds).endpoints()


def _route(path: str, handler: Any, summary: str, *, body: Any = dict[str, Any]) -> Endpoint:
    """Return a route that checks keys itself, because AIME API workers send them in the body."""
    return Endpoint(
        path, handler, failure, body=body, public=True, worker=True, body_bytes=MESSAGE_BYTES, summary=summary
    )
