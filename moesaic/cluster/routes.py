"""The gateway's HTTP routes: the worker protocol, and job routes for clients.

docs/reference/worker-protocol.md describes the protocol. This module translates between HTTP messages and the services
of ``protocols``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from moesaic.cluster import wire
from moesaic.cluster.gateway import Gateway
from moesaic.cluster.jobs import LeaseToken
from moesaic.cluster.leases import LeaseManager
from moesaic.cluster.protocols import RENEW_FRACTION, JobService, WorkerInfo
from moesaic.errors import Forbidden, InvalidParameter
from moesaic.serve import sse
from moesaic.serve.context import RequestContext
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Response, openai_failure
from moesaic.serve.json_body import decode_json_fast
from moesaic.serve.keys import ANONYMOUS

MESSAGE_BYTES = 16 << 20
"""Maximum size of a worker's message in bytes."""
MAX_WAIT_SECONDS = 25.0
"""Maximum duration of a worker's long poll for work, in seconds."""
MAX_NAME_CHARS = 128


def endpoints(gateway: Gateway) -> tuple[Endpoint, ...]:
    """Return the routes of a gateway for workers and for its jobs."""
    workers, jobs = _WorkerRoutes(gateway.leases), _JobRoutes(gateway)

    def route(path: str, run: Any, body: Any, summary: str, decode: Any = None) -> Endpoint:
        summary = f"Workers: {summary}"
        return Endpoint(
            path, run, openai_failure, body=body, worker=True, body_bytes=MESSAGE_BYTES, decode=decode, summary=summary
        )

    return (
        route("/worker/register", workers.register, wire.RegisterRequest, "register a worker."),
        route("/worker/lease", workers.lease, wire.LeaseRequest, "wait for jobs, cancellations and queries."),
        route("/worker/renew", workers.renew, wire.RenewRequest, "renew leases."),
        route("/worker/events", workers.events, wire.EventsRequest, "send new events of jobs.", decode_json_fast),
        route("/worker/finish", workers.finish, wire.FinishRequest, "finish a job."),
        route("/worker/answer", workers.answer, wire.AnswerRequest, "answer a query."),
        route("/worker/release", workers.release, wire.ReleaseRequest, "give leases back."),
        Endpoint("/v1/jobs/{id}", jobs.show, openai_failure, method="GET", summary="Progress of a job."),
        Endpoint("/v1/jobs/{id}", jobs.cancel, openai_failure, method="DELETE", summary="Cancel a job."),
        Endpoint(
            "/v1/jobs/{id}/events",
            jobs.events,
            openai_failure,
            sse.openai_broken,
            method="GET",
            summary="All events of a job.",
        ),
    )


def _worker_name(context: RequestContext, name: str) -> str:
    """Return a worker's full name. It begins with its API key's name, so no key can use another key's workers."""
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise InvalidParameter("name", f"is {name!r:.40}, expected up to {MAX_NAME_CHARS} printable characters")
    return name if context.key is ANONYMOUS else f"{context.key.name}/{name}"


def _lease_tokens(claims: tuple[wire.LeaseClaim, ...]) -> list[LeaseToken]:
    return [LeaseToken(job_id, fence) for job_id, fence in claims]


class _WorkerRoutes:
    """Routes of the worker protocol."""

    def __init__(self, leases: LeaseManager) -> None:
        self._leases = leases

    async def register(self, context: RequestContext) -> AnyResponse:
        message: wire.RegisterRequest = context.body
        refused = {model.name for model in message.models} - set(context.key.models) if context.key.models else set()
        if refused:
            raise Forbidden(f"this worker's API key may not offer {', '.join(sorted(refused)):.100}")
        if not message.models:
            raise InvalidParameter("models", "is empty, expected at least one model")
        if message.slots < 1:
            raise InvalidParameter("slots", f"is {message.slots}, expected at least 1")
        info = WorkerInfo(
            name=_worker_name(context, message.name),
            models=message.models,
            slots=message.slots,
            about=message.about,
            owner=context.key.name,
            instance=message.instance,
            answers_queries=message.answers_queries,
        )
        acknowledged = await self._leases.register(info, _lease_tokens(message.leases))
        lease_seconds = self._leases.lease_seconds
        return Response(wire.RegisterResponse(lease_seconds * RENEW_FRACTION, lease_seconds, dict(acknowledged)))

    async def lease(self, context: RequestContext) -> AnyResponse:
        message: wire.LeaseRequest = context.body
        name = _worker_name(context, message.name)
        wait_seconds = min(max(0.0, message.wait_seconds), MAX_WAIT_SECONDS)
        try:
            assignment = await self._leases.lease(name, message.free_slots, wait_seconds)
        except asyncio.CancelledError:
            self._leases.on_disconnect(name)
            raise
        leases = [
            wire.LeasedJob(
                lease.job.id,
                lease.fence,
                lease.job.kind,
                lease.job.model,
                msgspec.Raw(lease.job.body),
                [event for record in lease.log for event in wire.unpack_events(record.blob)],
            )
            for lease in assignment.leases
        ]
        queries = [
            wire.QueryMessage(query.id, query.kind, query.model, msgspec.Raw(query.body))
            for query in assignment.queries
        ]
        return Response(wire.LeaseResponse(leases, list(assignment.cancel), queries))

    async def renew(self, context: RequestContext) -> AnyResponse:
        message: wire.RenewRequest = context.body
        name = _worker_name(context, message.name)
        states = await self._leases.renew(name, _lease_tokens(message.leases), message.stats)
        return Response(wire.RenewResponse(dict(states)))

    async def events(self, context: RequestContext) -> AnyResponse:
        message: wire.EventsRequest = context.body
        batches = {LeaseToken(batch.id, batch.fence): (batch.start, batch.events) for batch in message.batches}
        acknowledged = await self._leases.append_events(_worker_name(context, message.name), batches)
        return Response(wire.EventsResponse(dict(acknowledged)))

    async def finish(self, context: RequestContext) -> AnyResponse:
        message: wire.FinishRequest = context.body
        name = _worker_name(context, message.name)
        lease_token = LeaseToken(message.id, message.fence)
        error = wire.to_error(message.error) if message.error else None
        accepted = await self._leases.finish(name, lease_token, message.start, message.events, message.outcome, error)
        return Response(wire.FinishResponse(accepted))

    async def answer(self, context: RequestContext) -> AnyResponse:
        message: wire.AnswerRequest = context.body
        error = wire.to_error(message.error) if message.error else None
        await self._leases.answer_query(_worker_name(context, message.name), message.id, message.outcome, error)
        return Response({})

    async def release(self, context: RequestContext) -> AnyResponse:
        message: wire.ReleaseRequest = context.body
        name = _worker_name(context, message.name)
        await self._leases.release(name, _lease_tokens(message.leases), leaving=message.unregister)
        if message.unregister:
            await self._leases.unregister(name)
        return Response({})


class _JobRoutes:
    """Routes with which clients follow and cancel their jobs."""

    def __init__(self, jobs: JobService) -> None:
        self._jobs = jobs

    async def show(self, context: RequestContext) -> AnyResponse:
        progress = await self._jobs.progress(context.path_parameters["id"], context.key.name)
        return Response(
            {
                "id": progress.id,
                "object": "job",
                "model": progress.model,
                "state": progress.state,
                "queue_position": progress.queue_position,
                "estimate": progress.estimate,
                "texts": progress.texts,
                "tokens": progress.tokens,
                "error": wire.error_info(progress.error) if progress.error else None,
            }
        )

    async def cancel(self, context: RequestContext) -> AnyResponse:
        job_id = context.path_parameters["id"]
        state = await self._jobs.cancel(job_id, context.key.name)
        return Response({"id": job_id, "object": "job", "state": state})

    async def events(self, context: RequestContext) -> AnyResponse:
        """Stream the numbered events of a job as JSON. ``Last-Event-ID`` resumes after the event with that number."""
        last = context.header(b"last-event-id") or ""
        after = int(last) if last.isascii() and last.isdigit() and len(last) < 10 else -1
        subscription = await self._jobs.follow(context.path_parameters["id"], context.key.name)
        context.running.append(subscription)

        async def frames() -> AsyncIterator[bytes]:
            number = 0
            async for event in subscription:
                if number > after:
                    yield b"id: %d\ndata: %b\n\n" % (number, msgspec.json.encode(event))
                number += 1
            yield b"data: [DONE]\n\n"

        return EventStream(frames())
