"""Loads a model's modules and weights without pauses of Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the collector of reference cycles until the ``with`` block, which loads a model, ends.

    Importing torch makes half a million objects that stay until the end. The collector would traverse them again and
    again, which takes a fifth of the time to the first token. They are frozen: later collections leave them out.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        if "torch" not in sys.modules:
            import moesaic.llm  # noqa: F401

            gc.freeze()
        yield
    finally:
        if enabled:
            gc.enable()
