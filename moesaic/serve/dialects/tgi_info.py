"""What TGI's clients ask besides answers: is it well, what does it allow, how is a text cut into tokens.

``/tokenize`` is vLLM's, too, and ``/tokenizer_info`` is vLLM's alone: lm-eval asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from moesaic import __version__
from moesaic.backend import GenerationRequest, TokenInfo
from moesaic.errors import InvalidMessages, InvalidRequest
from moesaic.serve.context import RequestContext
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.dialects import _tgi as tgi
from moesaic.serve.endpoint import AnyResponse, Endpoint, Response


class Turn(Struct):
    """One turn of a conversation."""

    role: Annotated[str, Meta(max_length=32)]
    content: str | list[dict[str, Any]] = ""


class TokenizeBody(Struct):
    """A text as TGI has it (``inputs``), or a text or a conversation as vLLM has them (``prompt``, ``messages``)."""

    inputs: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=4096)] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None


class ChatTokenizeBody(Struct):
    """A conversation."""

    messages: Annotated[list[Turn], Meta(min_length=1, max_length=4096)]
    model: str | None = None


async def health(context: RequestContext) -> AnyResponse:
    """Answer with nothing if the models can still answer."""
    if all(load.alive for load in context.backend.stats().values()):
        return Response(b"")
    return Response({"error": "unhealthy", "error_type": "healthcheck"}, 503)


async def info(context: RequestContext) -> AnyResponse:
    """Tell which model it is and what is allowed: the fields of TGI 1.3 and of 3.3 together."""
    settings, bounds = context.settings, context.settings.tgi
    card = openai.card_of(context.backend, None)
    longest = tgi.input_tokens(bounds, card.context)
    out = {
        "model_id": card.aliases[0] if card.aliases else card.name,
        "model_sha": None,
        "model_dtype": card.about.get("dtype"),
        "model_device_type": card.about.get("device"),
        "model_pipeline_tag": "text-classification" if card.task == "classify" else "text-generation",
        "max_concurrent_requests": settings.concurrent_requests,
        "max_best_of": bounds.max_best_of,
        "max_stop_sequences": bounds.max_stop_sequences,
        "max_input_tokens": longest,
        "max_input_length": longest,
        "max_total_tokens": tgi.total_tokens(bounds, card.context),
        "max_batch_total_tokens": card.about.get("cache_tokens"),
        "max_client_batch_size": settings.prompts,
        "waiting_served_ratio": 0.3,
        "max_waiting_tokens": 20,
        "validation_workers": 2,
        "router": "moesaic",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
    return Response({**out, **bounds.launcher_info})


async def tokenize(context: RequestContext) -> AnyResponse:
    """Return a text's tokens, in the shape that the body asks for."""
    body: TokenizeBody = context.body
    name = openai.model_of(context, body.model)
    bos = body.add_special_tokens is not False
    if body.inputs is not None:
        marks = await context.backend.tokenize(
            GenerationRequest(name, prompt=body.inputs, parse_special=True, add_bos=bos)
        )
        return Response(placed(marks, body.inputs))
    if body.messages is not None:
        marks = await context.backend.tokenize(GenerationRequest(name, messages=_messages(body.messages)))
    elif body.prompt is not None:
        marks = await context.backend.tokenize(GenerationRequest(name, prompt=body.prompt, add_bos=bos))
    else:
        raise InvalidRequest("expected inputs, prompt or messages")
    return Response(
        {
            "count": len(marks),
            "max_model_len": openai.card_of(context.backend, name).context,
            "tokens": [mark.id for mark in marks],
            "token_strs": [mark.text for mark in marks],
        }
    )


async def chat_tokenize(context: RequestContext) -> AnyResponse:
    """Return a conversation as the text that the model reads, and its tokens."""
    body: ChatTokenizeBody = context.body
    name = openai.model_of(context, body.model)
    marks = await context.backend.tokenize(GenerationRequest(name, messages=_messages(body.messages)))
    text = await context.backend.detokenize(name, [mark.id for mark in marks])
    return Response({"tokenize_response": placed(marks, text), "templated_text": text})


async def tokenizer_info(context: RequestContext) -> AnyResponse:
    """Tell what is special about the tokenizer, as far as vLLM's clients ask."""
    card = openai.card_of(context.backend, None)
    return Response(
        {
            "tokenizer_class": "moesaic",
            "bos_token": card.about.get("bos_token"),
            "eos_token": card.about.get("eos_token"),
            "pad_token": None,
            "chat_template": None,
            "model_max_length": card.context,
        }
    )


def _messages(turns: Sequence[Turn]) -> tuple[dict[str, Any], ...]:
    out = []
    for place, turn in enumerate(turns):
        content = turn.content
        if not isinstance(content, str):
            parts = [part.get("text") for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise InvalidMessages(f"messages[{place}] has a part that is no text: this model reads text only")
            content = "".join(map(str, parts))
        out.append({"role": turn.role, "content": content})
    return tuple(out)


def placed(marks: Sequence[TokenInfo], text: str) -> list[dict[str, Any]]:
    """Return tokens with the characters that each stands for; a special token that is not in the text has none.

    Tokens that are parts of characters get all the characters that they make up with their neighbours.
    """
    at, spans = 0, [(0, 0)] * len(marks)
    parts: list[int] = []  # places of tokens that are parts of characters
    for place, mark in enumerate(marks):
        start, stop = _span(mark, text, at, bool(parts))
        if start >= 0:
            for part in parts:
                spans[part] = at, start
            parts.clear()
            spans[place] = start, stop
            at = stop
        elif not mark.special:
            parts.append(place)
    for part in parts:
        spans[part] = at, len(text)
    return [
        {"id": mark.id, "text": text[start:stop], "start": start, "stop": stop}
        for mark, (start, stop) in zip(marks, spans, strict=True)
    ]


def _span(mark: TokenInfo, text: str, at: int, behind_parts: bool) -> tuple[int, int]:
    """Return where a token stands in the text from ``at`` on; -1 for one that is not there as it is shown."""
    pieces = [piece for piece in (mark.text, mark.text.removeprefix(" ")) if piece]  # SentencePiece adds a space
    if not behind_parts:
        for piece in pieces:
            if text.startswith(piece, at):
                return at, at + len(piece)
    if not mark.special:
        for piece in pieces:
            # Parts are of one character at least; and a tokenizer may leave characters out.
            start = -1 if "\ufffd" in piece else text.find(piece, at + behind_parts)
            if start >= 0:
                return start, start + len(piece)
    return -1, -1


ENDPOINTS = (
    Endpoint("/", health, tgi.failure, method="GET", public=True, summary="Whether it is alive."),
    Endpoint("/info", info, tgi.failure, method="GET", summary="The model, and what is allowed (TGI)."),
    Endpoint("/tokenize", tokenize, tgi.failure, body=TokenizeBody, summary="A text's tokens (TGI's or vLLM's way)."),
    Endpoint(
        "/chat_tokenize", chat_tokenize, tgi.failure, body=ChatTokenizeBody, summary="A conversation's tokens (TGI)."
    ),
    Endpoint("/tokenizer_info", tokenizer_info, tgi.failure, method="GET", summary="Special tokens (vLLM)."),
)
