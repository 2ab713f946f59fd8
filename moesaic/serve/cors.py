"""Cross-origin resource sharing (CORS): lets web pages of other origins call this server and read its responses.

Protocol: https://fetch.spec.whatwg.org/#http-cors-protocol. This module does not depend on routes or keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from moesaic.errors import InvalidParameter
from moesaic.serve.types import Scope, header

REQUEST_HEADERS = ("authorization", "content-type", "x-api-key", "anthropic-version", "idempotency-key")
"""Request headers that every page may send. Further headers are allowed if the page's preflight asks for them."""
EXPOSED_HEADERS = b"retry-after, x-request-id, request-id, idempotency-replayed, x-moesaic-ignored-fields, *"
"""Response headers that a page may read: "*" allows all. The names are for browsers that do not know "*"."""
METHODS = b"GET, POST, DELETE, OPTIONS"
PREFLIGHT_SECONDS = b"600"
"""Seconds for which a browser may remember the answer to a preflight."""
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*]+")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")


class CorsPolicy:
    """The origins whose pages may call this server, and the headers that tell browsers so.

    Credentials are never allowed, so a browser adds no cookie or password of its own to a request of a page. A page can
    send only API keys that it has. Therefore it may send any header.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        """Allow pages of these origins, such as ``https://page.example.org``; "*" allows every origin.

        Raises:
            InvalidParameter: one of ``origins`` is not an origin.
        """
        self._origins = frozenset(map(parse_origin, origins))

    def allows(self, origin: str) -> bool:
        """Return whether pages of this origin may call the server."""
        return "*" in self._origins or origin.lower() in self._origins

    def headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Return the CORS headers for the response to a request, for every status.

        For a request without an origin, or with one that is not allowed, only ``Vary`` is returned. If the server
        allows no origins, the list is empty.
        """
        if not self._origins:
            return []
        origin = header(scope, b"origin")
        if origin is None or not self.allows(origin):
            return [(b"vary", b"origin")]  # a cache must not give this response to a page of an allowed origin
        allowed = b"*" if "*" in self._origins else origin.encode("latin-1")
        names = ", ".join(dict.fromkeys((*REQUEST_HEADERS, *_requested_headers(scope)))).encode()
        return [
            (b"access-control-allow-origin", allowed),
            (b"access-control-allow-headers", names),
            (b"access-control-expose-headers", EXPOSED_HEADERS),
            (b"access-control-allow-methods", METHODS),
            *_preflight_headers(scope),
        ]


def is_preflight(scope: Scope) -> bool:
    """Return whether a request is a CORS preflight, with which a browser asks whether a page may send a request."""
    return scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method") is not None


def parse_origin(text: str) -> str:
    """Return an origin (or "*") as browsers send it: in lower case, without a default port or a slash at the end.

    Raises:
        InvalidParameter: ``text`` is neither an origin nor "*".
    """
    origin = text.strip().lower().removesuffix("/")
    if origin in ("*", "null"):
        return origin
    if not ORIGIN.fullmatch(origin):
        raise InvalidParameter(
            "cors_origins", f"has {text!r}, expected an origin, such as https://page.example.org, or * for any"
        )
    return origin.removesuffix(DEFAULT_PORTS.get(origin.partition(":")[0], ""))


def _requested_headers(scope: Scope) -> Iterator[str]:
    """Yield the header names, in lower case, that a preflight asks to send. Invalid names are left out."""
    for name in (header(scope, b"access-control-request-headers") or "").lower().split(","):
        if HEADER_NAME.fullmatch(name.strip()):
            yield name.strip()


def _preflight_headers(scope: Scope) -> Iterator[tuple[bytes, bytes]]:
    if not is_preflight(scope):
        yield b"vary", b"origin"
        return
    yield b"vary", b"origin, access-control-request-headers, access-control-request-private-network"
    yield b"access-control-max-age", PREFLIGHT_SECONDS
    if header(scope, b"access-control-request-private-network") == "true":  # a public page calls a private address
        yield b"access-control-allow-private-network", b"true"
