"""asyncio servers in threads, for synchronous tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

from anyio.from_thread import start_blocking_portal

T = TypeVar("T")


@contextmanager
def in_thread(manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Enter an asynchronous context manager on an event loop in a new thread."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(manager) as value:
        yield value
