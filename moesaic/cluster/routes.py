"""The gateway's own routes: for workers, and for clients who come back for what they asked.

docs/cluster.md has the protocol. Knows HTTP and messages. Does not know what becomes of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from moesaic.cluster import wire
from moesaic.cluster.gateway import Gateway
from moesaic.cluster.jobs import LeaseToken
from moesaic.cluster.protocols import RENEW_FRACTION, WorkerInfo
from moesaic.errors import Forbidden, InvalidParameter
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.exchange import AnyResponse, Endpoint, EventStream, RequestContext, Response
from moesaic.serve.json_body import decode_json_fast
from moesaic.serve.keys import NOBODY

MESSAGE_BYTES = 16 << 20
"""Of one message of a worker."""
MAX_WAIT_SECONDS = 25.0
"""Seconds that a worker's question stays open."""
MAX_NAME_CHARS = 128


def endpoints(gateway: Gateway) -> tuple[Endpoint, ...]:
    """Return the routes of a gateway."""
    crew, jobs = _WorkerRoutes(gateway), _JobRoutes(gateway)

    def route(path: str, run: Any, body: Any, summary: str, decode: Any = None) -> Endpoint:
        summary = f"Workers: {summary}"
        return Endpoint(
            path, run, openai.failure, body=body, worker=True, body_bytes=MESSAGE_BYTES, decode=decode, summary=summary
        )

    return (
        route("/worker/enlist", crew.register, wire.RegisterRequest, "offer yourself."),
        route("/worker/lease", crew.lease, wire.LeaseRequest, "wait for something to do, or to stop."),
        route("/worker/renew", crew.renew, wire.RenewRequest, "keep what you have."),
        route("/worker/tokens", crew.tokens, wire.EventsRequest, "send what has come.", decode_json_fast),
        route("/worker/done", crew.done, wire.FinishRequest, "end a job."),
        route("/worker/release", crew.release, wire.ReleaseRequest, "give back what you have."),
        Endpoint("/v1/jobs/{id}", jobs.show, openai.failure, method="GET", summary="How far a job is."),
        Endpoint("/v1/jobs/{id}", jobs.withdraw, openai.failure, method="DELETE", summary="Take a job back."),
        Endpoint(
            "/v1/jobs/{id}/events",
            jobs.events,
            openai.failure,
            openai.broken,
            method="GET",
            summary="A job's events, all of them.",
        ),
    )


def _name(call: RequestContext, name: str) -> str:
    """Return a worker's name, which is its key's own: no worker can speak for another key's."""
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise InvalidParameter("name", f"is {name!r:.40}, expected up to {MAX_NAME_CHARS} printable characters")
    return name if call.key is NOBODY else f"{call.key.name}/{name}"


def _lease_tokens(claims: tuple[wire.LeaseClaim, ...]) -> list[LeaseToken]:
    return [LeaseToken(id, fence) for id, fence in claims]


class _WorkerRoutes:
    """What workers ask."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def register(self, call: RequestContext) -> AnyResponse:
        said: wire.RegisterRequest = call.body
        refused = {card.name for card in said.cards} - set(call.key.models) if call.key.models else set()
        if refused:
            raise Forbidden(f"this key may not offer {', '.join(sorted(refused)):.100}")
        if not said.cards or said.slots < 1:
            raise InvalidParameter(
                "cards" if said.slots > 0 else "slots", "a worker needs a model, and a slot for a job"
            )
        info = WorkerInfo(_name(call, said.name), said.cards, said.slots, said.about, call.key.name, said.run)
        known, lease = await self._gateway.register(info, _lease_tokens(said.leases)), self._gateway.lease_seconds
        return Response(wire.RegisterResponse(lease * RENEW_FRACTION, lease, dict(known)))

    async def lease(self, call: RequestContext) -> AnyResponse:
        said: wire.LeaseRequest = call.body
        name = _name(call, said.name)
        try:
            orders = await self._gateway.lease(name, said.free, min(max(0.0, said.wait), MAX_WAIT_SECONDS))
        except asyncio.CancelledError:
            self._gateway.disconnected(name)
            raise
        leases = [
            wire.LeasedJob(
                lease.job.id,
                lease.fence,
                lease.job.kind,
                lease.job.model,
                msgspec.Raw(lease.job.body),
                [wire.to_wire(event) for record in lease.log for event in wire.unpack_events(record.blob)],
            )
            for lease in orders.leases
        ]
        return Response(wire.LeaseResponse(leases, list(orders.stop)))

    async def renew(self, call: RequestContext) -> AnyResponse:
        said: wire.RenewRequest = call.body
        held = await self._gateway.renew(_name(call, said.name), _lease_tokens(said.leases), said.load)
        return Response(wire.RenewResponse(dict(held)))

    async def tokens(self, call: RequestContext) -> AnyResponse:
        said: wire.EventsRequest = call.body
        parts = {
            LeaseToken(part.id, part.fence): (part.start, [wire.from_wire(each) for each in part.events])
            for part in said.parts
        }
        return Response(wire.EventsResponse(dict(await self._gateway.take(_name(call, said.name), parts))))

    async def done(self, call: RequestContext) -> AnyResponse:
        said: wire.FinishRequest = call.body
        events = [wire.from_wire(each) for each in said.events]
        error = wire.to_error(said.error) if said.error else None
        lease_token = LeaseToken(said.id, said.fence)
        counted = await self._gateway.finish(
            _name(call, said.name), lease_token, said.start, events, said.outcome, error
        )
        return Response(wire.FinishResponse(counted))

    async def release(self, call: RequestContext) -> AnyResponse:
        said: wire.ReleaseRequest = call.body
        name = _name(call, said.name)
        await self._gateway.release(name, _lease_tokens(said.leases), leave=said.leave)
        if said.leave:
            await self._gateway.dismiss(name)
        return Response({})


class _JobRoutes:
    """What clients ask about what they asked."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def show(self, call: RequestContext) -> AnyResponse:
        progress = await self._gateway.progress(call.parameters["id"], call.key.name)
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

    async def withdraw(self, call: RequestContext) -> AnyResponse:
        id = call.parameters["id"]
        return Response({"id": id, "object": "job", "state": await self._gateway.withdraw(id, call.key.name)})

    async def events(self, call: RequestContext) -> AnyResponse:
        """Stream a job's events as the worker protocol writes them, numbered; ``Last-Event-ID`` goes on behind it."""
        last = call.header(b"last-event-id") or ""
        after = int(last) if last.isascii() and last.isdigit() and len(last) < 10 else -1
        following = await self._gateway.follow(call.parameters["id"], call.key.name)
        call.running.append(following)

        async def frames() -> AsyncIterator[bytes]:
            number = 0
            async for event in following:
                if number > after:
                    yield b"id: %d\ndata: %b\n\n" % (number, msgspec.json.encode(wire.to_wire(event)))
                number += 1
            yield b"data: [DONE]\n\n"

        return EventStream(frames())
