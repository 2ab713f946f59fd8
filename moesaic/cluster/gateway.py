"""The gateway: a door without a model. Requests become jobs in a store, workers do them, and their answers flow back.

Whoever asks waits at a ``Following``, whether the worker that answers came to this gateway or, with a shared
store, to another; nothing that was accepted is lost with any process. Knows jobs, workers' leases and events.
Does not know HTTP, nor how jobs are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from moesaic.backend import Delta, Finished, GenerationRequest, ModelInfo, ModelStats, PromptDone, TokenInfo
from moesaic.cluster import protocol
from moesaic.cluster.chores import whole
from moesaic.cluster.desk import LEASE_SECONDS, STALL_SECONDS, Progress
from moesaic.cluster.jobs import Depth, Job, Seen, State, Store
from moesaic.cluster.live import Following, Live
from moesaic.cluster.roster import Roster
from moesaic.cluster.saving import catch_up
from moesaic.errors import Cancelled, MoesaicError, NotFound, Overloaded, PoisonedJob, Unavailable

log = logging.getLogger("moesaic.cluster")

LOOK_SECONDS = 2.0
"""How often a job that another gateway's worker does, or nobody yet, is looked for in the store at the latest."""
GRACE_SECONDS = 60.0
"""How long a job whose client may come again is done for nobody."""
GUESSED_TOKENS = 512
"""What an answer without a bound is taken to cost."""


class Gateway(Roster):
    """See ``backend.Backend``, ``desk.Desk`` and ``desk.Labour``. Made on the loop that it answers on."""

    def __init__(
        self,
        store: Store,
        models: Sequence[str] = (),
        lease_seconds: float = LEASE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        """Offer what workers bring.

        Args:
            store: where jobs are kept.
            models: names that are known before a worker has come.
            lease_seconds: a lease that is not renewed for so long is lost.
            stall_seconds: so are those of a worker that has work and makes no step for so long.
        """
        super().__init__(store, lease_seconds, stall_seconds)
        for name in models:
            self.known[name] = ModelInfo(name, state="unloaded")
        self.depths: Mapping[str, Depth] = {}
        store.listen(self._on_news)
        self.always(0.0, self._follow_others)
        self.background(self._sweep())
        self.always(LOOK_SECONDS / 4, self._sweep)

    # The door

    def models(self) -> Sequence[ModelInfo]:
        return list(self.known.values())

    def stats(self) -> Mapping[str, ModelStats]:
        waiting = {name: ModelStats(waiting=depth.queued) for name, depth in self.depths.items()}
        return waiting | {
            name: replace(load, waiting=load.waiting + self.depths.get(name, Depth()).queued)
            for name, load in self.loads().items()
        }

    async def generate(self, request: GenerationRequest) -> Following:
        live, known = await self._submit("ask", request, protocol.pack_ask)
        live.once = bool(request.idempotency_key)
        return Following(live, lambda: self._left(live), known=known)

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        found = await self._done("tokenize", request, protocol.pack_ask)
        return msgspec.convert(found, list[TokenInfo])

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return str(await self._done("detokenize", GenerationRequest(model), lambda _: msgspec.json.encode(list(ids))))

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        found = await self._done("embed", GenerationRequest(model), lambda _: msgspec.json.encode(list(texts)))
        return msgspec.convert(found, tuple[list[list[float]], int])

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        found = await self._done("classify", GenerationRequest(model), lambda _: msgspec.json.encode(list(texts)))
        return msgspec.convert(found, list[Mapping[str, float]])

    async def close(self) -> None:
        await self.stop()
        await self.store.close()

    # Jobs come in

    def _card(self, name: str) -> ModelInfo:
        if not self.known:
            raise Unavailable("no worker has come yet: start one with `moesaic worker`, or try again later")
        if not name:
            return next(iter(self.known.values()))
        for card in self.known.values():
            if name == card.name or name in card.aliases:
                return card
        raise NotFound(f"there is no model {name!r:.120}")

    async def _submit(self, kind: str, request: GenerationRequest, pack: Any) -> tuple[Live, bool]:
        card = self._card(request.model)
        asked = replace(request, model=card.name, idempotency_key="", sampling=dict(request.sampling))
        digest = hashlib.sha256(kind.encode() + pack(asked)).hexdigest() if request.idempotency_key else ""
        if kind == "ask" and asked.sampling.get("seed") is None:  # so that another worker goes on as this one would
            asked = replace(asked, sampling={**asked.sampling, "seed": secrets.randbits(63)})
        job = Job(
            secrets.token_urlsafe(18),
            card.name,
            kind,
            pack(asked),
            request.tenant,
            _cost(request),
            request.priority,
            request.idempotency_key,
            digest,
        )
        self.lives[job.id] = live = self._new(job.id, card.name, request.tenant)
        try:
            id = await self.store.submit(job)
        except BaseException as error:
            del self.lives[job.id]
            left = isinstance(error, asyncio.CancelledError)
            if left and not request.idempotency_key:  # it may be there, and nobody knows of it
                self.background(self._unwanted(job.id))
            if isinstance(error, Overloaded | Unavailable) and error.retry_after is None:
                error.retry_after = self._patience()
            raise
        if id == job.id:
            self.wake_idle(card.name)
            return live, False
        del self.lives[job.id]
        return await self._find(id, request.tenant), True

    async def _unwanted(self, id: str) -> None:
        await self.store.cancel(id)

    def _new(self, id: str, model: str, tenant: str) -> Live:
        return Live(id, model, tenant, unread_since=self.clock(), submitted=time.time())

    def _patience(self) -> float:
        """Return in about how many seconds there may be room, so that not all come again at once."""
        queued = sum(depth.queued for depth in self.depths.values())
        wait = 0.1 * queued * self.seconds / max(1, self.slots())
        return max(1.0, min(60.0, wait)) * random.uniform(0.8, 1.4)

    async def _done(self, kind: str, request: GenerationRequest, pack: Any) -> Any:
        """Have something done that leaves no events, and return it."""
        live, _ = await self._submit(kind, request, pack)
        following = Following(live, lambda: self._left(live))
        try:
            async for _ in following:
                pass
        finally:
            following.cancel()
        return live.outcome

    def _left(self, live: Live) -> None:
        """Nobody waits for an answer any more; who may come again is given a moment."""
        if not live.readers:
            live.unread_since = self.clock()
            if not live.once and not live.ended:
                self.background(self._withdraw(live))

    async def revive(self, id: str, model: str) -> bool:
        """Queue a dead job again; return whether there was one."""
        revived = await self.store.revive(id)
        if revived:
            self.lives.pop(id, None)  # who asks from now on waits for its end, and is not told of its death
            self.wake_idle(model)
        return revived

    @whole
    async def _withdraw(self, live: Live) -> State:
        state = await self.store.cancel(live.id)
        if state == "cancelled":
            self.stop_job(live)
            live.end(error=Cancelled("the request was taken back"))
        return state or "cancelled"

    # The desk

    async def submit(self, request: GenerationRequest) -> str:
        live, _ = await self._submit("ask", request, protocol.pack_ask)
        live.once = True
        live.unread_since = float("inf")  # whoever comes back with a number comes in his own time
        return live.id

    async def follow(self, id: str, tenant: str) -> Following:
        live = await self._find(id, tenant)
        return Following(live, lambda: None, known=True)

    async def withdraw(self, id: str, tenant: str) -> State:
        return await self._withdraw(await self._find(id, tenant))

    async def progress(self, id: str, tenant: str) -> Progress:
        live = await self._find(id, tenant)
        seen = await self.store.look(id)
        if seen is None:
            raise NotFound(f"there is no job {id!r:.60}")
        count = 1 + max((event.index for event in live.events), default=0)
        texts, tokens = [""] * count, [0] * count
        ends = tuple(event for event in live.events if isinstance(event, Finished))
        for event in live.events:
            if isinstance(event, Delta):
                texts[event.index] += event.text
                tokens[event.index] += len(event.tokens)
        begun = (event.prompt_tokens for event in live.events if isinstance(event, PromptDone))
        slots = self.slots(live.model)
        wait = None if not slots else self.seconds * (1 + seen.ahead / slots)
        return Progress(
            id,
            live.model,
            seen.state,
            seen.ahead,
            0.0 if live.ended else wait,
            tuple(texts),
            tuple(tokens),
            next(begun, 0),
            ends if live.ended else (),
            live.error,
            live.submitted,
            live.begun,
            live.finished,
        )

    def workers(self, model: str) -> int:
        return sum(model in session.models for session in self.crew.values())

    async def _find(self, id: str, tenant: str) -> Live:
        """Return a job, from the store if it must be; another tenant's is not there."""
        live = self.lives.get(id)
        if live is None:
            seen = await self.store.look(id)
            if seen is None or seen.job.tenant != tenant:
                raise NotFound(f"there is no job {id!r:.60}")
            live = self.lives.setdefault(id, Live(id, seen.job.model, seen.job.tenant))
            live.once, live.unread_since = True, float("inf")
            await self._refresh(live)
        if live.tenant != tenant:
            raise NotFound(f"there is no job {id!r:.60}")
        return live

    # Jobs that are done elsewhere

    def _on_news(self, ids: Sequence[str]) -> None:
        """Something has changed in the store: see ``Store.listen``."""
        for id in ids:
            if not id:
                self.wake_idle()
            elif (live := self.lives.get(id)) and not live.ended and (self.store.shared or not live.worker):
                self.look_again([id])

    async def _follow_others(self) -> None:
        await self.looking.wait()
        self.looking.clear()
        while self.changed:
            live = self.lives.get(self.changed.pop())
            if live is not None:
                with contextlib.suppress(Unavailable):
                    await self._refresh(live)

    async def _refresh(self, live: Live) -> None:
        """Catch up with the store."""
        live.looked_at = self.clock()
        seen = await self.store.look(live.id)
        if seen is None:
            live.end(error=NotFound("the job was dropped"))
            return
        ended = seen.state not in ("queued", "leased")
        if seen.logged > live.kept and (ended or not live.worker):
            catch_up(live, await self.store.log(live.id, live.kept))
        if ended and not live.ended:
            live.cut(seen.logged)
            self.stop_job(live)
            conclude(live, seen)

    async def _sweep(self) -> None:
        """Look for what nobody told of, and forget what nobody needs."""
        now = self.clock()
        self.depths = await self.store.depths()
        self.suspects = {model for model, depth in self.depths.items() if depth.suspects}
        for model in self.depths.keys() - self.known.keys():  # it was offered to the gateway that was here before
            self.known[model] = ModelInfo(model, state="unloaded")
        old = [live for live in self.lives.values() if not live.worker and now - live.looked_at > LOOK_SECONDS]
        for live in old:
            if live.ended and not live.readers:
                del self.lives[live.id]
            elif not live.ended and not live.readers and live.unread_since + GRACE_SECONDS < now:
                if self.store.shared:  # whoever left here may be reading at another gateway
                    del self.lives[live.id]
                else:
                    self.background(self._withdraw(live))
            elif not live.ended and live.readers and (self.store.shared or live.begun):
                self.look_again([live.id])


def conclude(live: Live, seen: Seen) -> None:
    """Tell those who follow a job how it ended."""
    if seen.state == "cancelled":
        live.end(error=Cancelled("the request was taken back"))
        return
    if seen.state == "dead":
        live.end(error=PoisonedJob("every worker that had this request died of it: it is not tried again"))
        return
    result = msgspec.json.decode(seen.result, type=protocol.Result) if seen.result else protocol.Result()
    error: MoesaicError | None = protocol.error_of(result.error) if result.error else None
    live.end(result.outcome, error)


def _cost(request: GenerationRequest) -> int:
    """Return about how many tokens a request may take."""
    if isinstance(request.prompt, str):
        read = len(request.prompt) // 4
    elif request.prompt is not None:
        read = len(request.prompt)
    else:
        read = sum(len(str(message.get("content", ""))) for message in request.messages or ()) // 4
    most = request.sampling.get("max_tokens")
    count = request.sampling.get("n")
    return 1 + read + (most if isinstance(most, int) else GUESSED_TOKENS) * (count if isinstance(count, int) else 1)
