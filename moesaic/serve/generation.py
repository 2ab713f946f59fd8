"""One running generation. Its events are read within the time limits and recorded in the metrics."""

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
        """Wait until the backend has accepted the request; return the running generation.

        Args:
            admission: the running call of ``Backend.generate``.
            deadline: time limits of the request.
            metrics: records the events.

        Raises:
            Unavailable, TimedOut: the backend did not accept the request within the time limits.
        """
        try:
            stream = await deadline.wait(admission)
        finally:
            deadline.close()
        metrics.admitted()
        return cls(stream, deadline, metrics)

    @property
    def job(self) -> tuple[str, bool] | None:
        """Return the id of the request's job, and whether the job existed before; None: the backend keeps no jobs."""
        return self._stream.job

    def cancel(self) -> None:
        """Cancel the generation; no more events come."""
        self._stream.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events of the generation. Consecutive ``Delta`` events that came together are joined per answer.

        The time that a slow client takes to read does not count against the deadline.

        Raises:
            Unavailable: the queue limit passed before the model read the prompt.
            TimedOut: the limit of the whole request passed.
        """
        async with contextlib.aclosing(self._batches(joined=True)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    def batches(self) -> AsyncGenerator[list[Event]]:
        """Yield lists, each of all events that are available at a time. Errors are those of ``events``.

        ``Delta`` events are not joined. The end of an answer is in the same list as its last token.
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
