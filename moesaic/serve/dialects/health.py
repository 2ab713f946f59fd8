"""Routes for operators: health, readiness, metrics, load and the OpenAPI description."""

from __future__ import annotations

from collections import Counter

from moesaic.serve.context import RequestContext
from moesaic.serve.endpoint import AnyResponse, Endpoint, Response, openai_failure


async def health(context: RequestContext) -> AnyResponse:
    """Answer 200 while the engines of all models are alive, else 503: the process should then be restarted."""
    dead = [name for name, stats in context.backend.stats().items() if not stats.alive]
    if dead:
        return Response({"status": "dead", "error": "unhealthy", "error_type": "healthcheck"}, 503)
    return Response({"status": "ok"})


async def ready(context: RequestContext) -> AnyResponse:
    """Answer 200 if the server accepts requests and its engines make progress, else 503 with the reason.

    With 503, a load balancer should send requests to another server. Both have the number of models in each state; not
    their names, because the route needs no key.
    """
    why = context.services.readiness.why_not()
    if context.services.state.draining:
        why = "draining"
    states = Counter(model.state for model in context.backend.models() if model.parent is None)
    content = {"status": why or "ready", "models": states}
    return Response(content, 503 if why else 200, headers={"retry-after": "5"} if why else {})


async def metrics(context: RequestContext) -> AnyResponse:
    """Return all metrics in Prometheus' text format."""
    return Response(context.services.metrics.text(), media="text/plain; version=0.0.4; charset=utf-8")


async def load(context: RequestContext) -> AnyResponse:
    """Return the number of running and waiting requests, as vLLM's ``/load`` does, and each model's statistics."""
    models = context.backend.stats()
    return Response({"server_load": sum(stats.running + stats.waiting for stats in models.values()), "models": models})


async def description(context: RequestContext) -> AnyResponse:
    """Return the OpenAPI description of every route."""
    services = context.services
    return Response(services.description.as_json(keys=services.keys.wanted))


ENDPOINTS = (
    Endpoint("/health", health, openai_failure, method="GET", public=True, summary="Whether the models are alive."),
    Endpoint("/ping", health, openai_failure, method="GET", public=True, summary="Whether the models are alive."),
    Endpoint(
        "/ready", ready, openai_failure, method="GET", public=True, summary="Whether the server accepts requests."
    ),
    Endpoint("/metrics", metrics, openai_failure, method="GET", summary="Metrics for Prometheus."),
    Endpoint("/load", load, openai_failure, method="GET", summary="Requests and statistics of each model."),
    Endpoint("/openapi.json", description, openai_failure, method="GET", summary="This description."),
)
