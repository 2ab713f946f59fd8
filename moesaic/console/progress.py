"""A bar for what takes long, drawn on standard error and only on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUICK = 0.5
"""Seconds for which nothing is drawn: what is done by then needs no bar."""


@contextmanager
def bar(label: str, *, count: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function to call with (done, total), in bytes or with ``count`` in things; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    amount = progress.MofNCompleteColumn() if count else progress.DownloadColumn(binary_units=True)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), amount)
    drawn = progress.Progress(*columns, progress.TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task, began = drawn.add_task(label, total=None), time.monotonic()

    def show(done: int, total: int) -> None:
        drawn.update(task, completed=done, total=total or None)
        if time.monotonic() - began > QUICK:
            drawn.start()  # again and again is as good as once

    try:
        yield show
    finally:
        drawn.stop()
