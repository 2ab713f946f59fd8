"""Waits under one bound: in time, too late, for what is there already, and together with somebody's cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from moesaic.serve.deadline import Deadline, DeadlineExceeded


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await asyncio.wait_for(main(), 30)

    asyncio.run(whole())


def later(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


def task() -> asyncio.Task[None]:
    found = asyncio.current_task()
    assert found is not None
    return found


async def numbers(*pauses: float) -> AsyncIterator[int]:
    for place, pause in enumerate(pauses):
        if pause:
            await asyncio.sleep(pause)
        yield place


def test_many_waits_have_one_timer_and_the_last_ends_in_time():
    async def main() -> None:
        patience, source, until = Deadline(), numbers(0, 0.01, 0.01, 60), later(30)
        assert await patience.wait(anext(source), until) == 0
        timer = patience._timer
        assert [await patience.wait(anext(source), until) for _ in range(2)] == [1, 2]
        assert patience._timer is timer
        until = later(0.05)
        with pytest.raises(DeadlineExceeded):
            await patience.wait(anext(source), until)
        assert asyncio.get_running_loop().time() >= until and not task().cancelling()
        await asyncio.sleep(0)  # it is not cancelled any more

    run(main)


def test_what_is_there_already_is_had_after_the_time():
    async def main() -> None:
        patience, source, until = Deadline(), numbers(0, 0, 0, 60), later(0.02)
        assert await patience.wait(anext(source), until) == 0
        await asyncio.sleep(0.05)  # a slow reader
        assert [await patience.wait(anext(source), until) for _ in range(2)] == [1, 2]
        with pytest.raises(DeadlineExceeded):
            await patience.wait(anext(source), until)

    run(main)


def test_a_bound_can_be_moved_and_taken_away():
    async def main() -> None:
        patience, source = Deadline(), numbers(0, 0.05, 0.05)
        assert await patience.wait(anext(source), later(0.02)) == 0
        assert await patience.wait(anext(source), later(30)) == 1
        assert await patience.wait(anext(source), None) == 2
        assert patience._timer is None
        with pytest.raises(StopAsyncIteration):
            await patience.wait(anext(source), later(30))
        patience.close()
        assert patience._timer is None

    run(main)


def test_somebody_else_s_cancellation_is_not_taken_for_the_end_of_time():
    async def main() -> None:
        patience = Deadline()

        async def waits(seconds: float) -> None:
            await patience.wait(asyncio.sleep(60), later(seconds))

        for seconds in (30.0, -1.0):  # at the same moment as the time is up, too
            waiting = asyncio.ensure_future(waits(seconds))
            await asyncio.sleep(0)
            if seconds < 0:
                patience._expire()
            waiting.cancel()
            await asyncio.wait([waiting])
            assert waiting.cancelled()

    run(main)


def test_an_error_stays_the_error():
    async def main() -> None:
        async def broken() -> None:
            raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            await Deadline().wait(broken(), later(30))

    run(main)
