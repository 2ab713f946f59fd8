"""One ``Backend`` for several models: each is loaded on demand, and unloaded when another model needs its memory.

This module knows the names, sizes and order of use of the models. Functions that load them are passed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moesaic.backend import Backend, GenerationRequest, ModelInfo, ModelStats, ResponseStream, TokenInfo
from moesaic.errors import MoesaicError, NotFound, Unavailable

log = logging.getLogger("moesaic.serve")


@dataclass(frozen=True)
class PlannedModel:
    """A model whose memory is known, and the function that loads exactly what was planned."""

    bytes: int
    """Memory in bytes that the loaded model takes: weights that are not mapped, and the key/value cache."""
    load: Callable[[], Awaitable[Backend]]


@dataclass
class ModelEntry:
    """A model that is planned with ``make_plan`` and then loaded; while it is loaded, ``backend`` is its backend."""

    info: ModelInfo
    make_plan: Callable[[], Awaitable[PlannedModel]]
    plan: PlannedModel | None = None
    """The plan that the model is loaded by; None until it is first needed, and after loading failed."""
    backend: Backend | None = None
    loading: asyncio.Task[Backend] | None = field(default=None, repr=False)
    reserved: int | None = None
    """Bytes of memory in use or reserved for the model, from before it is loaded until its backend is closed."""
    last_used: int = 0


class ModelManager:
    """A ``Backend`` for several models, which are loaded on demand. The first entry is the default model."""

    def __init__(self, entries: Sequence[ModelEntry], budget: int | None = None) -> None:
        """Manage these models.

        Args:
            entries: the models; the first is the default.
            budget: memory in bytes that loaded models may take together; None: no limit. A model that is larger
                than the budget is loaded when no other model is.
        """
        self._entries = {entry.info.name: entry for entry in entries}
        self._budget, self._uses = budget, 0
        self._reserving = asyncio.Lock()

    def models(self) -> Sequence[ModelInfo]:
        return [self._info(entry) for entry in self._entries.values()]

    def _info(self, entry: ModelEntry) -> ModelInfo:
        if entry.backend is not None:
            loaded = entry.backend.models()[0]
            return replace(loaded, name=entry.info.name, aliases=entry.info.aliases, state="loaded")
        return replace(entry.info, state="loading") if entry.loading else entry.info

    def stats(self) -> Mapping[str, ModelStats]:
        return {
            name: next(iter(entry.backend.stats().values()))
            for name, entry in self._entries.items()
            if entry.backend is not None
        }

    def _entry(self, name: str) -> ModelEntry:
        for entry in self._entries.values():
            if name == entry.info.name or name in entry.info.aliases:
                return entry
        raise NotFound(f"unknown model {name!r:.120}; available models: {', '.join(self._entries)}")

    async def get(self, name: str) -> Backend:
        """Return the backend of a model. Load the model first if necessary.

        Raises:
            NotFound: no model has this name or alias.
            Unavailable: models that are busy take the memory that this model needs.
            MoesaicError: the model cannot be loaded.
        """
        entry = self._entry(name)
        self._uses += 1
        entry.last_used = self._uses
        if entry.backend is not None:
            return entry.backend
        if entry.loading is None:
            entry.loading = asyncio.ensure_future(self._load(entry))
        return await asyncio.shield(entry.loading)  # other requests may be waiting for the same model

    async def _load(self, entry: ModelEntry) -> Backend:
        try:
            plan = await self._plan(entry)
            await self._reserve(entry, plan.bytes)
            log.info("loading model", extra={"model": entry.info.name})
            entry.backend = await plan.load()
            entry.info = replace(entry.info, state="unloaded")
            return entry.backend
        except MoesaicError as error:
            entry.info = replace(entry.info, state="failed")
            if not isinstance(error, Unavailable):
                entry.plan = None  # the checkpoint may be another one when it is tried again
            raise
        finally:
            entry.loading = None
            if entry.backend is None:
                entry.reserved = None

    async def plan_all(self) -> None:
        """Plan all models now, so that errors are known and sizes do not depend on which models are loaded later.

        Raises:
            MoesaicError: a model cannot be loaded.
        """
        for entry in self._entries.values():
            await self._plan(entry)

    async def _plan(self, entry: ModelEntry) -> PlannedModel:
        if entry.plan is None:
            entry.plan = await entry.make_plan()
        return entry.plan

    async def _reserve(self, wanted: ModelEntry, size: int) -> None:
        """Reserve ``size`` bytes for the model ``wanted``.

        Idle models are unloaded until there is enough, least recently used first. Memory of models that are being
        loaded or unloaded counts as taken. Only one reservation is made at a time.

        Raises:
            Unavailable: the models that take the memory are busy, or are being loaded.
        """
        async with self._reserving:
            while self._budget is not None:
                held = [entry.reserved for entry in self._entries.values() if entry.reserved is not None]
                if not held or sum(held) + size <= self._budget:
                    break
                idle = [
                    entry for entry in self._entries.values() if entry.backend is not None and not _busy(entry.backend)
                ]
                if not idle:
                    raise Unavailable("no memory for another model: the loaded models are busy; try again later")
                await self._unload(min(idle, key=lambda entry: entry.last_used))
            wanted.reserved = size

    async def _unload(self, entry: ModelEntry) -> None:
        log.info("unloading model", extra={"model": entry.info.name})
        backend, entry.backend = entry.backend, None
        assert backend is not None
        await backend.close()
        entry.reserved = None  # if it was asked for again meanwhile, its reservation waits for the lock

    async def generate(self, request: GenerationRequest) -> ResponseStream:
        return await (await self.get(request.model)).generate(request)

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        return await (await self.get(request.model)).tokenize(request)

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return await (await self.get(model)).detokenize(model, ids)

    async def embed(
        self, model: str, texts: Sequence[str | Sequence[int]], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        return await (await self.get(model)).embed(model, texts, truncate)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        return await (await self.get(model)).classify(model, texts)

    async def close(self) -> None:
        for entry in self._entries.values():
            if entry.loading is not None:
                with contextlib.suppress(MoesaicError):
                    await entry.loading
            if entry.backend is not None:
                await entry.backend.close()


def _busy(backend: Backend) -> bool:
    return any(stats.running + stats.waiting for stats in backend.stats().values())
