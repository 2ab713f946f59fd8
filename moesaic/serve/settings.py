"""Settings of a server: its addresses and limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesaic.errors import InvalidParameter
from moesaic.serve.cors import CorsPolicy


@dataclass(frozen=True)
class TgiBounds:
    """Limits of TGI's routes, named as the flags of TGI's launcher, with its defaults.

    Raises:
        InvalidParameter: a limit is below 1.
    """

    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int | None = None
    """Largest prompt in tokens; None: whatever leaves room for one token of an answer."""
    max_total_tokens: int | None = None
    """Largest prompt and answer together, in tokens; None: the model's context."""
    grammar: bool = True
    """Whether requests may set a grammar."""
    launcher_info: Mapping[str, Any] = field(default_factory=dict)
    """Further launcher options, shown by ``/info``."""

    def __post_init__(self) -> None:
        for name in ("max_best_of", "max_stop_sequences", "max_top_n_tokens", "max_input_tokens", "max_total_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParameter(name, f"is {value}, expected at least 1")


@dataclass(frozen=True)
class Settings:
    """Addresses and limits of a server. Times are in seconds, sizes in bytes.

    Raises:
        InvalidParameter: a limit is not positive, or an origin is none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    admin_port: int | None = None
    """A port on loopback for administrators' routes alone; None: they are on the main port."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that clients may use besides those of loopback and ``host``; "*": any."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server; "*": any."""
    body_bytes: int = 2 << 20
    """Largest request body."""
    body_seconds: float = 30.0
    """Time limit for receiving a request's body."""
    header_bytes: int = 32 << 10
    """Largest request head."""
    header_seconds: float = 10.0
    """Time limit for receiving a request's head, and for the TLS handshake."""
    idle_seconds: float = 75.0
    """A connection without a request is closed after this time, longer than the usual 60 s of load balancers."""
    connections: int = 2000
    """Open connections."""
    connections_per_address: int = 1200
    """Open connections of one client address."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses of proxies whose X-Forwarded-For header is trusted."""
    request_seconds: float = 600.0
    """Time limit of a whole request; 0: none."""
    queue_seconds: float = 300.0
    """Time limit until the model has read the prompt; 0: none."""
    reader_seconds: float = 60.0
    """A client that reads nothing for this time is disconnected."""
    keep_alive_seconds: float = 15.0
    """A silent stream sends a comment this often, so that proxies keep it open."""
    drain_seconds: float = 30.0
    """Time for running requests to end after a signal to stop."""
    stall_seconds: float = 120.0
    """An engine with work that makes no step for this time is reported as not ready."""
    failed_keys_per_minute: int = 20
    """Wrong keys per minute after which requests from an address are refused."""
    prompts: int = 128
    """Largest number of prompts in one request."""
    embedding_inputs: int = 2048
    """Largest number of texts to embed in one request."""
    kept_responses: int = 1000
    """Responses of ``/v1/responses`` that are kept for each key."""
    kept_bytes: int = 16 << 20
    """Size of the responses that are kept for each key; the oldest are evicted."""
    strict_model_name: bool = False
    """Whether ``tgi``, ``dummy`` and similar names of the default model are refused."""
    strict_fields: bool = False
    """Whether a body with a field that the endpoint does not know is refused."""
    concurrent_requests: int | None = None
    """Generations that run or wait at the same time; None: as many as the engine's queue holds."""
    tgi: TgiBounds = TgiBounds()

    def __post_init__(self) -> None:
        CorsPolicy(self.cors_origins)
        for name, value in vars(self).items():
            low = 0 if name in ("port", "admin_port", "request_seconds", "queue_seconds") else 1e-9
            if isinstance(value, int | float) and not isinstance(value, bool) and not value >= low:
                raise InvalidParameter(name, f"is {value}, expected {'at least 0' if low == 0 else 'more than 0'}")

    @property
    def loopback(self) -> bool:
        """Return whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
