"""The stream of a request whose model is still being loaded."""

from __future__ import annotations

import asyncio

import pytest

from moesaic.backend import Finished, GenerationRequest, PromptDone
from moesaic.errors import Overloaded
from moesaic.serve.pending_stream import PendingStream
from tests.support.backend import Script, ScriptedBackend
from tests.support.event_loop import async_test


def pending(backend: ScriptedBackend) -> tuple[PendingStream, asyncio.Future]:
    starting = asyncio.ensure_future(backend.generate(GenerationRequest("scripted")))
    return PendingStream(starting), starting


@async_test
async def test_it_has_the_events_of_the_accepted_request():
    stream, starting = pending(ScriptedBackend())
    assert stream.ready() == []
    events = [event async for event in stream]
    assert isinstance(events[0], PromptDone) and isinstance(events[-1], Finished)
    assert stream.ready() == [] and starting.done()


@async_test
async def test_a_refusal_is_raised_when_it_is_read():
    stream, starting = pending(ScriptedBackend(Script(refusal=Overloaded("full"))))
    await asyncio.wait({starting})
    assert stream.ready() == []
    with pytest.raises(Overloaded, match="full"):
        await anext(aiter(stream))


@async_test
async def test_cancelling_ends_the_request_before_and_after_it_is_accepted():
    backend = ScriptedBackend()
    stream, starting = pending(backend)
    stream.cancel()
    await asyncio.wait({starting})
    assert starting.cancelled() and backend.calls == []
    stream, starting = pending(backend)
    await starting
    stream.cancel()
    await asyncio.sleep(0)
    assert backend.cancelled == 1
