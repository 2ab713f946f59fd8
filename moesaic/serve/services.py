"""What the server's endpoints share: the backend, the settings, the keys, and the state of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from moesaic.backend import Backend
from moesaic.serve.endpoint import Endpoint
from moesaic.serve.guard import Guard
from moesaic.serve.keys import Keys
from moesaic.serve.metrics import Metrics
from moesaic.serve.openapi import Description
from moesaic.serve.readiness import Readiness
from moesaic.serve.response_store import ResponseStore
from moesaic.serve.settings import Settings
from moesaic.serve.tracing import Tracer
from moesaic.serve.unknown_fields import FieldCheck


@dataclass
class ServerState:
    """What changes while the server runs."""

    draining: bool = False
    """The server accepts no new requests."""
    stopping: bool = False
    """The server is about to exit."""
    running: int = 0
    """Requests in progress, without those of workers."""
    generating: int = 0
    """Generations in progress; one request may have several."""


@dataclass(frozen=True)
class Services:
    """What an endpoint may use."""

    backend: Backend
    settings: Settings
    keys: Keys
    guard: Guard
    fields: FieldCheck
    metrics: Metrics
    readiness: Readiness
    responses: ResponseStore
    tracer: Tracer | None = None
    endpoints: tuple[Endpoint, ...] = ()
    """All routes of this server."""
    state: ServerState = field(default_factory=ServerState)

    @cached_property
    def description(self) -> Description:
        """Return the OpenAPI description of the endpoints."""
        return Description(self.endpoints)
