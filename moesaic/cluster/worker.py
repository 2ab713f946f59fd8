"""A worker: it dials out to a gateway, keeps its model full with jobs, and sends what comes as it comes.

It needs no open port. What it computes is kept until the gateway has it on disk, so that a gateway may die and come
back, or another take its place. Knows a door, jobs and the worker protocol. Does not know models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp
import msgspec

from moesaic.backend import Backend, Event, join
from moesaic.cluster import protocol as wire
from moesaic.cluster.desk import LEASE_SECONDS, RENEWS, STALL_SECONDS
from moesaic.cluster.resume import Told
from moesaic.cluster.work import Work
from moesaic.errors import (
    Conflict,
    EngineStopped,
    Forbidden,
    InvalidRequest,
    MoesaicError,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthorized,
    Unavailable,
)

log = logging.getLogger("moesaic.worker")

T = TypeVar("T")

PACE = 0.02
"""Seconds between two messages with events, at least."""
WAIT = 20.0
"""Seconds that a question for work stays open."""
PATIENCE = 6
"""After so many leases' time without a gateway, what was leased is somebody else's, and is not computed further."""
MESSAGE_BYTES = 8 << 20
"""Of a message to a gateway, about; it takes twice as many."""
TROUBLE = (aiohttp.ClientError, TimeoutError, OSError)
PASSING = (NotFound, Unavailable, Conflict, Overloaded, *TROUBLE)
"""What ends a connection, and is tried again."""
BLAMELESS = (Overloaded, Unavailable)
"""Errors that are this worker's affair and not the job's: it is given back."""


class Worker:
    """Does jobs of gateways until it is told to stop."""

    def __init__(
        self,
        backend: Backend,
        gateways: Sequence[str],
        *,
        name: str,
        key: str | None = None,
        slots: int = 16,
        about: Mapping[str, Any] | None = None,
        ssl: Any = True,
        stall_seconds: float = STALL_SECONDS,
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
            stall_seconds: with work and no step for so long, the engine is given up.
        """
        self._backend, self._gateways, self._name, self._slots = backend, list(gateways), name, slots
        self._about, self._ssl, self._stall_seconds = dict(about or {}), ssl, stall_seconds
        self._run = secrets.token_hex(8)
        self._trouble = ""  # why the last connection was lost
        self._headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        self._works: dict[str, Work] = {}
        self._owed: set[wire.Claim] = set()  # to be given back, until a gateway has heard it
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
                self.stopped.set()
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
            self._owed.update(work.claim for work in self._works.values())
            await self._give_back(leave=True)
        self.stopped.set()

    # The connection

    async def _serve(self) -> None:
        tries = 0
        while True:
            for url in self._gateways:
                if self._leaving:  # the gateway, which has let it go, would have a worker that never comes
                    await self.stopped.wait()
                    return
                self._url = url.rstrip("/")
                try:
                    await self._enlist()
                    tries = 0
                    await self._together(self._fetch(), self._send(), self._renew())
                except PASSING as error:
                    if not self._draining:  # it has left, and is not known any more
                        self._lost(error)
                self.connected.clear()
                if self.stopped.is_set():  # an error in a group hides that it was cancelled at the same time
                    return
            tries = min(tries + 1, 10)
            await asyncio.sleep(random.uniform(0.05, min(10.0, 0.1 * 2**tries)))  # full jitter

    def _lost(self, error: BaseException) -> None:
        """Say why there is no connection; once, as long as it is the same."""
        why = f"{type(error).__name__}: {error}"[:300]
        log.log(
            logging.DEBUG if why == self._trouble else logging.WARNING,
            "no gateway: trying again",
            extra={"url": self._url, "why": why},
        )
        self._trouble = why

    async def _together(self, *work: Coroutine[Any, Any, None]) -> None:
        """Do several things for ever; the first error ends them all."""
        try:
            async with asyncio.TaskGroup() as group:
                for each in work:
                    group.create_task(each)
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    async def _post(self, what: str, message: Any, kind: type[T], seconds: float = 0.0) -> T:
        timeout = aiohttp.ClientTimeout(total=seconds or self._patience / PATIENCE / 2 + 2, sock_connect=5)
        body = msgspec.json.encode(message)
        url = f"{self._url}/worker/{what}"
        async with self._http.post(url, data=body, timeout=timeout, ssl=self._ssl) as answer:
            said = await answer.read()
            if answer.status != 200:
                raise _refusal(answer.status, said)
        try:
            return wire.decoded(msgspec.json.Decoder(kind), said)
        except InvalidRequest as error:
            raise Unavailable(f"{url} is no gateway, or something between has changed its answer") from error

    async def _enlist(self) -> None:
        cards = tuple(card for card in self._backend.models() if card.state != "failed")
        works = list(self._works.values())
        for work in works:
            work.ending = False  # whoever was about to tell it went with the connection, perhaps before he began
        claims = tuple(work.claim for work in works)
        said = await self._post(
            "enlist", wire.Enlist(self._name, cards, self._slots, self._about, claims, self._run), wire.Enlisted
        )
        self._renew_seconds, self._answered = said.renew_seconds, time.monotonic()
        self._patience = said.lease_seconds * PATIENCE
        self._learn(works, said.known)
        self._trouble = ""
        self.connected.set()
        self._dirty.set()
        log.info("enlisted", extra={"url": self._url, "models": [card.name for card in cards]})

    async def _fetch(self) -> None:
        while True:
            want = wire.Want(self._name, 0 if self._draining else self._slots, WAIT)
            given = await self._post("lease", want, wire.Given, WAIT + 10)
            for id in given.stop:
                self._stop(id)
            if self._draining and given.leases:  # given in the same moment
                self._owed.update((lease.id, lease.fence) for lease in given.leases)
                await self._give_back()
                continue
            for lease in given.leases:
                self._begin(lease)

    async def _renew(self) -> None:
        while True:
            await self._give_back()
            works = list(self._works.values())
            claims = tuple(work.claim for work in works)
            said = await self._post("renew", wire.Renew(self._name, claims, dict(self._backend.stats())), wire.Renewed)
            self._answered = time.monotonic()
            for work in works:
                if said.held.get(work.lease.id) != "ok" and self._works.get(work.lease.id) is work:
                    self._stop(work.lease.id)
            await asyncio.sleep(self._renew_seconds)

    async def _send(self) -> None:
        """Send events as they come, those of all jobs together, and the ends each on its own."""
        async with asyncio.TaskGroup() as ends:
            sent = -PACE
            while True:
                await self._dirty.wait()
                await asyncio.sleep(max(0.0, sent + PACE - time.monotonic()))  # 0: the others have theirs, too, then
                self._dirty.clear()
                sent = time.monotonic()
                for work in list(self._works.values()):
                    if work.over and not work.ending and work.fits(MESSAGE_BYTES):
                        work.ending = True
                        ends.create_task(self._end(work))
                if parts := self._parts():
                    works = [self._works[part.id] for part in parts]
                    known = await self._post("tokens", wire.Tokens(self._name, parts), wire.Known)
                    self._learn(works, known.known)

    def _parts(self) -> list[wire.Part]:
        """Return what is to be sent next, of all jobs together; the rest comes after it."""
        parts, room = [], MESSAGE_BYTES
        for work in self._works.values():
            if work.ending or not work.unsent():
                continue
            part, size = work.part(room)
            if not part.events and room == MESSAGE_BYTES:
                work.fail(TooLarge("a part of the answer is larger than a message may be: ask for fewer figures"))
            if part.events:
                parts.append(part)
                room -= size
            if len(part.events) < len(work.unsent()) or work.over:
                self._dirty.set()
        return parts

    async def _end(self, work: Work) -> None:
        done = wire.Done(self._name, *work.claim, work.known, work.unsent(), work.outcome, work.error)
        if len(msgspec.json.encode(done)) >= 2 * MESSAGE_BYTES:
            work.fail(TooLarge("what was asked for is larger than a message may be: ask for less at a time"))
            done = wire.Done(self._name, *work.claim, work.known, [], None, work.error)
        said = await self._post("done", done, wire.Counted)
        self._forget(work)
        what = "a job is done" if said.counted else "a result came too late"
        log.debug(what, extra={"job": work.lease.id, "fence": work.lease.fence})

    def _learn(self, asked: Sequence[Work], known: Mapping[str, tuple[int, int] | None]) -> None:
        """Take in what is known of these; one that has been leased anew since they were asked about is another."""
        for work in asked:
            if self._works.get(work.lease.id) is work:
                how_far = known.get(work.lease.id)
                if how_far is None:
                    self._stop(work.lease.id)
                else:
                    work.acknowledge(*how_far)

    def _forget(self, work: Work) -> None:
        if self._works.get(work.lease.id) is work:
            del self._works[work.lease.id]

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
        request = wire.unpack_ask(bytes(work.lease.body))
        told = Told(wire.from_wire(each) for each in work.lease.log)
        if told.ended(request.sampling.get("n") or 1):  # the last worker died between the last word and its "done"
            return
        answers = await self._backend.generate(told.asked(request))
        try:
            async for event in answers:
                self._tell(work, told, join([event, *answers.ready()]))
        finally:
            answers.cancel()

    def _tell(self, work: Work, told: Told, events: list[Event]) -> None:
        fresh = [wire.to_wire(new) for event in events if (new := told.fresh(event)) is not None]
        if fresh:
            work.events += fresh
            self._dirty.set()

    async def _other(self, lease: wire.Leased) -> Any:
        backend, body = self._backend, bytes(lease.body)
        if lease.kind == "tokenize":
            return await backend.tokenize(wire.unpack_ask(body))
        given = msgspec.json.decode(body)
        if lease.kind == "detokenize":
            return await backend.detokenize(lease.model, given)
        if lease.kind == "embed":
            return await backend.embed(lease.model, given)
        if lease.kind == "classify":
            return await backend.classify(lease.model, given)
        raise InvalidRequest(f"this worker does not know how to {lease.kind:.20}")

    async def _abandon(self, works: Sequence[Work]) -> None:
        """Do no more for these jobs, and give them back."""
        for work in works:
            self._forget(work)
            if work.task is not None and work.task is not asyncio.current_task():
                work.task.cancel()
            self._owed.add(work.claim)
        with contextlib.suppress(MoesaicError, *TROUBLE):  # else it is told with the next renewal
            await self._give_back()

    async def _give_back(self, *, leave: bool = False) -> None:
        owed = tuple(self._owed)
        if owed or leave:
            await self._post("release", wire.Release(self._name, owed, leave=leave), dict)
            self._owed.difference_update(owed)

    async def _watch(self) -> None:
        """See whether the engine still moves, and whether anybody still waits for what it does."""
        while True:
            await asyncio.sleep(1)
            now, load = time.monotonic(), self._backend.stats().values()
            if any(not each.alive for each in load):
                raise EngineStopped("the engine has died: start the worker again")
            steps = sum(each.steps for each in load)
            if steps != self._stepped[1] or not any(each.running for each in load):
                self._stepped = now, steps
            if now - self._stepped[0] > self._stall_seconds:
                raise EngineStopped(
                    f"the engine has made no step for {self._stall_seconds:g} s: start the worker again"
                )
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
