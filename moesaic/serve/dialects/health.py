"""What those who run the server ask: is it alive, is it ready, how is it doing, what does it offer."""

from __future__ import annotations

from moesaic.serve import openapi
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.exchange import AnyResponse, Endpoint, RequestContext, Response


async def health(call: RequestContext) -> AnyResponse:
    """Answer 200 as long as the models can still answer: whoever asks restarts the process otherwise."""
    dead = [name for name, load in call.backend.stats().items() if not load.alive]
    if dead:
        return Response({"status": "dead", "error": "unhealthy", "error_type": "healthcheck"}, 503)
    return Response({"status": "ok"})


async def ready(call: RequestContext) -> AnyResponse:
    """Answer 200 if a request would be taken in and get on now; 503 tells a load balancer to go elsewhere."""
    why = call.app.progress.why_not()
    if call.app.draining:
        why = "draining"
    return Response({"status": why or "ready"}, 503 if why else 200, headers={"retry-after": "5"} if why else {})


async def metrics(call: RequestContext) -> AnyResponse:
    """Return all figures, for Prometheus."""
    return Response(call.app.metrics.text(), media="text/plain; version=0.0.4; charset=utf-8")


async def load(call: RequestContext) -> AnyResponse:
    """Return how many requests run, as vLLM does, and each model's figures."""
    loads = call.backend.stats()
    shown = {name: {field: getattr(each, field) for field in each.__dataclass_fields__} for name, each in loads.items()}
    return Response({"server_load": sum(each.running + each.waiting for each in loads.values()), "models": shown})


async def description(call: RequestContext) -> AnyResponse:
    """Return the OpenAPI description of every route."""
    made, keys = call.app.descriptions, call.app.keys.wanted
    if keys not in made:
        made[keys] = openapi.describe(call.app.endpoints, keys=keys)
    return Response(made[keys])


ENDPOINTS = (
    Endpoint("/health", health, openai.failure, method="GET", public=True, summary="Whether it is alive."),
    Endpoint("/ping", health, openai.failure, method="GET", public=True, summary="The same."),
    Endpoint("/ready", ready, openai.failure, method="GET", public=True, summary="Whether it takes requests."),
    Endpoint("/metrics", metrics, openai.failure, method="GET", summary="Figures for Prometheus."),
    Endpoint("/load", load, openai.failure, method="GET", summary="How busy it is."),
    Endpoint("/openapi.json", description, openai.failure, method="GET", summary="This description."),
)
