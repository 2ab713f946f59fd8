"""Checks that a request must pass before its endpoint runs: host, origin, port and API key.

The decisions depend on the request's path, its matching route and the socket that accepted it, never on an address
built from headers. This module does not depend on what a route does.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
from collections.abc import Callable, Iterable, Iterator

from moesaic.errors import Forbidden, InvalidRequest, KeyExhausted, NotFound, Unauthorized
from moesaic.serve.cors import CorsPolicy
from moesaic.serve.keys import Key, Keys
from moesaic.serve.settings import Settings
from moesaic.serve.types import HttpRequest, Scope

HOST_HEADER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
ADMIN_ADDRESS = "127.0.0.1"
"""Address at which the separate port for administrators listens (``Settings.admin_port``)."""
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
MAX_TRACKED_ADDRESSES = 10_000
"""Largest number of client addresses whose wrong keys are counted; with more, the oldest entry is dropped."""
FAILURE_WINDOW_SECONDS = 60.0


class Guard:
    """The request checks of one server, with its count of wrong keys by client address."""

    def __init__(self, settings: Settings, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._keys, self._clock = settings, keys, clock
        self._cors = CorsPolicy(settings.cors_origins)
        self._hosts = {name.lower() for name in (*LOOPBACK_NAMES, settings.host, *settings.allowed_hosts)}
        self._failures: dict[str, list[float]] = {}  # address -> times of its failed keys

    def check_host(self, scope: Scope) -> None:
        """Check that the Host header names this server. In a DNS rebinding attack, it names another host.

        Raises:
            InvalidRequest: the header is missing, malformed, repeated, or names another host.
        """
        values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        host = HOST_HEADER.fullmatch(values[0]) if len(values) == 1 else None
        if not host:
            raise InvalidRequest("the Host header is missing or malformed")
        if "*" in self._hosts or (not self._settings.loopback and not self._settings.allowed_hosts):
            return  # a server that listens on a network without names is reached by any of its addresses
        if host[1].strip("[]").lower() not in self._hosts:
            raise InvalidRequest("unknown Host header: start the server with --allowed-host NAME to accept it")

    def check_listener(self, scope: Scope, *, admin: bool) -> None:
        """Check that a request came by the port of its route, if there is a separate port for administrators.

        ``admin`` is whether the route is for administrators.

        Raises:
            NotFound: the request came by the other port.
        """
        port = self._settings.admin_port
        # The socket that accepted the connection decides, since a header could lie.
        if port is not None and (tuple(scope.get("server") or ()) == (ADMIN_ADDRESS, port)) != admin:
            raise NotFound(f"there is no {scope['method']} {scope['path'][:100]!r} on this port")

    def client_address(self, scope: Scope) -> str:
        """Return the client's IP address.

        If a trusted proxy sent the request, it is the last address in X-Forwarded-For that is not a trusted proxy.
        """
        address = str((scope.get("client") or ("",))[0])
        trusted = self._settings.trusted_proxies
        if address in trusted:
            forwarded = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            for hop in reversed(forwarded.decode("latin-1").split(",")):
                if hop.strip() not in trusted:
                    return _ip_address(hop.strip()) or address
        return address

    def check_origin(self, scope: Scope) -> None:
        """Reject writes (not GET, HEAD or OPTIONS) from web pages whose origin is not allowed.

        The check is necessary because browsers send CORS "simple" requests without asking the server first.

        Raises:
            Forbidden: the page's origin is neither this server's own nor an allowed one.
        """
        origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
        if origin is None or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        own = origin.lower() in (b"http://" + host.lower(), b"https://" + host.lower())
        if not own and not self._cors.allows(origin.decode("latin-1")):
            raise Forbidden("this origin is not allowed: start the server with --cors-origin URL to allow it")

    def cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Return the CORS headers of the response to a request, as ``CorsPolicy.headers`` does."""
        return self._cors.headers(scope)

    def authenticate(self, http: HttpRequest) -> Key:
        """Return the accepted key that a request carries; ``ANONYMOUS`` on a server that requires no key.

        Raises:
            Unauthorized: the key is missing, wrong, or sent twice.
            KeyExhausted: too many wrong keys came from this address.
        """
        if not self._keys.wanted:
            return self._keys.owner(None)
        with self.limit_failures(http.client):
            return self._keys.owner(request_key(http.scope["headers"]))

    @contextlib.contextmanager
    def limit_failures(self, address: str) -> Iterator[None]:
        """Context manager: an ``Unauthorized`` that its block raises counts as a wrong key of this client address.

        Raises:
            KeyExhausted: too many wrong keys came from this address before.
        """
        self._check_failures(address)  # before the key is looked at, so that the answer says nothing about it
        try:
            yield
        except Unauthorized:
            self._count_failure(address)
            raise

    def _check_failures(self, address: str) -> None:
        now = self._clock()
        recent = [at for at in self._failures.get(address, ()) if at > now - FAILURE_WINDOW_SECONDS]
        if len(recent) >= self._settings.failed_keys_per_minute:
            raise KeyExhausted("too many wrong keys from this address", FAILURE_WINDOW_SECONDS - (now - recent[0]))

    def _count_failure(self, address: str) -> None:
        if len(self._failures) >= MAX_TRACKED_ADDRESSES and address not in self._failures:
            self._failures.pop(next(iter(self._failures)))
        times = self._failures.setdefault(address, [])
        times.append(self._clock())
        del times[: -self._settings.failed_keys_per_minute]


def _ip_address(text: str) -> str | None:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def request_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the secret in ``Authorization: Bearer`` (OpenAI) or ``x-api-key`` (Anthropic).

    None: the request has no such header, or more than one.
    """
    values = [value for name, value in headers if name in (b"authorization", b"x-api-key")]
    if len(values) != 1:
        return None
    scheme, space, rest = values[0].partition(b" ")
    return rest.strip() if space and scheme.lower() == b"bearer" else values[0]
