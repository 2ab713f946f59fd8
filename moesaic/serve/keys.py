"""API keys: who may ask, and how much.

A key is never kept: only its SHA-256 is, in the file as in memory. The file is JSON,

    {"keys": [{"name": "anna", "sha256": "…", "requests_per_minute": 60, "tokens_per_minute": 20000,
               "concurrent": 4, "priority": 0, "admin": false}, …]}

of which all but the first two may be left out. Knows keys and limits. Does not know HTTP.
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

LONGEST = 256
"""Bytes of a key; longer ones are not even hashed."""


@dataclass(frozen=True)
class Key:
    """One key's owner and limits; None: no limit."""

    name: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""
    concurrent: int | None = None
    """Requests at the same time."""
    priority: int = 0
    """The lower number goes first."""
    admin: bool = False
    worker: bool = False
    """Whether it is a worker's: such a key opens a gateway's routes for workers, and no other."""
    models: tuple[str, ...] = ()
    """Of a worker's key: the models that it may offer; (): any."""


ENVIRONMENT = "environment-"
"""What the names of keys from the environment begin with."""
NOBODY = Key("", "")
"""Who asks where no keys are wanted."""


class Bucket:
    """Tokens that drip in at ``per_minute``, up to one minute's worth."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.rate, self.most, self.left, self.at = per_minute / 60, float(per_minute), float(per_minute), now

    def wait(self, now: float) -> float:
        """Return in how many seconds there is something to take; 0: now."""
        self.left = min(self.most, self.left + (now - self.at) * self.rate)
        self.at = now
        return 0.0 if self.left >= 1 else (1 - self.left) / self.rate

    def take(self, count: float) -> None:
        """Take so much, even if there is less: what a request costs is known only at its end."""
        self.left -= count


class Keys:
    """The keys that are let in. Without any at the start everybody is; after that, whoever has one of the newest."""

    def __init__(
        self,
        keys: tuple[Key, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        *,
        wanted: bool = False,
        source: Callable[[], tuple[Key, ...]] | None = None,
    ) -> None:
        """Let in these.

        Args:
            keys: who is let in.
            clock: seconds.
            wanted: a key is needed even if there is none yet.
            source: reads them again; None: they stay as they are.
        """
        self._source = source
        self.wanted = wanted or bool(keys)
        """Whether a key is needed at all. Stays as it is: the last key's end must not open the door to all."""
        self._clock = clock
        self._running: dict[str, int] = {}
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self._by_digest: dict[bytes, Key] = {}
        self.replace(keys)

    def replace(self, keys: tuple[Key, ...]) -> None:
        """Let in these from now on; what is running goes on, and nobody's share is filled up by it."""
        self._by_digest = {bytes.fromhex(key.sha256): key for key in keys}
        self._requests = self._buckets(self._requests, {key.name: key.requests_per_minute for key in keys})
        self._tokens = self._buckets(self._tokens, {key.name: key.tokens_per_minute for key in keys})

    @property
    def known(self) -> tuple[Key, ...]:
        """Whose keys are let in."""
        return tuple(self._by_digest.values())

    def reload(self) -> None:
        """Read the keys again.

        Raises:
            InvalidRequest: they cannot be read; all stays as it was.
        """
        if self._source is not None:
            self.replace(self._source())

    def _buckets(self, known: Mapping[str, Bucket], rates: Mapping[str, int | None]) -> dict[str, Bucket]:
        out = {}
        for name, rate in rates.items():
            if rate:
                same = name in known and known[name].most == rate
                out[name] = known[name] if same else Bucket(rate, self._clock())
        return out

    def owner(self, given: bytes | None) -> Key:
        """Return whose key this is.

        Raises:
            Unauthorized: it is nobody's.
        """
        if not self.wanted:
            return NOBODY
        if given and len(given) <= LONGEST:
            digest = hashlib.sha256(given).digest()
            found = None
            for known, key in self._by_digest.items():  # all of them, whichever it is
                if hmac.compare_digest(known, digest):
                    found = key
            if found:
                return found
        raise Unauthorized("a valid API key is needed: send it as `Authorization: Bearer KEY`")

    def current(self, sha256: str) -> Key | None:
        """Return the key of that digest as it is now; None if it is not let in any more."""
        return self._by_digest.get(bytes.fromhex(sha256))

    def begin(self, key: Key) -> None:
        """Count a request as running.

        Raises:
            KeyExhausted: the key's share is used up.
        """
        now = self._clock()
        if key.concurrent is not None and self._running.get(key.name, 0) >= key.concurrent:
            raise KeyExhausted(f"this key may run {key.concurrent} requests at a time", 1.0)
        for bucket, what in ((self._requests.get(key.name), "requests"), (self._tokens.get(key.name), "tokens")):
            wait = bucket.wait(now) if bucket else 0.0
            if bucket and wait:
                raise KeyExhausted(f"this key's {what} of this minute are used up ({bucket.most:.0f})", wait)
        if requests := self._requests.get(key.name):
            requests.take(1)
        self._running[key.name] = self._running.get(key.name, 0) + 1

    def end(self, key: Key, tokens: int) -> None:
        """Count a request as done, which cost so many tokens."""
        left = self._running.pop(key.name, 0) - 1
        if left > 0:
            self._running[key.name] = left
        self.charge(key, tokens)

    def charge(self, key: Key, tokens: int) -> None:
        """Take what a request has cost from its key's share."""
        if bucket := self._tokens.get(key.name):
            bucket.wait(self._clock())
            bucket.take(tokens)


def new(name: str, **limits: Any) -> tuple[str, Key]:
    """Return a new key, to be shown once, and what is kept of it."""
    written = f"msc-{secrets.token_urlsafe(32)}"
    return written, Key(name, digest(written), **limits)


def digest(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read(path: Path) -> tuple[Key, ...]:
    """Return the keys in a file.

    Raises:
        InvalidRequest: it cannot be read or is not what is expected; the message never quotes it.
    """
    try:
        listed = json.loads(path.read_bytes())["keys"]
        keys = tuple(_key(each) for each in listed)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{path}: is no file of keys; `moesaic keys add` makes one") from error
    if len({key.name for key in keys}) < len(keys):
        raise InvalidRequest(f"{path}: two keys have the same name")
    if any(key.name.startswith(ENVIRONMENT) for key in keys):
        raise InvalidRequest(f"{path}: names that begin with {ENVIRONMENT!r} are those of MOESAIC_API_KEYS")
    return keys


def _key(entry: Mapping[str, Any]) -> Key:
    known = {field.name for field in fields(Key)}
    if entry.keys() - known or len(bytes.fromhex(entry["sha256"])) != 32 or not _is_name(entry["name"]):
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


def _is_name(given: object) -> bool:
    return isinstance(given, str) and 0 < len(given) <= 128 and given.isprintable()


def write(path: Path, keys: tuple[Key, ...]) -> None:
    """Write keys so that nobody else can read them, and the old file is there until the new one is whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    content = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1)
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(content + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def from_environment(value: str) -> tuple[Key, ...]:
    """Return the keys that are listed, parted by commas, in a variable of the environment."""
    listed = [each.strip() for each in value.split(",") if each.strip()]
    return tuple(Key(f"{ENVIRONMENT}{place}", digest(each)) for place, each in enumerate(listed, 1))
