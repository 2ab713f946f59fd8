"""Who brings a job, or does one, by AIME's protocol: keys in bodies and queries, sessions, keys of endpoint files.

A session stands for the key that it was begun with, for a day, and ends with that key. Sessions are this process's
own: behind several gateways, clients send their key each time, as all but the oldest do. Wrong keys count against
their address as everywhere. Knows requests. Does not know what is asked.
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

SESSIONS = 10_000
SESSION_SECONDS = 86_400.0
EMPTY_KEYS = ("", "null", "undefined", "None")
"""What JavaScript and Python write where there is no key."""


class Credentials:
    """Keys of the server, keys of endpoints, and sessions."""

    def __init__(self, definitions: Sequence[Definition]) -> None:
        self._keys = {each.name: Keys(each.client_keys) for each in definitions}
        self._sessions: dict[str, tuple[str, float]] = {}  # a key's digest, and when it ends

    def owner(self, context: RequestContext, given: Mapping[str, Any], definition: Definition | None = None) -> Key:
        """Return whose request this is; without a definition, any endpoint's key does.

        Raises:
            Unauthorized: there is no key, or none that is known.
            Forbidden: the key is another endpoint's.
            KeyExhausted: too many wrong keys came from this address.
        """
        if not self._wanted(context, definition):
            return ANONYMOUS
        with context.services.guard.limit_failures(context.http.client):
            found = self._found(context, given)
        if found.worker:
            raise Forbidden("a worker's key is for its work alone")
        if definition is not None and not self._allowed(context, found, definition):
            raise Forbidden(f"Client not authorized for endpoint {definition.name}!")
        return found

    def _wanted(self, context: RequestContext, definition: Definition | None) -> bool:
        asked = self._keys.values() if definition is None else [self._keys[definition.name]]
        return context.services.keys.wanted or any(keys.wanted for keys in asked)

    def _found(self, context: RequestContext, given: Mapping[str, Any]) -> Key:
        key, session = _clean_key(given.get("key")), _clean_key(given.get("client_session_auth_key"))
        header = request_key(context.http.scope["headers"])
        sent = key.encode() if key else header
        sha256 = self._session(session) if session else ""
        for keys in (context.services.keys, *self._keys.values()):
            if keys.wanted and sent:
                try:
                    return keys.owner(sent)
                except Unauthorized:
                    pass
            if keys.wanted and sha256 and (found := keys.current(sha256)):
                return found
        if sent:
            raise Unauthorized("Key not valid")
        raise Unauthorized("API Key missing and client session authentication key not registered in API Server")

    def _allowed(self, context: RequestContext, key: Key, definition: Definition) -> bool:
        servers = context.services.keys.wanted and context.services.keys.current(key.sha256) is not None
        return servers or self._keys[definition.name].current(key.sha256) is not None

    def begin_session(self, key: Key) -> str:
        """Return a session for a key."""
        name = secrets.token_urlsafe(24)
        if key.sha256:
            if len(self._sessions) >= SESSIONS:
                self._sessions.pop(next(iter(self._sessions)))
            self._sessions[name] = key.sha256, time.monotonic() + SESSION_SECONDS
        return name

    def _session(self, name: str) -> str:
        sha256, until = self._sessions.get(name, ("", 0.0))
        return sha256 if time.monotonic() < until else ""


def worker_key(context: RequestContext, auth_key: Any, definitions: Sequence[Definition]) -> Key:
    """Return whose worker this is, which wants to do the jobs of these endpoints.

    It shows the key of the endpoint's file, or a worker's: whoever may do jobs reads what everybody asks.

    Raises:
        Unauthorized: it shows another, or none. KeyExhausted: too many wrong ones came from this address.
    """
    job_type, offered = definitions[0].job_type, {each.offered for each in definitions}
    own = [each.worker_key for each in definitions if each.worker_key]
    if not own and not context.services.keys.wanted:
        return ANONYMOUS
    with context.services.guard.limit_failures(context.http.client):
        shown = _clean_key(auth_key)
        same = [hmac.compare_digest(digest(shown), each) for each in own]  # all of them, whichever it is
        if shown and any(same):
            return Key(f"aime:{job_type}", digest(shown), worker=True)
        found = ANONYMOUS
        if shown and context.services.keys.wanted:
            with contextlib.suppress(Unauthorized):
                found = context.services.keys.owner(shown.encode())
        if not found.worker or (found.models and not offered <= set(found.models)):
            raise Unauthorized(f"Worker not authorized on job type {job_type}")
        return found


def _clean_key(key: Any) -> str:
    return key if isinstance(key, str) and key not in EMPTY_KEYS and len(key) <= 256 else ""
