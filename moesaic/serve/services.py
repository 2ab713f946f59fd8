"""The objects that a server's endpoints share: the backend, the settings, the API keys and the server's state."""

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
    """The state of a server that changes while it runs."""

    draining: bool = False
    """Whether the server refuses new requests of clients."""
    stopping: bool = False
    """Whether the server is about to exit, after a signal."""
    running: int = 0
    """Number of requests in progress, without those of workers."""
    generating: int = 0
    """Number of generations in progress; one request may have several."""


@dataclass(frozen=True)
class Services:
    """The objects that all endpoints of a server share."""

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
        """Return the OpenAPI description of all routes; it is made once."""
        return Description(self.endpoints)
