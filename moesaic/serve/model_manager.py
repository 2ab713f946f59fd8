"""One ``Backend`` for several models: each is loaded on demand, and unloaded when it is idle or its memory is needed.

This module knows the names, sizes and times of use of the models. Functions that load them are passed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from moesaic.backend import Backend, GenerationRequest, ModelInfo, ModelStats, ResponseStream, TokenInfo
from moesaic.errors import InvalidRequest, MoesaicError, NotFound, Unavailable
from moesaic.serve.model_entry import LoadedModel, ModelEntry, PlannedModel, UnloadReason
from moesaic.serve.pending_stream import PendingStream

log = logging.getLogger("moesaic.serve")

PATIENCE_SECONDS = 10.0
"""A request that waits longer than this for its model gets its stream at once, so that comments keep it open."""
DRAIN_POLL_SECONDS = 0.05
"""Time between two looks at a model that is unloaded when its answers have ended."""
SWEEPS = 10
"""Number of times, within the time limit of an idle model, that models are checked for idleness."""


class ModelManager:
    """A ``Backend`` for several models, which are loaded on demand. The first entry is the default model."""

    def __init__(
        self,
        entries: Sequence[ModelEntry],
        budget: int | None = None,
        *,
        idle_seconds: float | None = None,
        patience: float = PATIENCE_SECONDS,
        reclaim: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Manage these models.

        Args:
            entries: the models; the first is the default.
            budget: memory in bytes that loaded models may take together; None: no limit. A model that is larger
                than the budget is loaded when no other model is.
            idle_seconds: a model that has not been used for this time is unloaded; None: it stays.
            patience: seconds that ``generate`` waits for a model before it returns a stream that waits on.
            reclaim: returns the memory of a closed model to the system; it is called in a thread.
            clock: returns the monotonic time in seconds.
        """
        self._entries = {entry.info.name: entry for entry in entries}
        self._budget, self._idle_seconds, self._patience = budget, idle_seconds, patience
        self._reclaim, self.clock = reclaim, clock
        self._reserving = asyncio.Lock()
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def entries(self) -> Sequence[ModelEntry]:
        """Return the entries of all models, the default first."""
        return list(self._entries.values())

    @property
    def budget(self) -> int | None:
        """Return the memory in bytes that loaded models may take together; None: no limit."""
        return self._budget

    def models(self) -> Sequence[ModelInfo]:
        return [entry.current_info() for entry in self._entries.values()]

    def stats(self) -> Mapping[str, ModelStats]:
        return {
            name: next(iter(entry.loaded.backend.stats().values()))
            for name, entry in self._entries.items()
            if entry.loaded is not None
        }

    def entry(self, name: str) -> ModelEntry:
        """Return the entry of the model with this name or alias.

        Raises:
            NotFound: no model has this name or alias.
        """
        for entry in self._entries.values():
            if name == entry.info.name or name in entry.info.aliases:
                return entry
        raise NotFound(f"unknown model {name!r:.120}; available models: {', '.join(self._entries)}")

    # Start

    async def start(self) -> None:
        """Load the pinned models and the default one, and unload idle models from now on.

        Raises:
            InvalidRequest: the pinned models, or one model beside them, need more memory than the budget.
            MoesaicError: a model cannot be loaded.
        """
        if self._budget is not None:
            await self.plan_all()
            self._check_pinned(self._budget)
        for name, entry in self._entries.items():
            if entry.pinned:
                await self.load(name)
        await self.load(next(iter(self._entries)))
        if self._idle_seconds is not None:
            self._sweeper = asyncio.ensure_future(self._sweep_regularly(self._idle_seconds / SWEEPS))

    async def plan_all(self) -> None:
        """Plan all models now, so that errors are known and sizes do not depend on which models are loaded later.

        Raises:
            MoesaicError: a model cannot be loaded.
        """
        for entry in self._entries.values():
            await self._plan(entry)

    def _check_pinned(self, budget: int) -> None:
        sizes = {name: entry.plan.bytes for name, entry in self._entries.items() if entry.pinned and entry.plan}
        pinned = sum(sizes.values())
        if pinned > budget:
            each = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items())
            raise InvalidRequest(f"pinned models need {pinned / 1e9:.2f} GB ({each}); --memory is {budget / 1e9:g} GB")
        for name, entry in self._entries.items():
            if sizes and not entry.pinned and entry.plan and pinned + entry.plan.bytes > budget:
                raise InvalidRequest(
                    f"{name} needs {entry.plan.bytes / 1e9:.2f} GB, but the pinned models leave "
                    f"{(budget - pinned) / 1e9:.2f} of --memory {budget / 1e9:g} GB"
                )

    # Loading

    async def load(self, name: str) -> ModelEntry:
        """Load a model, unless it is loaded; return its entry.

        Raises:
            NotFound: no model has this name or alias.
            Unavailable: models that are busy or pinned take the memory that this model needs.
            MoesaicError: the model cannot be loaded.
        """
        entry = self.entry(name)
        async with self._use(entry):
            return entry

    @contextlib.asynccontextmanager
    async def _use(self, entry: ModelEntry) -> AsyncIterator[Backend]:
        """Context manager: load the model if necessary, and keep it loaded until the block ends. Errors as ``load``."""
        loaded = await self._acquire(entry)
        try:
            yield loaded.backend
        finally:
            loaded.users -= 1
            entry.used_at = self.clock()

    async def _acquire(self, entry: ModelEntry) -> LoadedModel:
        entry.used_at = self.clock()
        entry.waiting += 1
        try:
            while entry.loaded is None or entry.unloading is not None:
                if entry.loading is None:
                    entry.loading = asyncio.ensure_future(self._load(entry))
                await asyncio.shield(entry.loading)  # other requests may be waiting for the same model
            entry.loaded.users += 1
            return entry.loaded
        finally:
            entry.waiting -= 1

    async def _load(self, entry: ModelEntry) -> None:
        try:
            if entry.unloading is not None:
                await asyncio.shield(entry.unloading)
            plan = await self._plan(entry)
            await self._reserve(entry, plan.bytes)
            log.info("loading model", extra={"model": entry.info.name})
            began = self.clock()
            entry.loaded = LoadedModel(await plan.load())
            entry.note_loaded(self.clock() - began)
        except BaseException as error:
            entry.note_failure(error)
            raise
        finally:
            entry.loading = None
            if entry.loaded is None:
                entry.reserved = None

    async def _plan(self, entry: ModelEntry) -> PlannedModel:
        if entry.plan is None:
            entry.plan = await entry.make_plan()
        return entry.plan

    async def _reserve(self, wanted: ModelEntry, size: int) -> None:
        """Reserve ``size`` bytes for the model ``wanted``.

        Idle models are unloaded until there is enough, least recently used first. Memory of models that are being
        loaded or unloaded counts as taken. Only one reservation is made at a time.

        Raises:
            Unavailable: the models that take the memory are busy or pinned, or are being loaded.
        """
        async with self._reserving:
            while self._budget is not None:
                held = [entry.reserved for entry in self._entries.values() if entry.reserved is not None]
                if not held or sum(held) + size <= self._budget:
                    break
                idle = [entry for entry in self._entries.values() if entry.idle and not entry.pinned]
                if not idle:
                    raise Unavailable(
                        "no memory for another model: the loaded models are busy or pinned; try again later"
                    )
                await self._begin_unload(min(idle, key=lambda entry: entry.used_at or 0.0), "memory")
            wanted.reserved = size

    # Unloading

    async def unload(self, name: str, *, force: bool = False) -> ModelEntry:
        """Unload a model when its running answers have ended; return its entry. Later requests load it again.

        Args:
            name: the model's name or alias.
            force: end the running answers with ``EngineStopped`` instead of waiting for them.

        Raises:
            NotFound: no model has this name or alias.
        """
        entry = self.entry(name)
        if entry.loading is not None and entry.unloading is None:
            with contextlib.suppress(MoesaicError):
                await asyncio.shield(entry.loading)
        if entry.loaded is not None:
            if force:
                entry.loaded.forced.set()
            await asyncio.shield(entry.unloading or self._begin_unload(entry, "admin"))
        return entry

    def _begin_unload(self, entry: ModelEntry, reason: UnloadReason) -> asyncio.Task[None]:
        """Start to unload a model that is loaded. From now on, requests wait until it is loaded again."""
        assert entry.loaded is not None and entry.unloading is None
        entry.unloading = asyncio.ensure_future(self._unload(entry, entry.loaded, reason))
        return entry.unloading

    async def _unload(self, entry: ModelEntry, loaded: LoadedModel, reason: UnloadReason) -> None:
        while loaded.busy and not loaded.forced.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(loaded.forced.wait(), DRAIN_POLL_SECONDS)
        log.info("unloading model", extra={"model": entry.info.name, "reason": reason})
        entry.loaded = None
        try:
            await loaded.close()
            await asyncio.get_running_loop().run_in_executor(None, self._reclaim)
        finally:
            entry.unloads[reason] += 1
            entry.reserved = entry.unloading = None

    async def sweep(self) -> None:
        """Unload the models that have not been used for ``idle_seconds``. Pinned models stay."""
        assert self._idle_seconds is not None
        now, unloads = self.clock(), []
        for entry in self._entries.values():
            if entry.loaded is not None and entry.loaded.busy:
                entry.used_at = now
            elif entry.idle and not entry.pinned and now - (entry.used_at or 0.0) >= self._idle_seconds:
                unloads.append(self._begin_unload(entry, "idle"))
        await asyncio.gather(*unloads)

    async def _sweep_regularly(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self.sweep()

    # Backend

    async def generate(self, request: GenerationRequest) -> ResponseStream:
        entry = self.entry(request.model)
        if entry.loaded is not None and entry.unloading is None:
            return await self._generate(entry, request)
        starting = asyncio.ensure_future(self._generate(entry, request))
        try:
            await asyncio.wait({starting}, timeout=self._patience)
        except asyncio.CancelledError:
            PendingStream(starting).cancel()
            raise
        return starting.result() if starting.done() else PendingStream(starting)

    async def _generate(self, entry: ModelEntry, request: GenerationRequest) -> ResponseStream:
        async with self._use(entry) as backend:
            return await backend.generate(request)

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        async with self._use(self.entry(request.model)) as backend:
            return await backend.tokenize(request)

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        async with self._use(self.entry(model)) as backend:
            return await backend.detokenize(model, ids)

    async def embed(
        self, model: str, texts: Sequence[str | Sequence[int]], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        async with self._use(self.entry(model)) as backend:
            return await backend.embed(model, texts, truncate)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        async with self._use(self.entry(model)) as backend:
            return await backend.classify(model, texts)

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for entry in self._entries.values():
            if entry.loaded is not None:
                entry.loaded.forced.set()  # an unload that waits for answers must not delay the end
            for work in (entry.unloading, entry.loading):
                if work is not None:
                    with contextlib.suppress(MoesaicError):
                        await work
            if entry.loaded is not None:
                await entry.loaded.close()
