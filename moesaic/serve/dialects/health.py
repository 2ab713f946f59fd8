"""What those who run the server ask: is it alive, is it ready, how is it doing, what does it offer."""

from __future__ import annotations

from moesaic.serve.context import RequestContext
from moesaic.serve.endpoint import AnyResponse, Endpoint, Response, openai_failure


async def health(context: RequestContext) -> AnyResponse:
    """Answer 200 as long as the models can still answer: whoever asks restarts the process otherwise."""
    dead = [name for name, load in context.backend.stats().items() if not load.alive]
    if dead:
        return Response({"status": "dead", "error": "unhealthy", "error_type": "healthcheck"}, 503)
    return Response({"status": "ok"})


async def ready(context: RequestContext) -> AnyResponse:
    """Answer 200 if a request would be taken in and get on now; 503 tells a load balancer to go elsewhere."""
    why = context.services.readiness.why_not()
    if context.services.state.draining:
        why = "draining"
    return Response({"status": why or "ready"}, 503 if why else 200, headers={"retry-after": "5"} if why else {})


async def metrics(context: RequestContext) -> AnyResponse:
    """Return all figures, for Prometheus."""
    return Response(context.services.metrics.text(), media="text/plain; version=0.0.4; charset=utf-8")


async def load(context: RequestContext) -> AnyResponse:
    """Return how many requests run, as vLLM does, and each model's figures."""
    loads = context.backend.stats()
    shown = {name: {field: getattr(each, field) for field in each.__dataclass_fields__} for name, each in loads.items()}
    return Response({"server_load": sum(each.running + each.waiting for each in loads.values()), "models": shown})


async def description(context: RequestContext) -> AnyResponse:
    """Return the OpenAPI description of every route."""
    services = context.services
    return Response(services.description.as_json(keys=services.keys.wanted))


ENDPOINTS = (
    Endpoint("/health", health, openai_failure, method="GET", public=True, summary="Whether it is alive."),
    Endpoint("/ping", health, openai_failure, method="GET", public=True, summary="The same."),
    Endpoint("/ready", ready, openai_failure, method="GET", public=True, summary="Whether it takes requests."),
    Endpoint("/metrics", metrics, openai_failure, method="GET", summary="Figures for Prometheus."),
    Endpoint("/load", load, openai_failure, method="GET", summary="How busy it is."),
    Endpoint("/openapi.json", description, openai_failure, method="GET", summary="This description."),
)
