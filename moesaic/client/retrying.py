"""When to ask again, and when to give up.

Knows errors and a clock. Does not know what is asked: every request carries a key by which a server can tell a
repetition, and repeating a question harms nobody even where it cannot.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from moesaic.errors import BadReply, ConnectionFailed, MoesaicError

PASSING = frozenset({408, 409, 429, 502, 503})
"""Statuses that may be another one soon; others from 500 on are only if the server says when to come again."""


@dataclass(frozen=True)
class Retries:
    """How often to ask, and how long to wait in between.

    Waits grow, with full jitter: between nothing and ``first`` * 2**i seconds, at most ``longest``. What a server
    says in Retry-After comes on top.
    """

    tries: int = 4
    """In all; 1 is once."""
    resumes: int = 12
    """Instead, for a stream each time that it breaks after it has begun or gone on, unless ``tries`` is 1: a gateway
    that is started again needs a few seconds."""
    seconds: float = 120.0
    """From the first failure on: what would have to wait longer fails now."""
    first: float = 0.5
    longest: float = 8.0


def passing(error: MoesaicError) -> bool:
    """Return whether the same question may be answered next time."""
    if isinstance(error, BadReply):
        return False
    if isinstance(error, ConnectionFailed) or error.status in PASSING:
        return True
    return error.status >= 500 and error.retry_after is not None


class Attempts:
    """The tries of one request."""

    def __init__(
        self,
        retries: Retries,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._retries, self._clock, self._draw = retries, clock, draw
        self._failed = 0
        self._begun = False
        self._since = 0.0

    def progress(self) -> None:
        """Begin to count anew: the last try has brought something."""
        self._failed, self._begun = 0, True

    def wait_after(self, error: MoesaicError) -> float:
        """Return how many seconds to wait before the next try.

        Raises:
            MoesaicError: that very error; it would come again, or there were tries enough.
        """
        now, retries = self._clock(), self._retries
        if not self._failed:
            self._since = now
        self._failed += 1
        wait = self._draw() * min(retries.longest, retries.first * 2.0 ** (self._failed - 1))
        wait += error.retry_after or 0.0
        tries = retries.resumes if self._begun and retries.tries > 1 else retries.tries
        if not passing(error) or self._failed >= tries or now + wait - self._since > retries.seconds:
            raise error
        return wait
