"""The gateway's own routes: for workers, and for clients who come back for what they asked.

docs/cluster.md has the protocol. Knows HTTP and messages. Does not know what becomes of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from moesaic.cluster import protocol as wire
from moesaic.cluster.desk import RENEWS, Recruit
from moesaic.cluster.gateway import Gateway
from moesaic.cluster.jobs import Hold
from moesaic.errors import Forbidden, InvalidParameter
from moesaic.serve import sse
from moesaic.serve.context import RequestContext
from moesaic.serve.endpoint import AnyResponse, Endpoint, EventStream, Response, openai_failure
from moesaic.serve.json_body import decode_json_fast
from moesaic.serve.keys import ANONYMOUS

MESSAGE_BYTES = 16 << 20
"""Of one message of a worker."""
LONGEST_WAIT = 25.0
"""Seconds that a worker's question stays open."""
LONGEST_NAME = 128


def endpoints(gateway: Gateway) -> tuple[Endpoint, ...]:
    """Return the routes of a gateway."""
    crew, jobs = _Crew(gateway), _Jobs(gateway)

    def route(path: str, run: Any, body: Any, summary: str, decode: Any = None) -> Endpoint:
        summary = f"Workers: {summary}"
        return Endpoint(
            path, run, openai_failure, body=body, worker=True, body_bytes=MESSAGE_BYTES, decode=decode, summary=summary
        )

    return (
        route("/worker/enlist", crew.enlist, wire.Enlist, "offer yourself."),
        route("/worker/lease", crew.lease, wire.Want, "wait for something to do, or to stop."),
        route("/worker/renew", crew.renew, wire.Renew, "keep what you have."),
        route("/worker/tokens", crew.tokens, wire.Tokens, "send what has come.", decode_json_fast),
        route("/worker/done", crew.done, wire.Done, "end a job."),
        route("/worker/release", crew.release, wire.Release, "give back what you have."),
        Endpoint("/v1/jobs/{id}", jobs.show, openai_failure, method="GET", summary="How far a job is."),
        Endpoint("/v1/jobs/{id}", jobs.withdraw, openai_failure, method="DELETE", summary="Take a job back."),
        Endpoint(
            "/v1/jobs/{id}/events",
            jobs.events,
            openai_failure,
            sse.openai_broken,
            method="GET",
            summary="A job's events, all of them.",
        ),
    )


def _name(context: RequestContext, name: str) -> str:
    """Return a worker's name, which is its key's own: no worker can speak for another key's."""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise InvalidParameter("name", f"is {name!r:.40}, expected up to {LONGEST_NAME} printable characters")
    return name if context.key is ANONYMOUS else f"{context.key.name}/{name}"


def _holds(claims: tuple[wire.Claim, ...]) -> list[Hold]:
    return [Hold(id, fence) for id, fence in claims]


class _Crew:
    """What workers ask."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def enlist(self, context: RequestContext) -> AnyResponse:
        said: wire.Enlist = context.body
        refused = {card.name for card in said.cards} - set(context.key.models) if context.key.models else set()
        if refused:
            raise Forbidden(f"this key may not offer {', '.join(sorted(refused)):.100}")
        if not said.cards or said.slots < 1:
            raise InvalidParameter(
                "cards" if said.slots > 0 else "slots", "a worker needs a model, and a slot for a job"
            )
        recruit = Recruit(_name(context, said.name), said.cards, said.slots, said.about, context.key.name, said.run)
        known, lease = await self._gateway.enlist(recruit, _holds(said.holds)), self._gateway.lease_seconds
        return Response(wire.Enlisted(lease * RENEWS, lease, dict(known)))

    async def lease(self, context: RequestContext) -> AnyResponse:
        said: wire.Want = context.body
        name = _name(context, said.name)
        try:
            orders = await self._gateway.lease(name, said.free, min(max(0.0, said.wait), LONGEST_WAIT))
        except asyncio.CancelledError:
            self._gateway.disconnected(name)
            raise
        leases = [
            wire.Leased(
                lease.job.id,
                lease.fence,
                lease.job.kind,
                lease.job.model,
                msgspec.Raw(lease.job.body),
                [wire.to_wire(event) for record in lease.log for event in wire.unpack_events(record.blob)],
            )
            for lease in orders.leases
        ]
        return Response(wire.Given(leases, list(orders.stop)))

    async def renew(self, context: RequestContext) -> AnyResponse:
        said: wire.Renew = context.body
        held = await self._gateway.renew(_name(context, said.name), _holds(said.holds), said.load)
        return Response(wire.Renewed(dict(held)))

    async def tokens(self, context: RequestContext) -> AnyResponse:
        said: wire.Tokens = context.body
        parts = {
            Hold(part.id, part.fence): (part.start, [wire.from_wire(each) for each in part.events])
            for part in said.parts
        }
        return Response(wire.Known(dict(await self._gateway.take(_name(context, said.name), parts))))

    async def done(self, context: RequestContext) -> AnyResponse:
        said: wire.Done = context.body
        events = [wire.from_wire(each) for each in said.events]
        error = wire.error_of(said.error) if said.error else None
        hold = Hold(said.id, said.fence)
        counted = await self._gateway.finish(_name(context, said.name), hold, said.start, events, said.outcome, error)
        return Response(wire.Counted(counted))

    async def release(self, context: RequestContext) -> AnyResponse:
        said: wire.Release = context.body
        name = _name(context, said.name)
        await self._gateway.release(name, _holds(said.holds), leave=said.leave)
        if said.leave:
            await self._gateway.dismiss(name)
        return Response({})


class _Jobs:
    """What clients ask about what they asked."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def show(self, context: RequestContext) -> AnyResponse:
        progress = await self._gateway.progress(context.path_parameters["id"], context.key.name)
        return Response(
            {
                "id": progress.id,
                "object": "job",
                "model": progress.model,
                "state": progress.state,
                "ahead": progress.ahead,
                "estimate": progress.estimate,
                "texts": progress.texts,
                "tokens": progress.tokens,
                "error": wire.fault(progress.error) if progress.error else None,
            }
        )

    async def withdraw(self, context: RequestContext) -> AnyResponse:
        id = context.path_parameters["id"]
        return Response({"id": id, "object": "job", "state": await self._gateway.withdraw(id, context.key.name)})

    async def events(self, context: RequestContext) -> AnyResponse:
        """Stream a job's events as the worker protocol writes them, numbered; ``Last-Event-ID`` goes on behind it."""
        last = context.header(b"last-event-id") or ""
        after = int(last) if last.isascii() and last.isdigit() and len(last) < 10 else -1
        following = await self._gateway.follow(context.path_parameters["id"], context.key.name)
        context.running.append(following)

        async def frames() -> AsyncIterator[bytes]:
            number = 0
            async for event in following:
                if number > after:
                    yield b"id: %d\ndata: %b\n\n" % (number, msgspec.json.encode(wire.to_wire(event)))
                number += 1
            yield b"data: [DONE]\n\n"

        return EventStream(frames())
