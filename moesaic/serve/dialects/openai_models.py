"""OpenAI's ``/v1/models`` and ``/v1/embeddings``, and vLLM's classification and detokenization."""

from __future__ import annotations

import base64
import struct
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from moesaic import __version__
from moesaic.backend import ModelInfo
from moesaic.errors import InvalidParameter
from moesaic.serve.context import RequestContext
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.endpoint import AnyResponse, Endpoint, Response, openai_failure

STARTED_AT = openai.now()


class EmbeddingBody(Struct):
    """The body of an embedding request. ``input`` is a text, token ids, or a list of either."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: openai.PositiveInt | None = None
    truncate_prompt_tokens: openai.TruncationLength | None = None
    user: str | None = None


class ClassifyBody(Struct):
    """The body of a classification request."""

    input: str | Annotated[list[str], Meta(min_length=1)]
    model: str | None = None


class DetokenizeBody(Struct):
    """The body of a detokenization request."""

    tokens: Annotated[list[openai.NonNegativeInt], Meta(max_length=2**20)]
    model: str | None = None


def model_entry(model: ModelInfo) -> dict[str, Any]:
    """Return a model's entry in the list of models: OpenAI's fields, and those of vLLM, of Anthropic and of our own."""
    return {
        "id": model.name,
        "object": "model",
        "created": STARTED_AT,
        "owned_by": "moesaic",
        "root": model.parent or model.name,
        "parent": model.parent,
        "permission": [],
        "max_model_len": model.context,
        "type": "model",
        "display_name": model.name,
        "created_at": datetime.fromtimestamp(STARTED_AT, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": model.context,
        "state": model.state,
        "task": model.task,
        "description": model.description or None,
        "chat_format": model.about.get("chat_format"),
        "chat_format_note": model.about.get("chat_format_note") or None,
    }


async def models(context: RequestContext) -> AnyResponse:
    """Handle ``/v1/models``: list all models on one page, with the fields of OpenAI's and of Anthropic's list."""
    data = [model_entry(model) for model in context.backend.models()]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return Response({"object": "list", "data": data, "has_more": False} | ends)


async def model(context: RequestContext) -> AnyResponse:
    """Handle ``/v1/models/{name}``: return the entry of one model."""
    return Response(model_entry(openai.find_model(context.backend, context.path_parameters["name"])))


async def embeddings(context: RequestContext) -> AnyResponse:
    """Handle ``/v1/embeddings``: return the embedding vector of each input."""
    body: EmbeddingBody = context.body
    name = openai.model_name(context, body.model)
    texts = _texts(body.input, context.settings.embedding_inputs)
    truncate = openai.truncation(body.truncate_prompt_tokens)
    vectors, prompt_tokens = await context.backend.embed(name, texts, truncate)
    context.spent += prompt_tokens
    if body.dimensions is not None:
        if body.dimensions > len(vectors[0]):
            raise InvalidParameter("dimensions", f"is {body.dimensions}; the vectors have only {len(vectors[0])}")
        vectors = [_truncated(vector, body.dimensions) for vector in vectors]
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(vector) if body.encoding_format == "base64" else vector,
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return Response({"object": "list", "data": data, "model": name, "usage": usage})


def _texts(values: str | list[Any], limit: int) -> list[str | list[int]]:
    if isinstance(values, str):
        return [values]
    if values and all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        values = [values]
    if not 1 <= len(values) <= limit:
        raise InvalidParameter("input", f"has {len(values)} texts, expected 1 to {limit}")
    for item in values:
        ids = (
            isinstance(item, list)
            and item
            and all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in item)
        )
        if not (isinstance(item, str) or ids):
            raise InvalidParameter("input", "expected a text, token ids, or a list of either")
    return values


def _truncated(vector: list[float], size: int) -> list[float]:
    """Return the first ``size`` values of a vector, scaled to the Euclidean length 1."""
    prefix = vector[:size]
    length = sum(value * value for value in prefix) ** 0.5 or 1.0
    return [value / length for value in prefix]


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def classify(context: RequestContext) -> AnyResponse:
    """Handle ``/v1/classify``: return, for each text, the most likely class and the probabilities of all classes."""
    body: ClassifyBody = context.body
    texts = [body.input] if isinstance(body.input, str) else body.input
    if len(texts) > context.settings.prompts:
        raise InvalidParameter("input", f"has {len(texts)} texts, expected 1 to {context.settings.prompts}")
    name = openai.model_name(context, body.model)
    data = []
    for index, scores in enumerate(await context.backend.classify(name, texts)):
        label = max(scores, key=lambda item: scores[item])
        data.append({"index": index, "label": label, "probs": list(scores.values()), "scores": dict(scores)})
    head = {"id": openai.new_id("classify"), "object": "list", "created": openai.now(), "model": name}
    return Response(head | {"data": data})


async def detokenize(context: RequestContext) -> AnyResponse:
    """Handle ``/detokenize``: return the text of token ids."""
    body: DetokenizeBody = context.body
    return Response({"prompt": await context.backend.detokenize(openai.model_name(context, body.model), body.tokens)})


async def version(_: RequestContext) -> AnyResponse:
    """Handle ``/version``: return the server's version."""
    return Response({"version": __version__})


ENDPOINTS = (
    Endpoint("/v1/models", models, openai_failure, method="GET", summary="List the models."),
    Endpoint("/v1/models/{name:path}", model, openai_failure, method="GET", summary="Show one model."),
    Endpoint("/v1/embeddings", embeddings, openai_failure, body=EmbeddingBody, summary="Embed texts."),
    Endpoint("/v1/classify", classify, openai_failure, body=ClassifyBody, summary="Classify texts."),
    Endpoint("/detokenize", detokenize, openai_failure, body=DetokenizeBody, summary="Return the text of token ids."),
    Endpoint("/version", version, openai_failure, method="GET", summary="Return the server's version."),
)
