"""What both clients tell httpx, and what its errors are to them.

Knows httpx, and imports it when it is needed. Does not know what is asked.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from moesaic.client.asking import Ask, Timeouts
from moesaic.errors import ConnectionFailed, MoesaicError, NotInstalled, TimedOut

if TYPE_CHECKING:
    import httpx


def load() -> ModuleType:
    """Return httpx.

    Raises:
        NotInstalled: it is not here.
    """
    try:
        import httpx
    except ImportError:
        raise NotInstalled("moesaic.client needs httpx: pip install 'moesaic[client]'") from None
    return httpx


def limits() -> httpx.Limits:
    """Return how many connections there may be: the server says when there are too many."""
    import httpx

    return httpx.Limits(max_connections=None, max_keepalive_connections=20)


def waits(timeouts: Timeouts) -> httpx.Timeout:
    """Return how long to wait until an answer begins."""
    import httpx

    return httpx.Timeout(timeouts.first_byte, connect=timeouts.connect, pool=timeouts.connect)


def bear_silence(request: httpx.Request, timeouts: Timeouts) -> None:
    """Wait from now on only as long as an answer that has begun may be silent.

    httpx reads this mapping anew when it begins with the body.
    """
    request.extensions["timeout"]["read"] = timeouts.silence


def lost(error: httpx.TransportError, ask: Ask, *, begun: bool) -> MoesaicError:
    """Return our error for one of httpx; ``begun``: the head of the answer was there."""
    import httpx

    reason = str(error) or type(error).__name__
    found: MoesaicError
    if isinstance(error, httpx.ReadTimeout) and not begun:
        found = TimedOut("the server did not begin to answer in time: Timeouts(first_byte=…) says how long to wait")
    elif isinstance(error, httpx.ReadTimeout):
        found = ConnectionFailed("the server fell silent in the middle of its answer")
    elif isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        found = ConnectionFailed(f"there is no connection to {ask.url} ({reason:.200}): does a server run there?")
    else:
        found = ConnectionFailed(f"the connection to {ask.url} broke off ({reason:.200})")
    found.__cause__ = error
    return found
