"""Tests of deadlines: waits in time, expired waits, results that are ready, and other cancellations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from moesaic.errors import TimedOut, Unavailable
from moesaic.serve.deadline import Deadline
from tests.support.event_loop import async_test


def current_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def numbers(*pauses: float) -> AsyncIterator[int]:
    for number, pause in enumerate(pauses):
        if pause:
            await asyncio.sleep(pause)
        yield number


@async_test
async def test_many_waits_share_one_timer():
    deadline, source = Deadline(30), numbers(0, 0.01, 0.01)
    assert await deadline.wait(anext(source)) == 0
    timer = deadline._timer
    assert [await deadline.wait(anext(source)) for _ in range(2)] == [1, 2]
    assert timer is not None and deadline._timer is timer
    deadline.close()
    assert deadline._timer is None


@async_test
async def test_a_wait_past_the_end_times_out():
    started = asyncio.get_running_loop().time()
    with pytest.raises(TimedOut, match=r"longer than 0\.05 s"):
        await Deadline(0.05).wait(asyncio.sleep(60))
    assert asyncio.get_running_loop().time() >= started + 0.05 and not current_task().cancelling()
    await asyncio.sleep(0)  # would raise if the task were still cancelled


@async_test
async def test_a_result_that_is_ready_is_returned_after_the_end():
    deadline, source = Deadline(0.02), numbers(0, 0, 0, 60)
    assert await deadline.wait(anext(source)) == 0
    await asyncio.sleep(0.05)  # a slow client
    assert [await deadline.wait(anext(source)) for _ in range(2)] == [1, 2]
    with pytest.raises(TimedOut):
        await deadline.wait(anext(source))


@async_test
async def test_the_queue_limit_ends_with_the_prompt():
    with pytest.raises(Unavailable, match=r"waited 0\.02 s"):
        await Deadline(30, 0.02).wait(asyncio.sleep(60))
    deadline, source = Deadline(30, 0.02), numbers(0, 0.05)
    assert await deadline.wait(anext(source)) == 0
    deadline.prompt_read()
    assert await deadline.wait(anext(source)) == 1


@async_test
async def test_the_earlier_limit_names_the_error():
    with pytest.raises(TimedOut):
        await Deadline(0.02, 30).wait(asyncio.sleep(60))
    with pytest.raises(Unavailable):
        await Deadline(30, 0.02).wait(asyncio.sleep(60))


@async_test
async def test_a_derived_deadline_keeps_the_end_of_the_request():
    loop = asyncio.get_running_loop()
    derived = Deadline(30, started=loop.time() - 29.95).with_queue_limit(20)
    with pytest.raises(TimedOut):
        await derived.wait(asyncio.sleep(60))


@async_test
async def test_without_limits_there_is_no_timer():
    deadline = Deadline()
    assert await deadline.wait(anext(numbers(0.01))) == 0
    assert deadline._timer is None


@async_test
async def test_nested_deadlines_raise_the_error_of_the_one_that_ended():
    async def inner(seconds: float) -> None:
        await Deadline(60, seconds).wait(asyncio.sleep(60))

    with pytest.raises(Unavailable):
        await Deadline(30).wait(inner(0.02))
    with pytest.raises(TimedOut):
        await Deadline(0.02).wait(inner(30))
    assert not current_task().cancelling()


@async_test
async def test_another_cancellation_is_not_taken_for_a_timeout():
    for expires in (False, True):  # also in the moment in which the deadline expires
        deadline = Deadline(30)
        waiting = asyncio.ensure_future(deadline.wait(asyncio.sleep(60)))
        await asyncio.sleep(0)
        if expires:
            deadline._expire()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()


@async_test
async def test_an_error_stays_the_error():
    async def broken() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await Deadline(30).wait(broken())
