"""What a server is told about how to behave: every bound that stands between it and the outside."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesaic.errors import InvalidParameter


@dataclass(frozen=True)
class TgiBounds:
    """What TGI's own routes allow, by the names of its launcher's flags; the numbers are its defaults."""

    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int | None = None
    """Of a prompt; None: whatever leaves room for one token of an answer."""
    max_total_tokens: int | None = None
    """Of prompt and answer; None: the model's context."""
    grammar: bool = True
    told: Mapping[str, Any] = field(default_factory=dict)
    """What else ``/info`` is to tell of what was asked for at the start."""

    def __post_init__(self) -> None:
        for name in ("max_best_of", "max_stop_sequences", "max_top_n_tokens", "max_input_tokens", "max_total_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParameter(name, f"is {value}, expected at least 1")


@dataclass(frozen=True)
class Settings:
    """Bounds and names; times in seconds, sizes in bytes.

    Raises:
        InvalidParameter: a bound is not positive.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    admin_port: int | None = None
    """Where routes for administrators are, on loopback, and nothing else is; None: they are among the others."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may call this server, besides loopback's and ``host``; "*": any."""
    cors_origins: tuple[str, ...] = ()
    """Pages of other origins that may call it; none by default."""
    body_bytes: int = 2 << 20
    body_seconds: float = 30.0
    """Within this a request's body must have come."""
    header_bytes: int = 32 << 10
    header_seconds: float = 10.0
    """Within this a request's headers must have come."""
    idle_seconds: float = 60.0
    """After this a connection without a request is closed."""
    connections: int = 2000
    connections_per_address: int = 1200
    trusted_proxies: tuple[str, ...] = ()
    """Addresses of proxies whose word in X-Forwarded-For is taken for where a request comes from."""
    request_seconds: float = 600.0
    """The most that an answer may take; 0: no bound."""
    queue_seconds: float = 300.0
    """The most that a request may wait for its turn; 0: no bound."""
    reader_seconds: float = 60.0
    """Somebody who takes nothing of an answer for so long is given up."""
    keep_alive_seconds: float = 15.0
    """After so much silence a stream gets a comment, so that proxies do not cut it."""
    drain_seconds: float = 30.0
    """What running answers are given to end when the server is asked to stop."""
    stall_seconds: float = 120.0
    """An engine with work that makes no step for so long is not ready any more."""
    failed_keys_per_minute: int = 20
    """Wrong keys from one address after which it is not listened to for a while."""
    prompts: int = 128
    """Prompts, or texts to embed, in one request."""
    kept_responses: int = 1000
    """Answers of ``/v1/responses`` that each key may go on from, ..."""
    kept_bytes: int = 16 << 20
    """... and how much they may take; the oldest go first."""
    strict_model_name: bool = False
    """Refuse ``tgi``, ``dummy`` and the like as names of the default model."""
    concurrent_requests: int | None = None
    """Requests to models at the same time, those that wait among them; None: as many as the engine's queue takes."""
    tgi: TgiBounds = TgiBounds()

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 0 if name in ("port", "admin_port", "request_seconds", "queue_seconds") else 1e-9
            if isinstance(value, int | float) and not isinstance(value, bool) and not value >= low:
                raise InvalidParameter(name, f"is {value}, expected {'at least 0' if low == 0 else 'more than 0'}")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
