"""Event loop for asynchronous tests, with a time limit."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Callable[[], Awaitable[T]], seconds: float = 120.0) -> T:
    """Run ``main`` on a new event loop and return its result; raise TimeoutError after ``seconds``."""

    async def limited() -> T:
        return await asyncio.wait_for(main(), seconds)

    return asyncio.run(limited())


def async_test(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Turn a coroutine function into a test that pytest calls; it fails after 120 seconds."""

    @functools.wraps(function)
    def test(*arguments: Any, **fixtures: Any) -> None:
        run(lambda: function(*arguments, **fixtures))

    return test
