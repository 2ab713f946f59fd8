"""The OpenAPI description of a server's routes, generated from the endpoints and the types of their bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from moesaic import __version__
from moesaic.serve.endpoint import Endpoint

STATUS_DESCRIPTIONS = {
    200: "The response; server-sent events if a stream was requested.",
    400: "The request is invalid.",
    401: "A valid key is required.",
    403: "The key, or the page's origin, does not allow this.",
    404: "Unknown model or route.",
    405: "The route does not support this method.",
    413: "The body is too large.",
    415: "The body is not JSON, or is compressed.",
    422: "A value is out of range.",
    424: "The model failed.",
    429: "A limit is reached: try again after the time in Retry-After.",
    500: "Internal error, or the model computed a value that is not finite.",
    503: "Not ready, or draining: try again later.",
    504: "A time limit was exceeded.",
}


class Description:
    """The OpenAPI description of a server's routes. Its JSON is made once and cached."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints
        self._encoded: dict[bool, bytes] = {}

    def as_json(self, *, keys: bool) -> bytes:
        """Return the OpenAPI description as JSON. ``keys`` is whether the server requires API keys."""
        if keys not in self._encoded:
            self._encoded[keys] = msgspec.json.encode(describe(self._endpoints, keys=keys))
        return self._encoded[keys]


def describe(endpoints: Sequence[Endpoint], *, keys: bool) -> dict[str, Any]:
    """Return the OpenAPI description of the endpoints. ``keys`` is whether the server requires API keys."""
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
    statuses = {**STATUS_DESCRIPTIONS, **endpoint.statuses}
    out: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', path)}",
        "responses": {str(status): {"description": about} for status, about in statuses.items()},
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
