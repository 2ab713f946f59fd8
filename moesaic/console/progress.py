"""Progress bar on standard error; it is drawn only on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DELAY_SECONDS = 0.5
"""A bar appears after this time, so shorter operations show none."""


@contextmanager
def bar(label: str, *, count: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Draw a progress bar with a ``label`` until the ``with`` block ends.

    Yields:
        A function to call with (done, total), in bytes or, with ``count``, in items. None if stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    amount_column = progress.MofNCompleteColumn() if count else progress.DownloadColumn(binary_units=True)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), amount_column)
    display = progress.Progress(*columns, progress.TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task, started = display.add_task(label, total=None), time.monotonic()

    def show(done: int, total: int) -> None:
        display.update(task, completed=done, total=total or None)
        if time.monotonic() - started > DELAY_SECONDS:
            display.start()  # does nothing if the bar is already drawn

    try:
        yield show
    finally:
        display.stop()
