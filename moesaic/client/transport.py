"""What both clients need of httpx: its import, limits, timeouts, and errors of ``moesaic.errors`` for its errors.

httpx is imported when a function is called, not with the module.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from moesaic.client.requests import Request, Timeouts
from moesaic.errors import ConnectionFailed, MoesaicError, NotInstalled, TimedOut

if TYPE_CHECKING:
    import httpx

MAX_IDLE_CONNECTIONS = 20


def import_httpx() -> ModuleType:
    """Return the module httpx.

    Raises:
        NotInstalled: httpx is not installed.
    """
    try:
        import httpx
    except ImportError:
        raise NotInstalled("moesaic.client needs httpx: pip install 'moesaic[client]'") from None
    return httpx


def connection_limits() -> httpx.Limits:
    """Return the limits of the connection pool. Active connections have no limit: the server refuses excess ones."""
    import httpx

    return httpx.Limits(max_connections=None, max_keepalive_connections=MAX_IDLE_CONNECTIONS)


def first_byte_timeout(timeouts: Timeouts) -> httpx.Timeout:
    """Return the timeouts that apply until the response begins."""
    import httpx

    return httpx.Timeout(timeouts.first_byte, connect=timeouts.connect, pool=timeouts.connect)


def use_silence_timeout(request: httpx.Request, timeouts: Timeouts) -> None:
    """Apply the silence timeout to the body of the response to ``request``.

    This works after the response has begun: httpx reads the timeouts of the request again when it reads the body.
    """
    request.extensions["timeout"]["read"] = timeouts.silence


def connection_error(error: httpx.TransportError, request: Request, *, begun: bool) -> MoesaicError:
    """Return an error of ``moesaic.errors`` for an httpx error. ``begun``: whether the response headers had arrived."""
    import httpx

    reason = str(error) or type(error).__name__
    result: MoesaicError
    if isinstance(error, httpx.ReadTimeout) and not begun:
        result = TimedOut("the server did not respond in time; Timeouts(first_byte=…) sets the limit in seconds")
    elif isinstance(error, httpx.ReadTimeout):
        result = ConnectionFailed(
            "the server stopped sending in mid-answer; Timeouts(silence=…) sets the limit in seconds"
        )
    elif isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        result = ConnectionFailed(f"cannot connect to {request.url} ({reason:.200}); check that the server is running")
    else:
        result = ConnectionFailed(f"the connection to {request.url} broke ({reason:.200})")
    result.__cause__ = error
    return result
