"""What there is to ask: OpenAI's ``/v1/models``, and its embeddings; vLLM's tokenizing and classifying."""

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

BEGUN = openai.now()


class EmbeddingBody(Struct):
    """Texts, or token ids, to make vectors of."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: openai.Positive | None = None
    user: str | None = None


class ClassifyBody(Struct):
    """Texts to tell the class of."""

    input: str | Annotated[list[str], Meta(min_length=1)]
    model: str | None = None


class DetokenizeBody(Struct):
    """Token ids to be text again."""

    tokens: Annotated[list[openai.Whole], Meta(max_length=2**20)]
    model: str | None = None


def shown(card: ModelInfo) -> dict[str, Any]:
    """Return a model as OpenAI lists it, with vLLM's fields, Anthropic's and ours."""
    return {
        "id": card.name,
        "object": "model",
        "created": BEGUN,
        "owned_by": "moesaic",
        "root": card.name,
        "parent": None,
        "permission": [],
        "max_model_len": card.context,
        "type": "model",
        "display_name": card.name,
        "created_at": datetime.fromtimestamp(BEGUN, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": card.context,
        "state": card.state,
        "task": card.task,
    }


async def models(context: RequestContext) -> AnyResponse:
    """List the models; a page of Anthropic's as well, and the only one."""
    data = [shown(card) for card in context.backend.models()]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return Response({"object": "list", "data": data, "has_more": False} | ends)


async def model(context: RequestContext) -> AnyResponse:
    """Show one model."""
    return Response(shown(openai.card_of(context.backend, context.path_parameters["name"])))


async def embeddings(context: RequestContext) -> AnyResponse:
    """Make a vector of each text."""
    body: EmbeddingBody = context.body
    name = openai.model_of(context, body.model)
    texts = _texts(body.input, context.settings.prompts)
    vectors, read = await context.backend.embed(name, texts)
    context.spent += read
    if body.dimensions is not None:
        if body.dimensions > len(vectors[0]):
            raise InvalidParameter("dimensions", f"is {body.dimensions}, but the vectors have {len(vectors[0])}")
        vectors = [_shortened(vector, body.dimensions) for vector in vectors]
    data = [
        {
            "object": "embedding",
            "index": place,
            "embedding": vector if body.encoding_format == "float" else _packed(vector),
        }
        for place, vector in enumerate(vectors)
    ]
    used = {"prompt_tokens": read, "total_tokens": read}
    return Response({"object": "list", "data": data, "model": name, "usage": used})


def _texts(given: str | list[Any], most: int) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(each, int) and not isinstance(each, bool) for each in given):
        given = [given]
    if not 1 <= len(given) <= most:
        raise InvalidParameter("input", f"holds {len(given)} texts, expected 1 to {most}")
    for each in given:
        ids = isinstance(each, list) and each and all(type(id) is int and 0 <= id < 2**31 for id in each)
        if not (isinstance(each, str) or ids):
            raise InvalidParameter("input", "expected a text, token ids, or a list of either")
    return given


def _shortened(vector: list[float], size: int) -> list[float]:
    """Return the first numbers of a vector, of length 1 again."""
    kept = vector[:size]
    length = sum(value * value for value in kept) ** 0.5 or 1.0
    return [value / length for value in kept]


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def classify(context: RequestContext) -> AnyResponse:
    """Tell how likely each class is for each text."""
    body: ClassifyBody = context.body
    texts = [body.input] if isinstance(body.input, str) else body.input
    if len(texts) > context.settings.prompts:
        raise InvalidParameter("input", f"holds {len(texts)} texts, expected 1 to {context.settings.prompts}")
    name = openai.model_of(context, body.model)
    data = []
    for place, scores in enumerate(await context.backend.classify(name, texts)):
        label = max(scores, key=lambda each: scores[each])
        data.append({"index": place, "label": label, "probs": list(scores.values()), "scores": dict(scores)})
    head = {"id": openai.new_id("classify"), "object": "list", "created": openai.now(), "model": name}
    return Response(head | {"data": data})


async def detokenize(context: RequestContext) -> AnyResponse:
    """Return the text of token ids."""
    body: DetokenizeBody = context.body
    return Response({"prompt": await context.backend.detokenize(openai.model_of(context, body.model), body.tokens)})


async def version(_: RequestContext) -> AnyResponse:
    """Return which version this is."""
    return Response({"version": __version__})


ENDPOINTS = (
    Endpoint("/v1/models", models, openai_failure, method="GET", summary="List the models."),
    Endpoint("/v1/models/{name:path}", model, openai_failure, method="GET", summary="Show one model."),
    Endpoint("/v1/embeddings", embeddings, openai_failure, body=EmbeddingBody, summary="Make vectors of texts."),
    Endpoint("/v1/classify", classify, openai_failure, body=ClassifyBody, summary="Tell the class of texts."),
    Endpoint("/detokenize", detokenize, openai_failure, body=DetokenizeBody, summary="Text of token ids."),
    Endpoint("/version", version, openai_failure, method="GET", summary="The version."),
)
