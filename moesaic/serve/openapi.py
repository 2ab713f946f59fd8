"""The OpenAPI description of the routes, made from the types that really decode the bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from moesaic import __version__
from moesaic.serve.exchange import Endpoint

ANSWERS = {
    200: "The answer; a stream of server-sent events if one was asked for.",
    400: "What was asked cannot be done as asked.",
    401: "A valid key is needed.",
    403: "Not with this key, or not from this page.",
    404: "There is no such model or route.",
    405: "The route has other methods.",
    413: "The body is too large.",
    415: "The body is not JSON, or is compressed.",
    422: "A value is not possible here.",
    424: "The model failed.",
    429: "Too much is asked for: try again after the time in Retry-After.",
    500: "The model computed something that is no number.",
    503: "Not ready, or about to stop: try again later.",
    504: "It took too long.",
}


def describe(endpoints: Sequence[Endpoint], *, keys: bool) -> dict[str, Any]:
    """Return the description of all routes; ``keys`` says whether one is needed."""
    bodies = [each.body for each in endpoints if each.body is not None]
    _, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, keys)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Moesaic", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": schemes if keys else {}},
    }


def _operation(endpoint: Endpoint, path: str, keys: bool) -> dict[str, Any]:
    answers = {**ANSWERS, **endpoint.statuses}
    out: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', path)}",
        "responses": {str(status): {"description": about} for status, about in answers.items()},
    }
    if keys and not endpoint.public:
        out["security"] = [{"bearer": []}, {"x-api-key": []}]
    if endpoint.body is not None:
        (schema,), _ = msgspec.json.schema_components([endpoint.body], ref_template="#/components/schemas/{name}")
        out["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    named = re.findall(r"\{(\w+)\}", path)
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in named
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in endpoint.query.items()]
    return out | ({"parameters": parameters} if parameters else {})
