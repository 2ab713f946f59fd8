"""Queries to connected workers that need no durability, such as tokenizing a prompt.

A query lives in memory. It goes out with a worker's next long poll and fails when the worker is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Any

from moesaic.cluster.protocols import Query
from moesaic.cluster.workers import PendingQuery, WorkerRegistry, WorkerSession
from moesaic.errors import Unavailable

WORKER_SECONDS = 3.0
"""Maximum seconds to wait until a worker that offers the model registers."""
ANSWER_SECONDS = 10.0
"""Maximum seconds to wait for the answer to a query."""


class WorkerQueries:
    """Sends queries to connected workers."""

    def __init__(self, workers: WorkerRegistry) -> None:
        self._workers = workers

    async def find_worker(self, model: str) -> WorkerSession | None:
        """Return the worker of a model that can answer a query, with the fewest pending ones; None if there is none.

        If no worker offers the model, wait up to ``WORKER_SECONDS`` for one to register.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WORKER_SECONDS):
                while not self._workers.offering(model):
                    await self._workers.registered.wait()
        able = [
            session
            for session in self._workers.offering(model)
            if session.info.answers_queries and not session.stalled and not session.leaving
        ]
        return min(able, key=lambda session: len(session.queries), default=None)

    async def ask(self, session: WorkerSession, model: str, kind: str, body: bytes) -> Any:
        """Send a query of this ``kind`` ("tokenize" or "detokenize") to a worker; return its answer.

        Raises:
            Unavailable: the worker was lost, or did not answer in time.
            MoesaicError: the worker answered with this error.
        """
        query = Query(secrets.token_urlsafe(9), model, kind, body)
        pending = PendingQuery(query, asyncio.get_running_loop().create_future())
        session.queries[query.id] = pending
        session.wake.set()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await pending.answer
        except TimeoutError:
            raise Unavailable("the worker did not answer in time: try again") from None
        finally:
            session.queries.pop(query.id, None)
