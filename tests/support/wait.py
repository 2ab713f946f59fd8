"""Waiting for conditions that other threads or processes change."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import Any


def eventually(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until ``condition`` returns a true value, and return that value; fail after ``seconds``."""
    end = monotonic() + seconds
    while not (value := condition()):
        assert monotonic() < end, f"the condition did not hold within {seconds} seconds"
        sleep(0.005)
    return value
