"""Retry policy: which errors to retry, how long to wait, and when to give up.

This module knows errors and a clock. It does not know the requests. Repeating one is safe: every request carries an
idempotency key, and a server that ignores the key computes the answer again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from moesaic.errors import BadReply, ConnectionFailed, MoesaicError

TRANSIENT_STATUSES = frozenset({408, 409, 429, 502, 503})
"""HTTP statuses after which a request is retried. Others from 500 on are retried only with a Retry-After header."""


@dataclass(frozen=True)
class Retries:
    """How often to try, and how long to wait between tries.

    The wait before retry i (from 0) is exponential back-off with full jitter: a random time between 0 and
    ``first`` * 2**i seconds, at most ``longest``. The seconds of a Retry-After header are added to it.
    """

    tries: int = 4
    """Total number of tries; 1 disables retries."""
    resumes: int = 12
    """Number of tries for a stream that breaks after it has begun, counted again after each new piece. It is higher
    than ``tries`` because a gateway needs some seconds to restart. It has no effect if ``tries`` is 1."""
    seconds: float = 120.0
    """No try begins more than this number of seconds after the first failure."""
    first: float = 0.5
    longest: float = 8.0


def is_transient(error: MoesaicError) -> bool:
    """Return whether the same request may succeed if it is sent again later."""
    if isinstance(error, BadReply):
        return False
    if isinstance(error, ConnectionFailed) or error.status in TRANSIENT_STATUSES:
        return True
    return error.status >= 500 and error.retry_after is not None


class Attempts:
    """Counter of the tries of one request. ``clock`` returns seconds, and ``draw`` a random number from 0 to 1."""

    def __init__(
        self,
        retries: Retries,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._retries, self._clock, self._draw = retries, clock, draw
        self._failures = 0
        self._begun = False
        self._first_failure = 0.0

    def progress(self) -> None:
        """Reset the count of failures, because the last try brought new data."""
        self._failures, self._begun = 0, True

    def wait_after(self, error: MoesaicError) -> float:
        """Count a failed try; return the seconds to wait before the next one.

        Raises:
            MoesaicError: ``error`` itself, if it is permanent or a limit is reached.
        """
        now, retries = self._clock(), self._retries
        if not self._failures:
            self._first_failure = now
        self._failures += 1
        wait = self._draw() * min(retries.longest, retries.first * 2.0 ** (self._failures - 1))
        wait += error.retry_after or 0.0
        max_tries = retries.resumes if self._begun and retries.tries > 1 else retries.tries
        if not is_transient(error) or self._failures >= max_tries or now + wait - self._first_failure > retries.seconds:
            raise error
        return wait
