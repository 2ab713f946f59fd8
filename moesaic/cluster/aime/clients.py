"""Routes for clients of the AIME API server: they submit a job and poll its progress, which has the whole text so far.

The result of an ended job is returned to every poll until the store drops the job. A failed job is reported as a result
with an error, because AIME API clients take any other response for a broken connection. The routes follow the AIME
API server 0.9.6 and its clients in Python and JavaScript. docs/how-to/aime.md lists the differences.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from moesaic.backend import ModelInfo, ModelStats, ResponseStream
from moesaic.cluster.aime.conversation import generation_request
from moesaic.cluster.aime.credentials import Credentials
from moesaic.cluster.aime.parameters import check_parameters
from moesaic.cluster.aime.settings import Definition, check_definitions, model_of
from moesaic.cluster.protocols import JobProgress, JobService
from moesaic.errors import Forbidden, InvalidRequest, MoesaicError, NotFound, Unauthorized
from moesaic.serve.context import RequestContext
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Failure, Response
from moesaic.serve.keys import Key
from moesaic.serve.sse import frame

ENDED_STATES = ("done", "failed", "cancelled", "dead")
STATES = {"queued": "queued", "leased": "processing"}
STREAM_SECONDS = 0.2
"""Minimum seconds between two events of a progress stream. Each event contains the whole text so far."""
MAX_CHARGED_JOBS = 10_000
"""Maximum number of jobs for which it is remembered how many tokens their key was charged for."""
QUERY = {name: {"type": "string"} for name in ("job_id", "key", "client_session_auth_key")}
STATUSES = {402: "The key is not allowed to do this, or there is no such job."}
"""Additional HTTP statuses in the OpenAPI description. AIME API clients expect 402 instead of 403."""


@dataclass(frozen=True)
class ModelStatus:
    """The current state of an endpoint's model."""

    model: str
    info: ModelInfo | None
    """The model's description; None if no worker offers it."""
    stats: ModelStats
    workers: int
    """Number of workers that offer the model."""


class ClientRoutes:
    """Routes for AIME API clients that belong to no endpoint, and the state that the routes of all endpoints share."""

    def __init__(self, jobs: JobService, definitions: Sequence[Definition]) -> None:
        self.jobs, self.definitions = jobs, check_definitions(definitions)
        self.credentials = Credentials(definitions)
        self._charged: OrderedDict[str, int] = OrderedDict()

    def endpoints(self) -> list[Endpoint]:
        """Return all routes for AIME API clients: the common ones and those of each endpoint."""
        out = []
        for method in ("GET", "POST"):
            out += [
                _public_route("/api/validate_key", self.validate_key, method, "Check whether a key is valid (AIME)."),
                _public_route("/api/endpoints", self.list_endpoints, method, "List the endpoints (AIME)."),
            ]
        out.append(
            _public_route("/stream_progress", self.stream, "GET", "Stream a job's progress (AIME).", query=QUERY)
        )
        for definition in self.definitions:
            out += EndpointRoutes(self, definition).endpoints()
        return out

    def model_status(self, context: RequestContext, definition: Definition) -> ModelStatus:
        """Return the current state of an endpoint's model."""
        models = context.backend.models()
        name = model_of(definition, models)
        info = next((model for model in models if name == model.name or name in model.aliases), None)
        name = info.name if info else name
        return ModelStatus(name, info, context.backend.stats().get(name, ModelStats()), self.jobs.worker_count(name))

    async def validate_key(self, context: RequestContext) -> AnyResponse:
        """Handle ``/api/validate_key``: respond whether the request's key is valid."""
        try:
            self.credentials.owner(context, request_values(context))
        except Unauthorized:
            return Response({"success": False, "error": "Key not valid"})
        return Response({"success": True, "error": None})

    async def list_endpoints(self, context: RequestContext) -> AnyResponse:
        """Handle ``/api/endpoints``: respond with the endpoints' names, or with status 401 if the key is invalid."""
        values = request_values(context)
        if values.get("key"):
            try:
                self.credentials.owner(context, values)
            except Unauthorized:
                return Response({"error": "Key not valid"}, 401)
        return Response({"endpoints": [definition.name for definition in self.definitions]})

    async def stream(self, context: RequestContext) -> AnyResponse:
        """Handle ``/stream_progress``, with which the AIME API's JavaScript client streams the progress of any job."""
        key = self.credentials.owner(context, request_values(context))
        progress = await self.jobs.progress(request_values(context).get("job_id", ""), key.name)
        models = context.backend.models()
        matches = [definition for definition in self.definitions if model_of(definition, models) == progress.model]
        return await EndpointRoutes(self, (matches or self.definitions)[0]).stream(context)

    def charge(self, context: RequestContext, key: Key, job: JobProgress) -> None:
        """Count the tokens that a job has used since the last call against the rate limit of its key."""
        cost = _generated(job) + job.prompt_tokens
        context.services.keys.charge(key, max(0, cost - self._charged.pop(job.id, 0)))
        self._charged[job.id] = cost
        if len(self._charged) > MAX_CHARGED_JOBS:
            self._charged.popitem(last=False)


class EndpointRoutes:
    """The routes of one endpoint for AIME API clients."""

    def __init__(self, clients: ClientRoutes, definition: Definition) -> None:
        self._clients, self._jobs, self._definition = clients, clients.jobs, definition

    def endpoints(self) -> list[Endpoint]:
        """Return all routes of this endpoint."""
        name, version = self._definition.name, self._definition.version
        route = partial(_public_route, version=version)
        body = dict[str, Any]
        out = [
            route(f"/{name}", self.request, "POST", "Submit a job (AIME).", body=body),
            route(f"/api/call/{name}", self.request, "POST", "Submit a job (AIME).", body=body),
            route(f"/{name}/cancel", self.cancel, "POST", "Cancel a job (AIME).", body=body),
            route(f"/{name}/stream", self.stream, "GET", "Stream a job's progress (AIME).", query=QUERY),
        ]
        for path in (f"/{name}/progress", f"/api/progress/{name}"):
            out.append(route(path, self.progress, "GET", "Return a job's progress (AIME).", query=QUERY))
            out.append(route(path, self.progress, "POST", "Return a job's progress (AIME).", body=body))
        for method in ("GET", "POST"):
            out.append(route(f"/{name}/login", self.login, method, "Create a session (AIME)."))
            for path in (f"/api/endpoints/{name}", f"/api/{name}"):
                out.append(route(path, self.details, method, "Describe an endpoint (AIME)."))
        return out

    async def login(self, context: RequestContext) -> AnyResponse:
        """Handle a login: create a session for the request's key."""
        values = request_values(context)
        try:
            key = self._clients.credentials.owner(context, values, self._definition)
        except (Unauthorized, Forbidden) as error:
            return Response({"success": False, "error": str(error)})
        session = {"client_session_auth_key": self._clients.credentials.begin_session(key), "key": values.get("key")}
        return Response({"success": True, "ep_version": self._definition.version, **session}, headers=NO_STORE)

    async def details(self, context: RequestContext) -> AnyResponse:
        """Respond with the endpoint's parameters and load. The list of workers stays empty: it is not public."""
        definition, now = self._definition, self._clients.model_status(context, self._definition)
        inputs = {parameter.name: dict(parameter.written) for parameter in definition.inputs}
        return Response(
            {
                "name": definition.name,
                "title": definition.title,
                "description": definition.description,
                "http_methods": ["POST"],
                "version": definition.version,
                "max_queue_length": definition.max_queue_length,
                "max_time_in_queue": definition.max_time_in_queue,
                "free_queue_slots": max(0, definition.max_queue_length - now.stats.waiting),
                "category": definition.category,
                "num_active_workers": min(now.workers, now.stats.running),
                "num_workers": now.workers,
                "workers": [],
                "parameter_description": {
                    "input": inputs | {"wait_for_result": {"type": "bool"}},
                    "output": definition.outputs,
                    "progress": {"OUTPUTS": definition.progress},
                },
            }
        )

    async def request(self, context: RequestContext) -> AnyResponse:
        """Submit a job. Respond with its result or, if ``wait_for_result`` is false, at once with its id."""
        definition, now = self._definition, self._clients.model_status(context, self._definition)
        key = self._clients.credentials.owner(context, context.body, definition)
        context.assign_key(key)
        if now.stats.waiting >= definition.max_queue_length:
            return self._refused(400, f"Job queue reached max length {definition.max_queue_length}!")
        values, problems = check_parameters(context.body, definition)
        if problems:
            return self._refused(400, problems)
        request = replace(generation_request(values, now.model), tenant=key.name, priority=key.priority)
        job_id = await self._jobs.submit(request)
        if context.body.get("wait_for_result") is False:
            return Response({"success": True, "job_id": job_id, "ep_version": definition.version})
        progress = await self._wait(job_id, key)
        self._clients.charge(context, key, progress)
        return Response(self._result(progress, now.info))

    async def _wait(self, job_id: str, key: Key) -> JobProgress:
        """Wait for a job's end; return its progress. Cancel the job if the client, which lacks its id, disconnects."""
        try:
            while True:
                with contextlib.suppress(MoesaicError):  # the job's own error; its progress contains it
                    async with self._follow(job_id, key) as events:
                        async for _ in events:
                            pass
                progress = await self._jobs.progress(job_id, key.name)
                if progress.state in ENDED_STATES:
                    return progress
                await asyncio.sleep(STREAM_SECONDS)
        except BaseException:
            with contextlib.suppress(MoesaicError):
                await asyncio.shield(self._jobs.cancel(job_id, key.name))
            raise

    @contextlib.asynccontextmanager
    async def _follow(self, job_id: str, key: Key) -> AsyncIterator[ResponseStream]:
        """Yield a stream of a job's events. Leaving the context does not cancel the job."""
        events = await self._jobs.follow(job_id, key.name)
        try:
            yield events
        finally:
            events.cancel()

    async def progress(self, context: RequestContext) -> AnyResponse:
        """Respond with a job's progress. If the request has ``canceled`` or ``cancel``, cancel the job first."""
        values = request_values(context)
        key = self._clients.credentials.owner(context, values, self._definition)
        job_id = values.get("job_id")
        if not isinstance(job_id, str) or not job_id:
            return self._refused(402, ["No job_id given"])
        try:
            if any(values.get(name) in (True, "true", "True") for name in ("canceled", "cancel")):
                await self._jobs.cancel(job_id, key.name)
            progress = await self._current_progress(job_id, key)
            return Response(self._progress_body(context, key, progress), headers=NO_STORE)
        except NotFound:
            return self._refused(402, [f"Client has no active request with this job id {job_id[:80]}"])

    async def _current_progress(self, job_id: str, key: Key) -> JobProgress:
        """Return a job's progress. Cancel the job first if it has been queued longer than the endpoint allows."""
        progress = await self._jobs.progress(job_id, key.name)
        queue_seconds = time.time() - progress.submitted_at if progress.submitted_at else 0.0
        if progress.state == "queued" and queue_seconds > self._definition.max_time_in_queue:
            await self._jobs.cancel(job_id, key.name)
            return await self._jobs.progress(job_id, key.name)
        return progress

    async def cancel(self, context: RequestContext) -> AnyResponse:
        """Cancel a job unless it has ended; respond with its state."""
        key = self._clients.credentials.owner(context, context.body, self._definition)
        job_id = str(context.body.get("job_id") or "")
        try:
            state = await self._jobs.cancel(job_id, key.name)
        except NotFound:
            return self._refused(402, [f"Client has no active request with this job id {job_id[:80]}"])
        body = {"success": True, "job_id": job_id, "ep_version": self._definition.version}
        return Response(body | {"job_state": "canceled" if state == "cancelled" else "done"})

    async def stream(self, context: RequestContext) -> AnyResponse:
        """Stream a job's progress. Each event has the same fields as a response of ``progress``."""
        values = request_values(context)
        key = self._clients.credentials.owner(context, values, self._definition)
        job_id = str(values.get("job_id") or "")
        return EventStream(self._frames(context, key, await self._current_progress(job_id, key)))

    async def _frames(self, context: RequestContext, key: Key, progress: JobProgress) -> AsyncIterator[bytes]:
        clock = asyncio.get_running_loop().time
        while True:
            body = self._progress_body(context, key, progress)
            yield frame({**body, **body.get("progress", {})})
            if progress.state in ENDED_STATES:
                return
            sent_at = clock()
            with contextlib.suppress(MoesaicError):
                async with self._follow(progress.id, key) as events:
                    async for _ in events:
                        if clock() - sent_at < STREAM_SECONDS:
                            continue
                        body = self._progress_body(context, key, await self._jobs.progress(progress.id, key.name))
                        if body["job_state"] == "done":
                            break
                        yield frame({**body, **body["progress"]})
                        sent_at = clock()
            progress = await self._jobs.progress(progress.id, key.name)
            if progress.state not in ENDED_STATES:
                await asyncio.sleep(STREAM_SECONDS)

    # Response bodies

    def _progress_body(self, context: RequestContext, key: Key, job: JobProgress) -> dict[str, Any]:
        self._clients.charge(context, key, job)
        now = self._clients.model_status(context, self._definition)
        body = {"success": True, "job_id": job.id, "ep_version": self._definition.version}
        if job.state in ENDED_STATES:
            return body | {"job_result": self._result(job, now.info), "job_state": "done"}
        progress: dict[str, Any] = {
            "job_id": job.id,
            "queue_position": job.queue_position + 1 if job.state == "queued" else 0,
            "estimate": -1 if job.estimate is None or not now.workers else round(job.estimate, 1),
            "num_workers_online": now.workers,
            "progress": _generated(job),
            "progress_data": {},
        }
        if job.state == "leased":
            outputs = _outputs(job, now.info)
            progress["progress_data"] = {name: outputs[name] for name in self._definition.progress if name in outputs}
        return body | {"job_state": STATES[job.state], "progress": progress}

    def _result(self, job: JobProgress, info: ModelInfo | None) -> dict[str, Any]:
        """Return the body with the result of an ended job. Times are in seconds; unknown times are left out."""
        failed = job.state != "done"
        out: dict[str, Any] = {"success": not failed, "job_id": job.id, "ep_version": self._definition.version}
        outputs = _outputs(job, info)
        out |= {name: outputs[name] for name in self._definition.outputs if name in outputs}
        if failed:
            out["error"] = str(job.error) if job.error else f"the job was {job.state}"
        times = {
            "start_time": job.submitted_at,
            "start_time_compute": job.started_at,
            "result_received_time": job.finished_at,
        }
        out |= {name: value for name, value in times.items() if value}
        for name, since in (("compute_duration", job.started_at), ("total_duration", job.submitted_at)):
            if since and job.finished_at:
                out[name] = round(max(0.0, job.finished_at - since), 3)
        return out

    def _refused(self, status: int, error: str | list[str]) -> Response:
        return Response({"success": False, "error": error, "ep_version": self._definition.version}, status)


NO_STORE = {"cache-control": "no-store"}


def _generated(job: JobProgress) -> int:
    """Return the number of tokens of a job's answer; while an AIME API worker runs it, an estimate from the text."""
    if job.finished:
        return job.finished[0].generated_tokens
    return sum(job.tokens[:1]) or len("".join(job.texts[:1])) // 4


def _outputs(job: JobProgress, info: ModelInfo | None) -> dict[str, Any]:
    tokens = _generated(job)
    out = {
        "text": job.texts[0] if job.texts else "",
        "num_generated_tokens": tokens,
        "model_name": job.model,
        "max_seq_len": info.context if info else None,
        "current_context_length": job.prompt_tokens + tokens,
        "prompt_length": job.prompt_tokens,
    }
    return {name: value for name, value in out.items() if value is not None}


def request_values(context: RequestContext) -> Mapping[str, Any]:
    """Return the fields of a request's query and body. The body takes precedence, then the first query field."""
    try:
        query = parse_qsl(
            context.http.scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=64
        )
    except ValueError:
        raise InvalidRequest("the query has more than 64 fields: send fewer") from None
    return dict(reversed(query)) | (context.body or {})


def failure(reason: Failure, version: int | None = None) -> Any:
    """Return the error response that AIME API clients expect, with status 402 instead of 403."""
    body = {"success": False, "error": [reason.message]} | ({} if version is None else {"ep_version": version})
    return Response(body, 402 if reason.status == 403 else reason.status)


def broken(reason: Failure) -> bytes:
    """Return the bytes of a stream's last event, which reports an error."""
    return frame({"success": False, "error": [reason.message]})


def _public_route(
    path: str, handler: Any, method: str, summary: str, *, version: int | None = None, **options: Any
) -> Endpoint:
    """Return a route that checks keys itself, because AIME API clients send them in bodies and queries."""
    on_error = partial(failure, version=version)
    return Endpoint(
        path, handler, on_error, broken, method=method, public=True, summary=summary, statuses=STATUSES, **options
    )


def endpoints(jobs: JobService, definitions: Sequence[Definition]) -> list[Endpoint]:
    """Return the routes for AIME API clients.

    Raises:
        InvalidRequest: two endpoints have the same name, or an endpoint has the name of another route.
    """
    return ClientRoutes(jobs, definitions).endpoints()
