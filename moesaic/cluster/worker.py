"""A worker: it dials out to a gateway, keeps its model full with jobs, and sends what comes as it comes.

It needs no open port. What it computes is kept until the gateway has it on disk, so that a gateway may die and come
back, or another take its place. Knows a door, jobs and the worker protocol. Does not know models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import aiohttp
import msgspec

from moesaic.cluster import protocol as wire
from moesaic.cluster.desk import LEASE_SECONDS, RENEWS, STALL_SECONDS
from moesaic.cluster.resume import Told
from moesaic.door import Door, Event
from moesaic.errors import (
    Conflict,
    EngineStopped,
    Forbidden,
    MoesaicError,
    NotFound,
    Overloaded,
    Unauthorized,
    Unavailable,
)

log = logging.getLogger("moesaic.worker")

T = TypeVar("T")

PACE = 0.02
"""Seconds in which events are gathered before they are sent."""
WAIT = 20.0
"""Seconds that a question for work stays open."""
PATIENCE = 6
"""After so many leases' time without a gateway, what was leased is somebody else's, and is not computed further."""
KEPT_BYTES = 4 << 20
"""What is kept of one job's events, about, before those that the gateway has on disk are dropped."""
EVENT_BYTES = 64
"""What an event takes, about."""
TROUBLE = (aiohttp.ClientError, TimeoutError, OSError)
BLAMELESS = (Overloaded, Unavailable)
"""Errors that are this worker's affair and not the job's: it is given back."""


@dataclass(eq=False)
class Work:
    """A job that is being done."""

    lease: wire.Leased
    events: list[wire.Wire] = field(default_factory=list)
    first: int = 0
    """The number of the first of them in the job's log."""
    known: int = 0
    """Up to which number the gateway has them."""
    over: bool = False
    """Whether nothing more comes."""
    outcome: Any = None
    error: wire.Fault | None = None
    ending: bool = False
    """Whether the end is being told."""
    task: asyncio.Task[None] | None = None

    @property
    def claim(self) -> wire.Claim:
        return self.lease.id, self.lease.fence

    def unsent(self) -> list[wire.Wire]:
        return self.events[self.known - self.first :]

    def acknowledge(self, known: int, kept: int) -> None:
        """The gateway has events up to the first number, on disk up to the second."""
        self.known = max(self.first, known)
        if kept > self.first and len(self.events) * EVENT_BYTES > KEPT_BYTES:
            del self.events[: kept - self.first]
            self.first = kept


class Worker:
    """Does jobs of gateways until it is told to stop."""

    def __init__(
        self,
        door: Door,
        gateways: Sequence[str],
        *,
        name: str,
        key: str | None = None,
        slots: int = 16,
        about: Mapping[str, Any] | None = None,
        ssl: Any = True,
    ) -> None:
        """Prepare.

        Args:
            door: whose models do the work.
            gateways: URLs; the first that answers is taken, the next when it does not answer any more.
            name: unique among a gateway's workers of the same key.
            key: a worker's key.
            slots: jobs at once.
            about: shown to administrators.
            ssl: what aiohttp checks certificates with.
        """
        self._door, self._gateways, self._name, self._slots = door, list(gateways), name, slots
        self._about, self._ssl = dict(about or {}), ssl
        self._headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        self._works: dict[str, Work] = {}
        self._dirty = asyncio.Event()
        self._renew_seconds, self._patience, self._url = LEASE_SECONDS * RENEWS, LEASE_SECONDS * PATIENCE, ""
        self._draining = self._leaving = False
        self._answered = time.monotonic()  # when a gateway last renewed what is here
        self._stepped = (time.monotonic(), -1)
        self.stopped = asyncio.Event()
        """Set when it is to end at once."""
        self.connected = asyncio.Event()
        """Set while a gateway knows it."""

    async def run(self) -> None:
        """Work until stopped.

        Raises:
            Unauthorized, Forbidden: the gateway does not want this worker.
            EngineStopped: the model has died or stands still; nothing can be done with it any more.
        """
        async with aiohttp.ClientSession(headers=self._headers) as session:
            self._http = session
            tasks = [asyncio.ensure_future(work) for work in (self._serve(), self._watch(), self.stopped.wait())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for id in list(self._works):  # leases end with the connection; after a drain there are none
                    self._stop(id)

    async def drain(self, seconds: float) -> None:
        """Take nothing new, end what runs within so many seconds, give the rest back, and stop."""
        self._draining = True
        until = time.monotonic() + seconds
        while self._works and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self._leaving = True
        with contextlib.suppress(MoesaicError, *TROUBLE):
            claims = tuple(work.claim for work in self._works.values())
            await self._post("release", wire.Release(self._name, claims, leave=True), dict)
        self.stopped.set()

    # The connection

    async def _serve(self) -> None:
        tries = 0
        while True:
            for url in self._gateways:
                # The gateway has let it go; and a task group whose work fails swallows what cancels it meanwhile.
                if self._leaving or self.stopped.is_set():
                    await self.stopped.wait()
                    return
                self._url = url.rstrip("/")
                with contextlib.suppress(NotFound, Unavailable, Conflict, Overloaded, *TROUBLE):
                    await self._enlist()
                    tries = 0
                    await self._together(self._fetch(), self._send(), self._renew())
                self.connected.clear()
            tries += 1
            await asyncio.sleep(random.uniform(0.05, min(10.0, 0.1 * 2**tries)))  # full jitter

    async def _together(self, *work: Coroutine[Any, Any, None]) -> None:
        """Do several things for ever; the first error ends them all."""
        try:
            async with asyncio.TaskGroup() as group:
                for each in work:
                    group.create_task(each)
        except BaseExceptionGroup as errors:
            first = _first(errors)
            log.info("the gateway was lost", extra={"url": self._url, "why": repr(first)[:200]})
            raise first from None

    async def _post(self, what: str, message: Any, kind: type[T], seconds: float = 10.0) -> T:
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=5)
        body = msgspec.json.encode(message)
        url = f"{self._url}/worker/{what}"
        async with self._http.post(url, data=body, timeout=timeout, ssl=self._ssl) as answer:
            said = await answer.read()
            if answer.status != 200:
                raise _refusal(answer.status, said)
            return wire.decoded(msgspec.json.Decoder(kind), said)

    async def _enlist(self) -> None:
        cards = tuple(card for card in self._door.cards() if card.state != "failed")
        claims = tuple(work.claim for work in self._works.values())
        said = await self._post(
            "enlist", wire.Enlist(self._name, cards, self._slots, self._about, claims), wire.Enlisted
        )
        self._renew_seconds, self._answered = said.renew_seconds, time.monotonic()
        self._patience = said.lease_seconds * PATIENCE
        self._learn(said.known)
        self.connected.set()
        self._dirty.set()
        log.info("enlisted", extra={"url": self._url, "models": [card.name for card in cards]})

    async def _fetch(self) -> None:
        while True:
            want = wire.Want(self._name, 0 if self._draining else self._slots, WAIT)
            given = await self._post("lease", want, wire.Given, WAIT + 10)
            for id in given.stop:
                self._stop(id)
            for lease in given.leases:
                self._begin(lease)

    async def _renew(self) -> None:
        while True:
            claims = tuple(work.claim for work in self._works.values())
            said = await self._post("renew", wire.Renew(self._name, claims, dict(self._door.load())), wire.Renewed)
            self._answered = time.monotonic()
            for id, held in said.held.items():
                if held != "ok":
                    self._stop(id)
            await asyncio.sleep(self._renew_seconds)

    async def _send(self) -> None:
        """Send events as they come, those of all jobs together, and the ends each on its own."""
        async with asyncio.TaskGroup() as ends:
            while True:
                await self._dirty.wait()
                await asyncio.sleep(PACE)
                self._dirty.clear()
                for work in list(self._works.values()):
                    if work.over and not work.ending:
                        work.ending = True
                        ends.create_task(self._end(work))
                parts = [
                    wire.Part(*work.claim, work.known, work.unsent())
                    for work in self._works.values()
                    if not work.over and work.unsent()
                ]
                if parts:
                    self._learn((await self._post("tokens", wire.Tokens(self._name, parts), wire.Known)).known)

    async def _end(self, work: Work) -> None:
        done = wire.Done(self._name, *work.claim, work.known, work.unsent(), work.outcome, work.error)
        try:
            said = await self._post("done", done, wire.Counted)
        except BaseException:
            work.ending = False
            raise
        self._works.pop(work.lease.id, None)
        what = "a job is done" if said.counted else "a result came too late"
        log.debug(what, extra={"job": work.lease.id, "fence": work.lease.fence})

    def _learn(self, known: Mapping[str, tuple[int, int] | None]) -> None:
        for id, how_far in known.items():
            work = self._works.get(id)
            if how_far is None:
                self._stop(id)
            elif work is not None:
                work.acknowledge(*how_far)

    # Jobs

    def _begin(self, lease: wire.Leased) -> None:
        self._stop(lease.id)
        work = Work(lease, first=len(lease.log), known=len(lease.log))
        self._works[lease.id] = work
        work.task = asyncio.ensure_future(self._do(work))

    def _stop(self, id: str) -> None:
        work = self._works.pop(id, None)
        if work is not None and work.task is not None:
            work.task.cancel()

    async def _do(self, work: Work) -> None:
        try:
            if work.lease.kind == "ask":
                await self._answer(work)
            else:
                work.outcome = await self._other(work.lease)
        except BLAMELESS as error:
            log.warning("a job is given back", extra={"job": work.lease.id, "why": str(error)[:200]})
            await self._abandon([work])
            return
        except EngineStopped:  # it may be this very job's doing: ``_watch`` ends this worker, and its leases are lost
            return
        except Exception as error:
            if not isinstance(error, MoesaicError):
                log.exception("a job broke", extra={"job": work.lease.id})
            work.error = wire.fault(error)
        work.over = True
        self._dirty.set()

    async def _answer(self, work: Work) -> None:
        ask = wire.unpack_ask(bytes(work.lease.body))
        told = Told(wire.from_wire(each) for each in work.lease.log)
        if told.ended(ask.sampling.get("n") or 1):  # the last worker died between the last word and its "done"
            return
        answers = await self._door.ask(replace(ask, resume=told.resume()))
        try:
            async for event in answers:
                self._tell(work, told, [event, *answers.ready()])
        finally:
            answers.cancel()

    def _tell(self, work: Work, told: Told, events: list[Event]) -> None:
        fresh = [wire.to_wire(new) for event in events if (new := told.fresh(event)) is not None]
        if fresh:
            work.events += fresh
            self._dirty.set()

    async def _other(self, lease: wire.Leased) -> Any:
        door, body = self._door, bytes(lease.body)
        if lease.kind == "tokenize":
            return await door.tokenize(wire.unpack_ask(body))
        given = msgspec.json.decode(body)
        if lease.kind == "detokenize":
            return await door.detokenize(lease.model, given)
        if lease.kind == "embed":
            return await door.embed(lease.model, given)
        if lease.kind == "classify":
            return await door.classify(lease.model, given)
        raise Unavailable(f"this worker does not know how to {lease.kind:.20}")

    async def _abandon(self, works: Sequence[Work]) -> None:
        """Do no more for these jobs, and give them back if that can be told."""
        for work in works:
            self._works.pop(work.lease.id, None)
            if work.task is not None and work.task is not asyncio.current_task():
                work.task.cancel()
        if works:
            with contextlib.suppress(MoesaicError, *TROUBLE):
                await self._post("release", wire.Release(self._name, tuple(work.claim for work in works)), dict)

    async def _watch(self) -> None:
        """See whether the engine still moves, and whether anybody still waits for what it does."""
        while True:
            await asyncio.sleep(1)
            now, load = time.monotonic(), self._door.load().values()
            if any(not each.alive for each in load):
                raise EngineStopped("the engine has died: start the worker again")
            steps = sum(each.steps for each in load)
            if steps != self._stepped[1] or not any(each.running for each in load):
                self._stepped = now, steps
            if now - self._stepped[0] > STALL_SECONDS:
                raise EngineStopped(f"the engine has made no step for {STALL_SECONDS:g} s: start the worker again")
            if now - self._answered > self._patience and self._works:
                log.warning("no gateway for too long: what was leased is dropped", extra={"jobs": len(self._works)})
                for id in list(self._works):
                    self._stop(id)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group, however deep it lies."""
    found = errors.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def _refusal(status: int, said: bytes) -> MoesaicError:
    """Return the gateway's refusal as an error of the tree."""
    try:
        message = str(msgspec.json.decode(said)["error"]["message"])[:300]
    except (msgspec.DecodeError, KeyError, TypeError):
        message = f"the gateway answered {status}"
    kinds: dict[int, type[MoesaicError]] = {
        401: Unauthorized,
        403: Forbidden,
        404: NotFound,
        409: Conflict,
        429: Overloaded,
    }
    return kinds.get(status, Unavailable if status >= 500 else MoesaicError)(message)
