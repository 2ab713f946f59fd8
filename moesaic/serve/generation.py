"""One running generation: its events, within the time limits, recorded in the metrics as they pass."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable

from moesaic.backend import Event, PromptDone, ResponseStream, join
from moesaic.serve.deadline import Deadline
from moesaic.serve.metrics import RequestMetrics


class Generation:
    """The response stream of one generation request, with its deadline and its metrics."""

    def __init__(self, stream: ResponseStream, deadline: Deadline, metrics: RequestMetrics) -> None:
        self._stream, self._deadline, self._metrics = stream, deadline, metrics

    @classmethod
    async def start(
        cls, admission: Awaitable[ResponseStream], deadline: Deadline, metrics: RequestMetrics
    ) -> Generation:
        """Wait until the backend has accepted the request.

        Raises:
            Unavailable, TimedOut: that took longer than the deadline allows.
        """
        try:
            stream = await deadline.wait(admission)
        finally:
            deadline.close()
        metrics.admitted()
        return cls(stream, deadline, metrics)

    @property
    def job(self) -> tuple[str, bool] | None:
        """Return the durable job's id and whether it existed before; None: the request is not durable."""
        return self._stream.job

    def cancel(self) -> None:
        """Cancel the request; nothing more comes."""
        self._stream.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events. Neighbouring deltas of one answer that came together are joined.

        The time that a slow client takes to read does not count against the deadline.

        Raises:
            Unavailable: the request waited too long for its turn.
            TimedOut: its answer took too long.
        """
        async with contextlib.aclosing(self._batches(joined=True)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    def batches(self) -> AsyncGenerator[list[Event]]:
        """Yield lists of all events that are available at once, deltas not joined; errors as for ``events``.

        An answer's end comes in the same list as its last token.
        """
        return self._batches(joined=False)

    async def _batches(self, *, joined: bool) -> AsyncGenerator[list[Event]]:
        source = aiter(self._stream)
        try:
            while True:
                event = await self._deadline.wait(anext(source))
                batch = [event, *self._stream.ready()]
                if joined and len(batch) > 1:
                    batch = join(batch)
                for item in batch:
                    if isinstance(item, PromptDone):
                        self._deadline.prompt_read()
                    self._metrics.record(item)
                yield batch
        except StopAsyncIteration:
            return
        finally:
            self._deadline.close()
