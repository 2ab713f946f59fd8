"""API keys: who may use the server, and how much.

Keys are stored only as SHA-256 digests, in the file and in memory. The file is JSON:

    {"keys": [{"name": "anna", "sha256": "…", "requests_per_minute": 60, "tokens_per_minute": 20000,
               "concurrent": 4, "priority": 0, "admin": false}, …]}

Only ``name`` and ``sha256`` are required. This module does not depend on HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moesaic.errors import InvalidRequest, KeyExhausted, Unauthorized

MAX_KEY_BYTES = 256
"""A secret with more bytes than this is refused without being hashed."""


@dataclass(frozen=True)
class Key:
    """An API key: its name, the digest of its secret, and its limits. A limit of None means no limit."""

    name: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Largest number of tokens per minute, of prompts and answers together."""
    concurrent: int | None = None
    """Largest number of requests in progress at the same time."""
    priority: int = 0
    """Number added to the priority of each request of this key. Requests with a lower priority run first."""
    admin: bool = False
    worker: bool = False
    """Whether the key is for a gateway's worker. Such a key is accepted on the routes for workers only."""
    models: tuple[str, ...] = ()
    """Names of the models that a worker with this key may offer to the gateway; empty: any model."""


ENVIRONMENT = "environment-"
"""Prefix of the names of keys whose secrets come from an environment variable."""
ANONYMOUS = Key("", "")
"""The key of every request on a server without keys."""


class Bucket:
    """A rate limiter (token bucket): it gains ``per_minute`` units per minute and holds at most that many."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.rate, self.capacity, self.left, self.at = per_minute / 60, float(per_minute), float(per_minute), now

    def wait(self, now: float) -> float:
        """Refill the bucket up to the time ``now``; return the seconds until it holds one unit, 0 if it does."""
        self.left = min(self.capacity, self.left + (now - self.at) * self.rate)
        self.at = now
        return 0.0 if self.left >= 1 else (1 - self.left) / self.rate

    def take(self, count: float) -> None:
        """Take ``count`` units, even more than the bucket holds: the cost of a request is known only at its end."""
        self.left -= count


class Keys:
    """The accepted keys, and how much each has used of its limits.

    If no key is required at the start, none is required later.
    """

    def __init__(
        self,
        keys: tuple[Key, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        *,
        wanted: bool = False,
        source: Callable[[], tuple[Key, ...]] | None = None,
    ) -> None:
        """Accept these keys.

        Args:
            keys: the accepted keys.
            clock: returns the monotonic time in seconds.
            wanted: whether a key is required even if ``keys`` is empty.
            source: returns the current keys, for ``reload``; None: ``reload`` changes nothing.
        """
        self._source = source
        self.wanted = wanted or bool(keys)
        """Whether a key is required. It never changes: removing the last key must not open the server."""
        self._clock = clock
        self._running: dict[str, int] = {}
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self._by_digest: dict[bytes, Key] = {}
        self.replace(keys)

    def replace(self, keys: tuple[Key, ...]) -> None:
        """Accept only these keys from now on. Running requests continue, and what a key has used stays counted."""
        self._by_digest = {bytes.fromhex(key.sha256): key for key in keys}
        self._requests = self._buckets(self._requests, {key.name: key.requests_per_minute for key in keys})
        self._tokens = self._buckets(self._tokens, {key.name: key.tokens_per_minute for key in keys})

    @property
    def accepted(self) -> tuple[Key, ...]:
        """Return the accepted keys."""
        return tuple(self._by_digest.values())

    def reload(self) -> None:
        """Read the keys again from ``source``, which the constructor got, and accept only these.

        Raises:
            InvalidRequest: the keys cannot be read; the accepted keys stay as they were.
        """
        if self._source is not None:
            self.replace(self._source())

    def _buckets(self, current: Mapping[str, Bucket], rates: Mapping[str, int | None]) -> dict[str, Bucket]:
        buckets = {}
        for name, rate in rates.items():
            if rate:
                unchanged = name in current and current[name].capacity == rate
                buckets[name] = current[name] if unchanged else Bucket(rate, self._clock())
        return buckets

    def owner(self, secret: bytes | None) -> Key:
        """Return the accepted key with this secret; ``ANONYMOUS`` if no key is required.

        Raises:
            Unauthorized: no accepted key has this secret.
        """
        if not self.wanted:
            return ANONYMOUS
        if secret and len(secret) <= MAX_KEY_BYTES:
            digest = hashlib.sha256(secret).digest()
            match = None
            for accepted, key in self._by_digest.items():  # always all of them, so that the time tells nothing
                if hmac.compare_digest(accepted, digest):
                    match = key
            if match:
                return match
        raise Unauthorized("a valid API key is required: send it as `Authorization: Bearer KEY`")

    def current(self, sha256: str) -> Key | None:
        """Return the accepted key with this digest, with its current limits; None: no accepted key has it."""
        return self._by_digest.get(bytes.fromhex(sha256))

    def begin(self, key: Key) -> None:
        """Count a request of this key as started.

        Raises:
            KeyExhausted: a limit of the key is used up; the request is not counted.
        """
        now = self._clock()
        if key.concurrent is not None and self._running.get(key.name, 0) >= key.concurrent:
            raise KeyExhausted(f"this key's limit of {key.concurrent} concurrent requests is reached", 1.0)
        for bucket, what in ((self._requests.get(key.name), "requests"), (self._tokens.get(key.name), "tokens")):
            wait = bucket.wait(now) if bucket else 0.0
            if bucket and wait:
                raise KeyExhausted(f"this key's limit of {bucket.capacity:.0f} {what} per minute is used up", wait)
        if requests := self._requests.get(key.name):
            requests.take(1)
        self._running[key.name] = self._running.get(key.name, 0) + 1

    def end(self, key: Key, tokens: int) -> None:
        """Count a request of this key as ended, and charge ``tokens`` to the key's limit of tokens per minute."""
        left = self._running.pop(key.name, 0) - 1
        if left > 0:
            self._running[key.name] = left
        self.charge(key, tokens)

    def charge(self, key: Key, tokens: int) -> None:
        """Charge ``tokens`` to the key's limit of tokens per minute, if it has one."""
        if bucket := self._tokens.get(key.name):
            bucket.wait(self._clock())
            bucket.take(tokens)


def new(name: str, **limits: Any) -> tuple[str, Key]:
    """Return a new random secret, to be shown to its user once, and the ``Key`` with its digest, to be stored."""
    secret = f"msc-{secrets.token_urlsafe(32)}"
    return secret, Key(name, digest(secret), **limits)


def digest(key: str) -> str:
    """Return the SHA-256 digest, in hexadecimal, of the secret ``key``."""
    return hashlib.sha256(key.encode()).hexdigest()


def read(path: Path) -> tuple[Key, ...]:
    """Return the keys in a key file.

    Raises:
        InvalidRequest: the file cannot be read or is malformed. The message never quotes its content.
    """
    try:
        entries = json.loads(path.read_bytes())["keys"]
        keys = tuple(_key(entry) for entry in entries)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{path}: not a key file; `moesaic keys add` creates one") from error
    if len({key.name for key in keys}) < len(keys):
        raise InvalidRequest(f"{path}: two keys have the same name")
    if any(key.name.startswith(ENVIRONMENT) for key in keys):
        raise InvalidRequest(f"{path}: names that begin with {ENVIRONMENT!r} are reserved for MOESAIC_API_KEYS")
    return keys


def _key(entry: Mapping[str, Any]) -> Key:
    names = {field.name for field in fields(Key)}
    if entry.keys() - names or len(bytes.fromhex(entry["sha256"])) != 32 or not _is_name(entry["name"]):
        raise ValueError("unknown field, or no name")
    if type(entry.get("priority", 0)) is not int or any(
        type(entry.get(n, False)) is not bool for n in ("admin", "worker")
    ):
        raise ValueError("priority, admin, worker")
    models = entry.get("models", [])
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        raise ValueError("models")
    for name in ("requests_per_minute", "tokens_per_minute", "concurrent"):
        value = entry.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(name)
    return Key(**{**entry, "models": tuple(models)})


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 128 and value.isprintable()


def write(path: Path, keys: tuple[Key, ...]) -> None:
    """Write a key file that only its owner can read. The old file stays until the new one is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    content = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(content + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def from_environment(value: str) -> tuple[Key, ...]:
    """Return a key for each of the secrets in ``value``, the comma-separated list in MOESAIC_API_KEYS."""
    secrets_given = [text.strip() for text in value.split(",") if text.strip()]
    return tuple(Key(f"{ENVIRONMENT}{number}", digest(secret)) for number, secret in enumerate(secrets_given, 1))
