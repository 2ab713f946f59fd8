"""The context of one request that passed the guard: its key, its body, and what it has running.

This module does not know the application, nor how a response is sent.
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
"""Answers to one prompt that count as one request against the limits of a key."""


class Cancellable(Protocol):
    """Something that runs for a request and ends with it."""

    def cancel(self) -> None:
        """Stop it."""
        ...


@dataclass
class RequestContext:
    """One request that is being answered."""

    services: Services
    http: HttpRequest
    key: Key
    deadline: Deadline
    body: Any = None
    """The decoded body, of the endpoint's type."""
    running: list[Cancellable] = field(default_factory=list)
    """What is cancelled when the request ends."""
    spent: int = 0
    """Tokens charged to the key besides those of ``generate``."""
    _generations: list[RequestMetrics] = field(default_factory=list)
    _needed: int = 0
    """How often it is to be counted for the generations so far."""
    _counted: int = 0
    """How often the request was counted against the key's rate."""

    @property
    def backend(self) -> Backend:
        """Return the backend that answers."""
        return self.services.backend

    @property
    def settings(self) -> Settings:
        """Return the server's settings."""
        return self.services.settings

    @property
    def path_parameters(self) -> Mapping[str, str]:
        """Return the variable parts of the path."""
        return self.http.path_parameters

    @property
    def query(self) -> dict[str, str]:
        """Return the query parameters; of a repeated name the last value."""
        return self.http.query

    def fit(self, value: Any, kind: Any) -> Any:
        """Convert decoded JSON into the type of a body. Its unknown fields are reported as for every body.

        Raises:
            InvalidRequest: it is not of that type, or has unknown fields and the server refuses them.
        """
        body = fit(value, kind)
        self.services.fields.report(self.http, self.http.path, unknown_fields(value, kind))
        return body

    def header(self, name: bytes) -> str | None:
        """Return the first header of a lower-case name, or None."""
        return self.http.header(name)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Start a generation for this client; return its events, which are counted and timed as they pass.

        The request is accepted when this returns, and cancelled if the context is closed before it ends.
        """
        return (await self._start(request)).events()

    async def generate_in_batches(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        """Start a generation; return its events in lists of all that are available at once."""
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
        """Count the answers of a generation against the key's limits: a few of them count as one request.

        Raises:
            InvalidParameter: there are more answers than the key may ever have at a time.
            KeyExhausted: the key has used up its limit.
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
        """Count one request against the key's limits.

        Raises:
            KeyExhausted: the key has used up its limit.
        """
        self.services.keys.begin(self.key)
        self._counted += 1

    def assign_key(self, key: Key) -> None:
        """Count the request as another key's, where only the body told which key it came with.

        Raises:
            KeyExhausted: that key has used up its limit.
        """
        counted, self._counted = self._counted, 0
        for _ in range(counted):
            self.services.keys.end(self.key, 0)
        self.key = key
        for _ in range(counted):
            self.count_request()

    def close(self, error: BaseException | None = None) -> None:
        """Cancel what still runs and charge the key. ``error``: what ended the request, if anything did."""
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
        """Close as soon as all answers have ended: the client may send its next request at once."""
        if all(generation.ended for generation in self._generations):
            self.close()
