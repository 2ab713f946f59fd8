"""Settings of a server: its addresses and its limits for requests."""

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
    """Largest number of tokens of a prompt; None: as many as leave room for one token of an answer."""
    max_total_tokens: int | None = None
    """Largest number of tokens of prompt and answer together; None: the model's context length."""
    grammar: bool = True
    """Whether requests may set a grammar, which constrains the answer."""
    launcher_info: Mapping[str, Any] = field(default_factory=dict)
    """Further launcher options by name, which ``/info`` shows."""

    def __post_init__(self) -> None:
        for name in ("max_best_of", "max_stop_sequences", "max_top_n_tokens", "max_input_tokens", "max_total_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParameter(name, f"is {value}, expected at least 1")


@dataclass(frozen=True)
class Settings:
    """Addresses and limits of a server. Times are in seconds, sizes in bytes.

    Raises:
        InvalidParameter: a limit is not positive, or a value of ``cors_origins`` is not an origin.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    admin_port: int | None = None
    """A port on 127.0.0.1 for administrators' routes only; None: these routes are on the main port."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may have in addition to loopback names and ``host``; "*": any name."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call this server; "*": any origin."""
    body_bytes: int = 2 << 20
    """Largest request body, in bytes."""
    body_seconds: float = 30.0
    """Time limit for receiving a request's body."""
    header_bytes: int = 32 << 10
    """Largest request head (request line and headers), in bytes."""
    header_seconds: float = 10.0
    """Time limit for receiving a request's head, and for the TLS handshake."""
    idle_seconds: float = 75.0
    """A connection without a request is closed after this time. Load balancers usually close it earlier, after 60 s."""
    connections: int = 2000
    """Largest number of open connections."""
    connections_per_address: int = 1200
    """Largest number of open connections of one client address."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses of proxies whose X-Forwarded-For header is trusted."""
    request_seconds: float = 600.0
    """Time limit of a whole request; 0: no limit."""
    queue_seconds: float = 300.0
    """Time limit of a request until the model has read its prompt; 0: no limit."""
    reader_seconds: float = 60.0
    """A client that reads nothing of its response for this time is disconnected."""
    keep_alive_seconds: float = 15.0
    """A stream that sends no event for this time sends a comment, so that proxies keep it open."""
    drain_seconds: float = 30.0
    """Time that running requests have to end after a signal to stop."""
    stall_seconds: float = 120.0
    """If an engine has work but makes no step for this time, the server is reported as not ready."""
    failed_keys_per_minute: int = 20
    """After this many wrong keys within a minute, further requests from the same address are refused."""
    prompts: int = 128
    """Largest number of prompts in one request."""
    embedding_inputs: int = 2048
    """Largest number of texts to embed in one request."""
    kept_responses: int = 1000
    """Largest number of responses of ``/v1/responses`` that are kept for each API key."""
    kept_bytes: int = 16 << 20
    """Largest total size, in bytes, of the responses that are kept for each API key; the oldest are evicted."""
    strict_model_name: bool = False
    """Whether ``tgi``, ``dummy`` and similar names, which clients send for the default model, are refused."""
    strict_fields: bool = False
    """Whether a body with a field that the endpoint does not know is refused."""
    concurrent_requests: int | None = None
    """Largest number of generations that run or wait at the same time; None: as many as the engine's queue holds."""
    tgi: TgiBounds = TgiBounds()

    def __post_init__(self) -> None:
        CorsPolicy(self.cors_origins)
        for name, value in vars(self).items():
            low = 0 if name in ("port", "admin_port", "request_seconds", "queue_seconds") else 1e-9
            if isinstance(value, int | float) and not isinstance(value, bool) and not value >= low:
                raise InvalidParameter(name, f"is {value}, expected {'at least 0' if low == 0 else 'more than 0'}")

    @property
    def loopback(self) -> bool:
        """Return whether ``host`` is a loopback address, so that only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
