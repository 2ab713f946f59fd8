"""Authentication by the protocol of the AIME API server: keys in bodies and queries, sessions, keys of endpoint files.

A session is equivalent to the key that it was created with. It lasts a day, or until that key is revoked. Sessions are
local to this process: behind several gateways, clients must send their key with each request, as all but the oldest do.
Failed attempts are limited by client address, as on all other routes. This module does not depend on the content of
requests.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.cluster.aime.settings import Definition
from moesaic.errors import Forbidden, Unauthorized
from moesaic.serve.context import RequestContext
from moesaic.serve.guard import request_key
from moesaic.serve.keys import ANONYMOUS, Key, Keys, digest

MAX_SESSIONS = 10_000
SESSION_SECONDS = 86_400.0
EMPTY_KEYS = ("", "null", "undefined", "None")
"""Values of the key field that count as no key: clients in JavaScript and Python send them if they have none."""


class Credentials:
    """Checks the keys of clients (those of the server and those in endpoint files) and their sessions."""

    def __init__(self, definitions: Sequence[Definition]) -> None:
        self._keys = {definition.name: Keys(definition.client_keys) for definition in definitions}
        self._sessions: dict[
            str, tuple[str, float]
        ] = {}  # by session: the digest of its key, and its end by the monotonic clock

    def owner(self, context: RequestContext, values: Mapping[str, Any], definition: Definition | None = None) -> Key:
        """Return the client key that a request was sent with, or that its session was created with.

        Args:
            context: the request.
            values: the fields of the request's body and query.
            definition: the endpoint that the key must be valid for; None accepts the key of any endpoint.

        Raises:
            Unauthorized: the key is missing or unknown.
            Forbidden: the key belongs to another endpoint or to a worker.
            KeyExhausted: too many wrong keys came from this address.
        """
        if not self._required(context, definition):
            return ANONYMOUS
        with context.services.guard.limit_failures(context.http.client):
            owner = self._lookup(context, values)
        if owner.worker:
            raise Forbidden("a worker's key cannot submit jobs: use a client's key")
        if definition is not None and not self._allowed(context, owner, definition):
            raise Forbidden(f"Client not authorized for endpoint {definition.name}!")
        return owner

    def _required(self, context: RequestContext, definition: Definition | None) -> bool:
        endpoint_keys = self._keys.values() if definition is None else [self._keys[definition.name]]
        return context.services.keys.wanted or any(keys.wanted for keys in endpoint_keys)

    def _lookup(self, context: RequestContext, values: Mapping[str, Any]) -> Key:
        key, session = _clean_key(values.get("key")), _clean_key(values.get("client_session_auth_key"))
        header = request_key(context.http.scope["headers"])
        sent = key.encode() if key else header
        sha256 = self._session(session) if session else ""
        for keys in (context.services.keys, *self._keys.values()):
            if keys.wanted and sent:
                try:
                    return keys.owner(sent)
                except Unauthorized:
                    pass
            if keys.wanted and sha256 and (owner := keys.current(sha256)):
                return owner
        if sent:
            raise Unauthorized("Key not valid")
        raise Unauthorized("API Key missing and client session authentication key not registered in API Server")

    def _allowed(self, context: RequestContext, key: Key, definition: Definition) -> bool:
        is_server_key = context.services.keys.wanted and context.services.keys.current(key.sha256) is not None
        return is_server_key or self._keys[definition.name].current(key.sha256) is not None

    def begin_session(self, key: Key) -> str:
        """Create a session for a key; return the secret name that the client sends instead of the key."""
        name = secrets.token_urlsafe(24)
        if key.sha256:
            if len(self._sessions) >= MAX_SESSIONS:
                self._sessions.pop(next(iter(self._sessions)))
            self._sessions[name] = key.sha256, time.monotonic() + SESSION_SECONDS
        return name

    def _session(self, name: str) -> str:
        sha256, expires_at = self._sessions.get(name, ("", 0.0))
        return sha256 if time.monotonic() < expires_at else ""


def worker_key(context: RequestContext, auth_key: Any, definitions: Sequence[Definition]) -> Key:
    """Return the key of a worker that requests jobs of these endpoints. ``auth_key`` is what the worker sent.

    The worker must send the key of an endpoint's file or a worker's key of the server. A client's key is not enough,
    because workers read the requests of all clients.

    Raises:
        Unauthorized: the key is missing or wrong.
        KeyExhausted: too many wrong keys came from this address.
    """
    job_type, models = definitions[0].job_type, {definition.offered for definition in definitions}
    endpoint_keys = [definition.worker_key for definition in definitions if definition.worker_key]
    if not endpoint_keys and not context.services.keys.wanted:
        return ANONYMOUS
    with context.services.guard.limit_failures(context.http.client):
        sent = _clean_key(auth_key)
        # Compare with every key, so that the duration does not depend on which one matches.
        matches = [hmac.compare_digest(digest(sent), sha256) for sha256 in endpoint_keys]
        if sent and any(matches):
            return Key(f"aime:{job_type}", digest(sent), worker=True)
        owner = ANONYMOUS
        if sent and context.services.keys.wanted:
            with contextlib.suppress(Unauthorized):
                owner = context.services.keys.owner(sent.encode())
        if not owner.worker or (owner.models and not models <= set(owner.models)):
            raise Unauthorized(f"Worker not authorized on job type {job_type}")
        return owner


def _clean_key(key: Any) -> str:
    return key if isinstance(key, str) and key not in EMPTY_KEYS and len(key) <= 256 else ""
