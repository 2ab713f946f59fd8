"""What must not get as far as an API: wrong hosts, wrong origins, wrong keys.

Every decision is about ``scope["path"]`` and the route that was found, never about an address put together
from headers. Knows ASGI scopes. Does not know what a route does.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
from collections.abc import Callable, Iterable, Iterator

from moesaic.errors import Forbidden, InvalidRequest, KeyExhausted, NotFound, Unauthorized
from moesaic.serve.exchange import Scope
from moesaic.serve.keys import Key, Keys
from moesaic.serve.settings import Settings

HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
ADMINS = "127.0.0.1"
"""The address of administrators' own port."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ASKED = b"authorization, content-type, x-api-key, anthropic-version, idempotency-key"
"""Headers that a page of a named origin may send; our own client sends the last, and Anthropic's the one before."""
WATCHED = 10_000
"""Addresses whose wrong keys are counted at the same time."""


class Guard:
    """Checks that stand in front of every route."""

    def __init__(self, settings: Settings, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._keys, self._clock = settings, keys, clock
        self._hosts = {name.lower() for name in (*LOOPBACK, settings.host, *settings.allowed_hosts)}
        self._wrong: dict[str, list[float]] = {}

    def check_host(self, scope: Scope) -> None:
        """Refuse a Host header that this server is not called by: the mark of DNS rebinding.

        Raises:
            InvalidRequest: it is missing, malformed, there twice, or of another name.
        """
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        found = HOST.fullmatch(given[0]) if len(given) == 1 else None
        if not found:
            raise InvalidRequest("the Host header is missing or malformed")
        if "*" in self._hosts or (not self._settings.loopback and not self._settings.allowed_hosts):
            return  # whoever opens a server to a network without naming it is called by any address of it
        if found[1].strip("[]").lower() not in self._hosts:
            raise InvalidRequest("this server is not called by that Host: start it with --allowed-host NAME")

    def check_listener(self, scope: Scope, *, admin: bool) -> None:
        """Refuse administrators' routes where clients come in, and clients' where administrators do.

        Raises:
            NotFound: administrators have a port of their own, and this is the wrong one.
        """
        port = self._settings.admin_port
        # Where the connection was accepted, which no header can say otherwise.
        if port is not None and (tuple(scope.get("server") or ()) == (ADMINS, port)) != admin:
            raise NotFound(f"there is no {scope['method']} {scope['path'][:100]!r} on this port")

    def client(self, scope: Scope) -> str:
        """Return where a request comes from: the nearest address that is not one of our own proxies."""
        address = str((scope.get("client") or ("",))[0])
        trusted = self._settings.trusted_proxies
        if address in trusted:
            said = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            for each in reversed(said.decode("latin-1").split(",")):
                if each.strip() not in trusted:
                    return _address(each.strip()) or address
        return address

    def check_origin(self, scope: Scope) -> None:
        """Refuse to do what a page of another origin wants done, which needs no leave to send simple requests.

        Raises:
            Forbidden: the page's origin is neither this server's own nor among those that were named.
        """
        origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
        if origin is None or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        own = origin.lower() in (b"http://" + host.lower(), b"https://" + host.lower())
        if not own and not self.cors(scope):
            raise Forbidden("pages of that origin may not use this server: start it with --cors-origin URL")

    def cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Return the headers that let a page of another origin read the answer; none for all but the listed ones."""
        origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
        allowed = self._settings.cors_origins
        if origin is None or not ("*" in allowed or origin.decode("latin-1") in allowed):
            return []
        return [
            (b"access-control-allow-origin", b"*" if "*" in allowed else origin),
            (b"access-control-allow-headers", ASKED),
            (b"access-control-expose-headers", b"retry-after, x-request-id, idempotency-replayed"),
            (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
            (b"vary", b"origin"),
        ]

    def who(self, scope: Scope) -> Key:
        """Return whose request this is.

        Raises:
            Unauthorized: the key is missing, wrong, or there twice.
            KeyExhausted: too many wrong ones came from this address.
        """
        if not self._keys.wanted:
            return self._keys.owner(None)
        with self.patience(scope):
            return self._keys.owner(given_key(scope["headers"]))

    @contextlib.contextmanager
    def patience(self, scope: Scope) -> Iterator[None]:
        """Watch over the look at a key: one that is found wrong (``Unauthorized``) is held against its address.

        Raises:
            KeyExhausted: too many wrong ones came from there.
        """
        address = (scope.get("client") or ("", 0))[0]
        self._check_patience(address)  # before the key is looked at: the answer tells nothing about it
        try:
            yield
        except Unauthorized:
            self._note_wrong(address)
            raise

    def _check_patience(self, address: str) -> None:
        recent = [at for at in self._wrong.get(address, ()) if at > self._clock() - 60]
        if len(recent) >= self._settings.failed_keys_per_minute:
            raise KeyExhausted("too many wrong keys from this address", 60 - (self._clock() - recent[0]))

    def _note_wrong(self, address: str) -> None:
        if len(self._wrong) >= WATCHED and address not in self._wrong:
            self._wrong.pop(next(iter(self._wrong)))
        kept = self._wrong.setdefault(address, [])
        kept.append(self._clock())
        del kept[: -self._settings.failed_keys_per_minute]


def _address(written: str) -> str | None:
    try:
        return str(ipaddress.ip_address(written))
    except ValueError:
        return None


def given_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key that a request carries, as OpenAI's or as Anthropic's clients send it."""
    found = [value for name, value in headers if name in (b"authorization", b"x-api-key")]
    if len(found) != 1:
        return None
    scheme, space, rest = found[0].partition(b" ")
    return rest.strip() if space and scheme.lower() == b"bearer" else found[0]
