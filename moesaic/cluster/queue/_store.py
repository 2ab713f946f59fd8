"""What is the same in every store: the methods of ``jobs.Store``, each an operation that a database runs.

Knows which operation is behind which method, and who wants news. Does not know how operations are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, TypeVar

from moesaic.cluster.jobs import Beat, Bounds, Depth, Held, Hold, Job, Lease, News, Record, Seen, State
from moesaic.cluster.queue import _operations, _reading
from moesaic.cluster.queue._steps import Operation

T = TypeVar("T")


class Kept:
    """A ``jobs.Store``, less ``run`` and ``close``."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._news: list[News] = []

    async def run(self, operation: Operation[T], *, reads: bool = False) -> T:
        """Run an operation, wait until it is committed, and tell its news.

        Args:
            operation: begins it; may be begun again where all of it was rolled back.
            reads: it writes nothing.
        """
        raise NotImplementedError

    def _tell(self, ids: Sequence[str]) -> None:
        if ids:
            for news in self._news:
                news(ids)

    def listen(self, news: News) -> None:
        self._news.append(news)

    async def submit(self, job: Job) -> str:
        return await self.run(partial(_operations.submit, job, self._bounds))

    async def lease(self, worker: str, models: Sequence[str], most: int, *, suspects: bool = False) -> list[Lease]:
        return await self.run(partial(_operations.lease, worker, models, most, suspects))

    async def renew(self, holds: Sequence[Hold]) -> Mapping[str, Held]:
        return await self.run(partial(_operations.renew, holds))

    async def append(self, parts: Mapping[Hold, Record]) -> Mapping[str, int | None]:
        return await self.run(partial(_operations.append, parts))

    async def finish(
        self, hold: Hold, state: Literal["done", "failed"], result: bytes, last: Record | None = None
    ) -> bool:
        return await self.run(partial(_operations.finish, hold, state, result, last))

    async def release(self, holds: Sequence[Hold]) -> None:
        await self.run(partial(_operations.release, holds))

    async def lose(self, beats: Sequence[Beat]) -> list[str]:
        return await self.run(partial(_operations.lose, beats, self._bounds))

    async def absolve(self, holds: Sequence[Hold]) -> None:
        await self.run(partial(_operations.absolve, holds))

    async def cancel(self, id: str) -> State | None:
        return await self.run(partial(_operations.cancel, id))

    async def look(self, id: str) -> Seen | None:
        return await self.run(partial(_reading.look, id), reads=True)

    async def log(self, id: str, start: int = 0) -> list[Record]:
        return await self.run(partial(_reading.log, id, start), reads=True)

    async def beats(self) -> list[Beat]:
        return await self.run(_reading.beats, reads=True)

    async def depths(self) -> Mapping[str, Depth]:
        return await self.run(_reading.depths, reads=True)

    async def listed(self, state: State, most: int = 100) -> list[Seen]:
        return await self.run(partial(_reading.listed, state, most), reads=True)

    async def revive(self, id: str) -> bool:
        return await self.run(partial(_operations.revive, id))

    async def tick(self, seen: int) -> int:
        now = await self.run(partial(_reading.tick, seen, self._bounds))
        while now == seen + 1 and await self.run(partial(_reading.drop, now, self._bounds)):
            pass
        return now

    async def check(self) -> str:
        return await self.run(_reading.check, reads=True)
