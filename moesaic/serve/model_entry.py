"""The state of one model of a ``ModelManager``: its plan, its backend while it is loaded, and what happened to it."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from moesaic.backend import Backend, ModelInfo
from moesaic.errors import MoesaicError, Unavailable

log = logging.getLogger("moesaic.serve")

UnloadReason = Literal["memory", "idle", "admin"]
"""Why a model is unloaded: another needs its memory, nothing used it for long, or an administrator said so."""
State = Literal["loaded", "loading", "unloading", "unloaded", "failed"]
LOAD_SECONDS_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds, in seconds, of the buckets that count how long loading took."""


@dataclass(frozen=True)
class PlannedModel:
    """A model whose memory is known, and the function that loads exactly what was planned."""

    bytes: int
    """Memory in bytes that the loaded model takes: weights that are not mapped, and the key/value cache."""
    load: Callable[[], Awaitable[Backend]]


@dataclass(eq=False)
class LoadedModel:
    """The backend of a loaded model, and the number of calls to it that have not returned."""

    backend: Backend
    users: int = 0
    forced: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to unload the model although answers are running."""

    @property
    def busy(self) -> bool:
        """Return whether a call or an answer is in progress."""
        stats = self.backend.stats().values()
        return bool(self.users) or any(each.running + each.waiting for each in stats)

    async def close(self) -> None:
        """Close the backend and drop it, so that its memory can be freed while this object is still referenced."""
        backend = self.backend
        del self.backend
        await backend.close()


@dataclass(eq=False)
class ModelEntry:
    """A model that is planned with ``make_plan`` and then loaded; while it is loaded, ``loaded`` has its backend."""

    info: ModelInfo
    """The model as it is while unloaded; after the first load with its context and further properties."""
    make_plan: Callable[[], Awaitable[PlannedModel]]
    pinned: bool = False
    """Whether the model is loaded at the start, and unloaded only by an administrator."""
    plan: PlannedModel | None = None
    """The plan that the model is loaded by; None until it is first needed, and after loading failed."""
    loaded: LoadedModel | None = None
    loading: asyncio.Task[None] | None = field(default=None, repr=False)
    unloading: asyncio.Task[None] | None = field(default=None, repr=False)
    """The task that waits for the model's answers and then closes it; None: the model is not being unloaded."""
    waiting: int = 0
    """Number of calls that wait until the model is loaded."""
    reserved: int | None = None
    """Bytes of memory in use or reserved for the model, from before it is loaded until its backend is closed."""
    used_at: float | None = None
    """Time of the last use, by the manager's clock; None: not used yet."""
    error: str = ""
    """Why the model could not be loaded the last time; "" if it could."""
    load_seconds: float = 0.0
    """Sum of the seconds that all loads took."""
    buckets: list[int] = field(default_factory=lambda: [0] * (len(LOAD_SECONDS_BUCKETS) + 1))
    """Number of loads by how long they took: one bucket for each bound, and one above the last bound."""
    failures: int = 0
    unloads: Counter[UnloadReason] = field(default_factory=Counter)

    @property
    def loads(self) -> int:
        """Return how many times the model was loaded."""
        return sum(self.buckets)

    @property
    def idle(self) -> bool:
        """Return whether the model is loaded and nothing uses it or waits for it."""
        return self.loaded is not None and self.unloading is None and not (self.waiting or self.loaded.busy)

    @property
    def state(self) -> State:
        """Return the state of the model. A model that is being unloaded and then loaded again is "loading"."""
        if self.loading is not None:
            return "loading"
        if self.unloading is not None:
            return "unloading"
        return "loaded" if self.loaded is not None else "failed" if self.error else "unloaded"

    def current_info(self) -> ModelInfo:
        """Return the model with its current state. For clients, a model that is being unloaded is unloaded."""
        state = self.state
        return replace(self.info, state="unloaded" if state == "unloading" else state)

    def note_loaded(self, seconds: float) -> None:
        """Record that the model was loaded in ``seconds``, and what its backend says of it."""
        assert self.loaded is not None
        shown = self.loaded.backend.models()[0]
        self.info = replace(shown, name=self.info.name, aliases=self.info.aliases, state="unloaded")
        self.error = ""
        self.load_seconds += seconds
        self.buckets[bisect_left(LOAD_SECONDS_BUCKETS, seconds)] += 1
        log.info("model loaded", extra={"model": self.info.name, "seconds": round(seconds, 2)})

    def note_failure(self, error: BaseException) -> None:
        """Record that the model could not be loaded. A lack of memory for it is no failure of the model."""
        if isinstance(error, Unavailable | asyncio.CancelledError):
            return
        self.plan = None  # the checkpoint may be another one when it is tried again
        self.error = str(error) if isinstance(error, MoesaicError) else f"{type(error).__name__}: {error}"
        self.failures += 1
        log.error("model not loaded", extra={"model": self.info.name, "why": self.error[:500]})
