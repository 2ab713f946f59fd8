"""The event loop that commands run on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns; on uvloop, which writes to sockets at half the cost, where there is one."""
    made: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop as made
    with asyncio.Runner(loop_factory=made) as runner:
        return runner.run(work)
