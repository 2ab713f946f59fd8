"""Torch's threads, and work that is shared among threads without them.

Torch's threads wait for each other after every operation. Where another program keeps a core busy, each of these waits
takes as long as the system lets that program run, and many small operations become many times slower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
MAX_THREADS = 16
"""Maximum threads of ``for_each``; more would wait for Python's global interpreter lock."""
CHUNK = 1 << 18
"""Number of elements that a call of ``for_each_chunk`` handles: its tensors then stay in the processor's cache."""


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Return a context in which torch uses ``count`` threads for the calling thread; None: as many as before."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def for_each(function: Callable[[T], object], items: Sequence[T], device: torch.device) -> None:
    """Call a function of tensors on ``device`` for every item, in as many threads as torch would use.

    The calls compute without gradients. The first error is raised after all running calls have ended.
    """
    threads = min(torch.get_num_threads(), len(items), MAX_THREADS) if device.type == "cpu" else 1
    inference = torch.is_inference_mode_enabled()  # a thread of its own does not inherit it

    def call(item: T) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            function(item)

    with torch_threads(1):
        if threads == 1:
            for item in items:
                call(item)
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(call, items):
                pass


def for_each_chunk(function: Callable[[slice], object], shape: Sequence[int], device: torch.device) -> None:
    """Call a function, as ``for_each`` does, for slices of the rows of a matrix of ``shape`` [rows, columns].

    Each slice has about ``CHUNK`` elements.
    """
    rows, columns = shape
    step = max(1, CHUNK // max(1, columns))
    spans = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    if spans:
        for_each(function, spans, device)
