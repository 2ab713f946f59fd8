"""AIME's routes for clients: a job is brought, asked for again and again, and its text comes whole each time.

A job that has ended is told as long as it is kept, however often it is asked for. What went wrong with one is told
as a result with an error, since AIME's clients take any other way for a broken connection. Follows AIME's API
server 0.9.6 and its clients in Python and JavaScript; docs/how-to/aime.md has what differs.
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
from moesaic.cluster.aime.conversation import asked
from moesaic.cluster.aime.credentials import Credentials
from moesaic.cluster.aime.parameters import checked
from moesaic.cluster.aime.settings import Definition, model_of, together
from moesaic.cluster.protocols import JobProgress, JobService
from moesaic.errors import Forbidden, InvalidRequest, MoesaicError, NotFound, Unauthorized
from moesaic.serve.context import RequestContext
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Failure, Response
from moesaic.serve.keys import Key
from moesaic.serve.sse import frame

ENDED_STATES = ("done", "failed", "cancelled", "dead")
STATES = {"queued": "queued", "leased": "processing"}
STREAM_SECONDS = 0.2
"""Seconds between events of a stream: each has the whole text so far."""
MAX_CHARGED_JOBS = 10_000
"""Jobs of which it is known what their keys were charged."""
QUERY = {name: {"type": "string"} for name in ("job_id", "key", "client_session_auth_key")}
STATUSES = {402: "Not with this key, or there is no such job."}
"""What AIME's clients expect instead of 403."""


@dataclass(frozen=True)
class ModelStatus:
    """How an endpoint's model stands now."""

    model: str
    card: ModelInfo | None
    load: ModelStats
    workers: int
    """How many offer it."""


class ClientRoutes:
    """What all endpoints share."""

    def __init__(self, jobs: JobService, definitions: Sequence[Definition]) -> None:
        self.jobs, self.definitions = jobs, together(definitions)
        self.credentials = Credentials(definitions)
        self._charged: OrderedDict[str, int] = OrderedDict()

    def endpoints(self) -> list[Endpoint]:
        """Return all routes."""
        out = []
        for method in ("GET", "POST"):
            out += [
                _open("/api/validate_key", self.validate_key, method, "Whether a key is known (AIME)."),
                _open("/api/endpoints", self.listed, method, "The endpoints (AIME)."),
            ]
        out.append(_open("/stream_progress", self.stream, "GET", "How far a job is, as it goes (AIME).", query=QUERY))
        for each in self.definitions:
            out += EndpointRoutes(self, each).endpoints()
        return out

    def stand(self, context: RequestContext, definition: Definition) -> ModelStatus:
        """Return how an endpoint's model stands."""
        cards = context.backend.models()
        name = model_of(definition, cards)
        card = next((each for each in cards if name == each.name or name in each.aliases), None)
        name = card.name if card else name
        return ModelStatus(name, card, context.backend.stats().get(name, ModelStats()), self.jobs.worker_count(name))

    async def validate_key(self, context: RequestContext) -> AnyResponse:
        """Say whether a key is known."""
        try:
            self.credentials.owner(context, request_values(context))
        except Unauthorized:
            return Response({"success": False, "error": "Key not valid"})
        return Response({"success": True, "error": None})

    async def listed(self, context: RequestContext) -> AnyResponse:
        """Return the endpoints' names; with a key, if that is known."""
        values = request_values(context)
        if values.get("key"):
            try:
                self.credentials.owner(context, values)
            except Unauthorized:
                return Response({"error": "Key not valid"}, 401)
        return Response({"endpoints": [each.name for each in self.definitions]})

    async def stream(self, context: RequestContext) -> AnyResponse:
        """Stream a job's progress from where AIME's JavaScript client looks for it."""
        key = self.credentials.owner(context, request_values(context))
        found = await self.jobs.progress(request_values(context).get("job_id", ""), key.name)
        cards = context.backend.models()
        fitting = [each for each in self.definitions if model_of(each, cards) == found.model]
        return await EndpointRoutes(self, (fitting or self.definitions)[0]).stream(context)

    def charge(self, context: RequestContext, key: Key, found: JobProgress) -> None:
        """Take from a key's share what a job has cost since it was last looked at."""
        cost = _generated(found) + found.prompt_tokens
        context.services.keys.charge(key, max(0, cost - self._charged.pop(found.id, 0)))
        self._charged[found.id] = cost
        if len(self._charged) > MAX_CHARGED_JOBS:
            self._charged.popitem(last=False)


class EndpointRoutes:
    """The routes of one endpoint."""

    def __init__(self, clients: ClientRoutes, definition: Definition) -> None:
        self._clients, self._jobs, self._definition = clients, clients.jobs, definition

    def endpoints(self) -> list[Endpoint]:
        """Return the endpoint's routes."""
        name, version = self._definition.name, self._definition.version
        route = partial(_open, version=version)
        body = dict[str, Any]
        out = [
            route(f"/{name}", self.request, "POST", "Bring a job (AIME).", body=body),
            route(f"/api/call/{name}", self.request, "POST", "The same.", body=body),
            route(f"/{name}/cancel", self.cancel, "POST", "Take a job back.", body=body),
            route(f"/{name}/stream", self.stream, "GET", "How far a job is, as it goes.", query=QUERY),
        ]
        for path in (f"/{name}/progress", f"/api/progress/{name}"):
            out.append(route(path, self.progress, "GET", "How far a job is (AIME).", query=QUERY))
            out.append(route(path, self.progress, "POST", "How far a job is (AIME).", body=body))
        for method in ("GET", "POST"):
            out.append(route(f"/{name}/login", self.login, method, "Begin a session (AIME)."))
            for path in (f"/api/endpoints/{name}", f"/api/{name}"):
                out.append(route(path, self.details, method, "What an endpoint takes (AIME)."))
        return out

    async def login(self, context: RequestContext) -> AnyResponse:
        """Begin a session."""
        values = request_values(context)
        try:
            key = self._clients.credentials.owner(context, values, self._definition)
        except (Unauthorized, Forbidden) as error:
            return Response({"success": False, "error": str(error)})
        shown = {"client_session_auth_key": self._clients.credentials.begin_session(key), "key": values.get("key")}
        return Response({"success": True, "ep_version": self._definition.version, **shown}, headers=NO_STORE)

    async def details(self, context: RequestContext) -> AnyResponse:
        """Tell what the endpoint takes, and how busy it is; nothing of who does its work."""
        own, now = self._definition, self._clients.stand(context, self._definition)
        described = {each.name: dict(each.written) for each in own.inputs}
        return Response(
            {
                "name": own.name,
                "title": own.title,
                "description": own.description,
                "http_methods": ["POST"],
                "version": own.version,
                "max_queue_length": own.max_queue_length,
                "max_time_in_queue": own.max_time_in_queue,
                "free_queue_slots": max(0, own.max_queue_length - now.load.waiting),
                "category": own.category,
                "num_active_workers": min(now.workers, now.load.running),
                "num_workers": now.workers,
                "workers": [],
                "parameter_description": {
                    "input": described | {"wait_for_result": {"type": "bool"}},
                    "output": own.outputs,
                    "progress": {"OUTPUTS": own.progress},
                },
            }
        )

    async def request(self, context: RequestContext) -> AnyResponse:
        """Take a job in; unless told otherwise, answer when it is done."""
        own, now = self._definition, self._clients.stand(context, self._definition)
        key = self._clients.credentials.owner(context, context.body, own)
        context.assign_key(key)
        if now.load.waiting >= own.max_queue_length:
            return self._refused(400, f"Job queue reached max length {own.max_queue_length}!")
        values, problems = checked(context.body, own)
        if problems:
            return self._refused(400, problems)
        request = replace(asked(values, now.model), tenant=key.name, priority=key.priority)
        job = await self._jobs.submit(request)
        if context.body.get("wait_for_result") is False:
            return Response({"success": True, "job_id": job, "ep_version": own.version})
        found = await self._waited(job, key)
        self._clients.charge(context, key, found)
        return Response(self._result(found, now.card))

    async def _waited(self, job: str, key: Key) -> JobProgress:
        """Return a job that has ended. It is taken back if whoever waits leaves: nobody knows its id."""
        try:
            while True:
                with contextlib.suppress(MoesaicError):  # the job's own error; what it is, its progress tells
                    async with self._following(job, key) as answers:
                        async for _ in answers:
                            pass
                found = await self._jobs.progress(job, key.name)
                if found.state in ENDED_STATES:
                    return found
                await asyncio.sleep(STREAM_SECONDS)
        except BaseException:
            with contextlib.suppress(MoesaicError):
                await asyncio.shield(self._jobs.cancel(job, key.name))
            raise

    @contextlib.asynccontextmanager
    async def _following(self, job: str, key: Key) -> AsyncIterator[ResponseStream]:
        """Follow a job; leaving it does not end it."""
        answers = await self._jobs.follow(job, key.name)
        try:
            yield answers
        finally:
            answers.cancel()

    async def progress(self, context: RequestContext) -> AnyResponse:
        """Tell how far a job is; take it back first if that is asked for."""
        values = request_values(context)
        key = self._clients.credentials.owner(context, values, self._definition)
        job = values.get("job_id")
        if not isinstance(job, str) or not job:
            return self._refused(402, ["No job_id given"])
        try:
            if any(values.get(name) in (True, "true", "True") for name in ("canceled", "cancel")):
                await self._jobs.cancel(job, key.name)
            return Response(self._shown(context, key, await self._looked(job, key)), headers=NO_STORE)
        except NotFound:
            return self._refused(402, [f"Client has no active request with this job id {job[:80]}"])

    async def _looked(self, job: str, key: Key) -> JobProgress:
        """Return how far a job is; one that has waited longer than the endpoint allows is taken back."""
        found = await self._jobs.progress(job, key.name)
        waited = time.time() - found.submitted_at if found.submitted_at else 0.0
        if found.state == "queued" and waited > self._definition.max_time_in_queue:
            await self._jobs.cancel(job, key.name)
            return await self._jobs.progress(job, key.name)
        return found

    async def cancel(self, context: RequestContext) -> AnyResponse:
        """Take a job back."""
        key = self._clients.credentials.owner(context, context.body, self._definition)
        job = str(context.body.get("job_id") or "")
        try:
            state = await self._jobs.cancel(job, key.name)
        except NotFound:
            return self._refused(402, [f"Client has no active request with this job id {job[:80]}"])
        shown = {"success": True, "job_id": job, "ep_version": self._definition.version}
        return Response(shown | {"job_state": "canceled" if state == "cancelled" else "done"})

    async def stream(self, context: RequestContext) -> AnyResponse:
        """Stream a job's progress: the same as by asking, an event for each."""
        values = request_values(context)
        key = self._clients.credentials.owner(context, values, self._definition)
        job = str(values.get("job_id") or "")
        return EventStream(self._frames(context, key, await self._looked(job, key)))

    async def _frames(self, context: RequestContext, key: Key, found: JobProgress) -> AsyncIterator[bytes]:
        clock = asyncio.get_running_loop().time
        while True:
            shown = self._shown(context, key, found)
            yield frame({**shown, **shown.get("progress", {})})
            if found.state in ENDED_STATES:
                return
            shown_at = clock()
            with contextlib.suppress(MoesaicError):
                async with self._following(found.id, key) as answers:
                    async for _ in answers:
                        if clock() - shown_at < STREAM_SECONDS:
                            continue
                        shown = self._shown(context, key, await self._jobs.progress(found.id, key.name))
                        if shown["job_state"] == "done":
                            break
                        yield frame({**shown, **shown["progress"]})
                        shown_at = clock()
            found = await self._jobs.progress(found.id, key.name)
            if found.state not in ENDED_STATES:
                await asyncio.sleep(STREAM_SECONDS)

    # What is told

    def _shown(self, context: RequestContext, key: Key, found: JobProgress) -> dict[str, Any]:
        self._clients.charge(context, key, found)
        now = self._clients.stand(context, self._definition)
        shown = {"success": True, "job_id": found.id, "ep_version": self._definition.version}
        if found.state in ENDED_STATES:
            return shown | {"job_result": self._result(found, now.card), "job_state": "done"}
        progress: dict[str, Any] = {
            "job_id": found.id,
            "queue_position": found.queue_position + 1 if found.state == "queued" else 0,
            "estimate": -1 if found.estimate is None or not now.workers else round(found.estimate, 1),
            "num_workers_online": now.workers,
            "progress": _generated(found),
            "progress_data": {},
        }
        if found.state == "leased":
            outputs = _outputs(found, now.card)
            progress["progress_data"] = {name: outputs[name] for name in self._definition.progress if name in outputs}
        return shown | {"job_state": STATES[found.state], "progress": progress}

    def _result(self, found: JobProgress, card: ModelInfo | None) -> dict[str, Any]:
        """Return what a job has come to; times in seconds, those that are not known left out."""
        failed = found.state != "done"
        out: dict[str, Any] = {"success": not failed, "job_id": found.id, "ep_version": self._definition.version}
        outputs = _outputs(found, card)
        out |= {name: outputs[name] for name in self._definition.outputs if name in outputs}
        if failed:
            out["error"] = str(found.error) if found.error else f"the job was {found.state}"
        times = {
            "start_time": found.submitted_at,
            "start_time_compute": found.started_at,
            "result_received_time": found.finished_at,
        }
        out |= {name: value for name, value in times.items() if value}
        for name, since in (("compute_duration", found.started_at), ("total_duration", found.submitted_at)):
            if since and found.finished_at:
                out[name] = round(max(0.0, found.finished_at - since), 3)
        return out

    def _refused(self, status: int, error: str | list[str]) -> Response:
        return Response({"success": False, "error": error, "ep_version": self._definition.version}, status)


NO_STORE = {"cache-control": "no-store"}


def _generated(found: JobProgress) -> int:
    """Return how many tokens there are; AIME's workers send none, and while they work it is a guess by the text."""
    if found.finished:
        return found.finished[0].generated_tokens
    return sum(found.tokens[:1]) or len("".join(found.texts[:1])) // 4


def _outputs(found: JobProgress, card: ModelInfo | None) -> dict[str, Any]:
    tokens = _generated(found)
    out = {
        "text": found.texts[0] if found.texts else "",
        "num_generated_tokens": tokens,
        "model_name": found.model,
        "max_seq_len": card.context if card else None,
        "current_context_length": found.prompt_tokens + tokens,
        "prompt_length": found.prompt_tokens,
    }
    return {name: value for name, value in out.items() if value is not None}


def request_values(context: RequestContext) -> Mapping[str, Any]:
    """Return what a request carries, in its body and its query; of a name that stands twice, the first."""
    try:
        query = parse_qsl(
            context.http.scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=64
        )
    except ValueError:
        raise InvalidRequest("there are more than 64 fields behind the question mark") from None
    return dict(reversed(query)) | (context.body or {})


def failure(reason: Failure, version: int | None = None) -> Any:
    """Return an error as AIME's clients read it; what a key is not good for is 402 there."""
    shown = {"success": False, "error": [reason.message]} | ({} if version is None else {"ep_version": version})
    return Response(shown, 402 if reason.status == 403 else reason.status)


def broken(reason: Failure) -> bytes:
    """Return an error as an event of a stream; nothing follows."""
    return frame({"success": False, "error": [reason.message]})


def _open(path: str, run: Any, method: str, summary: str, *, version: int | None = None, **more: Any) -> Endpoint:
    """Return a route that looks at keys itself, since AIME's clients send them in bodies and queries."""
    shape = partial(failure, version=version)
    return Endpoint(path, run, shape, broken, method=method, public=True, summary=summary, statuses=STATUSES, **more)


def endpoints(jobs: JobService, definitions: Sequence[Definition]) -> list[Endpoint]:
    """Return AIME's routes for clients.

    Raises:
        InvalidRequest: two endpoints have one name, or that of another route.
    """
    return ClientRoutes(jobs, definitions).endpoints()
