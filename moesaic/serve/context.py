"""The context in which an endpoint answers one request: the request's API key, its body and its generations.

This module does not depend on the application or on how a response is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from moesaic.backend import Backend, Event, GenerationRequest
from moesaic.errors import InvalidParameter, Overloaded
from moesaic.serve.deadline import Deadline
from moesaic.serve.generation import Generation
from moesaic.serve.json_body import fit
from moesaic.serve.keys import Key
from moesaic.serve.metrics import RequestMetrics
from moesaic.serve.services import Services
from moesaic.serve.settings import Settings
from moesaic.serve.tracing import Span
from moesaic.serve.types import Disconnected, HttpRequest
from moesaic.serve.unknown_fields import unknown_fields

MAX_IDEMPOTENCY_KEY_CHARS = 255
ANSWERS_PER_REQUEST = 8
"""Number of answers to one prompt (``n``) that count as one request against the limits of an API key."""


class Cancellable(Protocol):
    """Work that runs for a request and is cancelled when the request ends."""

    def cancel(self) -> None:
        """Stop the work."""
        ...


@dataclass
class RequestContext:
    """One request that is being answered, with what its endpoint needs: services, API key, body and time limits."""

    services: Services
    http: HttpRequest
    key: Key
    deadline: Deadline
    body: Any = None
    """The decoded body, of the type ``Endpoint.body``; None if the endpoint reads no body."""
    running: list[Cancellable] = field(default_factory=list)
    """Work, such as generations, that is cancelled when the request ends."""
    spent: int = 0
    """Number of tokens to charge to the key in addition to those of ``generate``, such as those of embeddings."""
    _generations: list[RequestMetrics] = field(default_factory=list)
    _needed: int = 0
    """Number of times that the request must be counted against the key's limits, for its generations so far."""
    _counted: int = 0
    """Number of times that the request has been counted against the key's limits."""

    @property
    def backend(self) -> Backend:
        """Return the backend that generates the answers."""
        return self.services.backend

    @property
    def settings(self) -> Settings:
        """Return the server's settings."""
        return self.services.settings

    @property
    def path_parameters(self) -> Mapping[str, str]:
        """Return the values of the path's parameters by name, such as ``id`` for the route ``/v1/jobs/{id}``."""
        return self.http.path_parameters

    @property
    def query(self) -> dict[str, str]:
        """Return the query parameters by name. If a name is repeated, its last value is returned."""
        return self.http.query

    def fit(self, value: Any, kind: Any) -> Any:
        """Convert decoded JSON into the body type ``kind`` and return it. Unknown fields are reported to the client.

        Raises:
            InvalidRequest: ``value`` is not of that type, or has unknown fields and the server refuses them.
        """
        body = fit(value, kind)
        self.services.fields.report(self.http, self.http.path, unknown_fields(value, kind))
        return body

    def header(self, name: bytes) -> str | None:
        """Return the request's first header with this name, given in lower case; None if it has none."""
        return self.http.header(name)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Start a generation for this client; return its events. Reading them records them in the metrics.

        The backend has accepted the generation when this returns. It is cancelled if the context is closed before its
        end.
        """
        return (await self._start(request)).events()

    async def generate_in_batches(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        """Start a generation as ``generate`` does; return lists, each of all events that are available at a time."""
        return (await self._start(request)).batches()

    async def _start(self, request: GenerationRequest) -> Generation:
        services, state = self.services, self.services.state
        # With keys, clients may lower their own priority but not raise it.
        priority = max(0, request.priority) if services.keys.wanted and not self.key.admin else request.priority
        request = replace(request, tenant=self.key.name, priority=priority + self.key.priority)
        if name := self.header(b"idempotency-key"):
            if len(name) > MAX_IDEMPOTENCY_KEY_CHARS:
                raise InvalidParameter("Idempotency-Key", f"has more than {MAX_IDEMPOTENCY_KEY_CHARS} characters")
            index = len(self._generations)
            request = replace(request, idempotency_key=f"{name}/{index}" if index else name)
        limit = self.settings.concurrent_requests
        if limit is not None and state.generating >= limit:
            raise Overloaded(f"the limit of {limit} concurrent requests is reached; try again later")
        self._count_answers(request)
        metrics = RequestMetrics(services.metrics, request, self._span(request), self._close_if_done)
        self._generations.append(metrics)
        state.generating += 1
        deadline = self.deadline.with_queue_limit(self.settings.queue_seconds)
        generation = await Generation.start(self.backend.generate(request), deadline, metrics)
        self.running.append(generation)
        if generation.job is not None:
            self._add_job_headers(*generation.job, has_key=bool(request.idempotency_key))
        return generation

    def _count_answers(self, request: GenerationRequest) -> None:
        """Count a generation against the key's limits: up to ``ANSWERS_PER_REQUEST`` answers count as one request.

        Raises:
            InvalidParameter: ``n`` is larger than the key's limits can ever allow.
            KeyExhausted: the key has used up one of its limits.
        """
        parts = -(-(request.sampling.get("n") or 1) // ANSWERS_PER_REQUEST)
        for limit, when in ((self.key.concurrent, "at a time"), (self.key.requests_per_minute, "per minute")):
            if limit is not None and parts > max(1, limit):
                problem = (
                    f"is {request.sampling['n']}, but this key allows {limit * ANSWERS_PER_REQUEST} answers {when}"
                )
                raise InvalidParameter("n", problem)
        self._needed += parts
        while self._counted < self._needed:  # the first one is the request itself, which was counted
            self.count_request()

    def _span(self, request: GenerationRequest) -> Span | None:
        tracer = self.services.tracer
        return tracer.begin(request, self.header(b"traceparent"), self.header(b"tracestate")) if tracer else None

    def _add_job_headers(self, job_id: str, existed: bool, *, has_key: bool) -> None:
        headers = self.http.response_headers
        headers.append((b"x-moesaic-job", job_id.encode()))
        if has_key:
            headers.append((b"idempotency-replayed", b"true" if existed else b"false"))

    def count_request(self) -> None:
        """Count one request against the limits of this request's key.

        Raises:
            KeyExhausted: the key has used up one of its limits.
        """
        self.services.keys.begin(self.key)
        self._counted += 1

    def assign_key(self, key: Key) -> None:
        """Make ``key`` the key of this request, and move what was counted against the previous key to ``key``.

        It is for routes on which the key is a part of the body.

        Raises:
            KeyExhausted: ``key`` has used up one of its limits.
        """
        counted, self._counted = self._counted, 0
        for _ in range(counted):
            self.services.keys.end(self.key, 0)
        self.key = key
        for _ in range(counted):
            self.count_request()

    def close(self, error: BaseException | None = None) -> None:
        """End the request: cancel what still runs, end its metrics, and charge its tokens to the key.

        ``error`` is the error that ended the request, for the metrics; None: no error did.
        """
        for running in self.running:
            running.cancel()
        if isinstance(error, Disconnected | asyncio.CancelledError):
            error = None
        for generation in self._generations:
            self.services.state.generating -= 1
            generation.close(error)
            self.spent += generation.tokens
        for index in range(self._counted):
            self.services.keys.end(self.key, 0 if index else self.spent)
        self.running.clear()
        self._generations.clear()
        self._counted = self._needed = self.spent = 0

    def _close_if_done(self) -> None:
        """Close the context if all generations have ended, so that the client may send its next request at once."""
        if all(generation.ended for generation in self._generations):
            self.close()
