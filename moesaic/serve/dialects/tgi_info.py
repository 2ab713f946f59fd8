"""Further routes of TGI: health, limits and tokenization.

``/tokenize`` also accepts vLLM's body, and ``/tokenizer_info`` is vLLM's: lm-eval uses both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from moesaic import __version__
from moesaic.backend import GenerationRequest, TokenInfo
from moesaic.errors import InvalidRequest
from moesaic.serve.context import RequestContext
from moesaic.serve.dialects import _openai as openai
from moesaic.serve.dialects import _tgi as tgi
from moesaic.serve.dialects._messages import Messages, ToolDefinitions, conversation
from moesaic.serve.endpoint import AnyResponse, Endpoint, Response


class TokenizeBody(Struct):
    """The body of a tokenization request: TGI's ``inputs``, or vLLM's ``prompt`` or ``messages``."""

    inputs: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: ToolDefinitions | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    """Whether names of special tokens in a text are read as these tokens; the default is true."""
    return_token_strs: bool | None = None
    """vLLM's field: whether the response has the texts of the tokens; the default is true."""
    chat_template_kwargs: dict[str, Any] | None = None


class ChatTokenizeBody(Struct):
    """The body of a chat tokenization request."""

    messages: Messages
    tools: ToolDefinitions | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    model: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


async def health(context: RequestContext) -> AnyResponse:
    """Answer 200 without a body while the engines of all models are alive, else 503."""
    if all(stats.alive for stats in context.backend.stats().values()):
        return Response(b"")
    return Response({"error": "unhealthy", "error_type": "healthcheck"}, 503)


async def info(context: RequestContext) -> AnyResponse:
    """Handle ``/info``: return the default model and the server's limits, with the fields of TGI 1.3 and 3.3."""
    settings, bounds = context.settings, context.settings.tgi
    model = openai.find_model(context.backend, None)
    longest = tgi.input_tokens(bounds, model.context)
    out = {
        "model_id": model.aliases[0] if model.aliases else model.name,
        "model_sha": None,
        "model_dtype": model.about.get("dtype"),
        "model_device_type": model.about.get("device"),
        "model_pipeline_tag": "text-classification" if model.task == "classify" else "text-generation",
        "max_concurrent_requests": settings.concurrent_requests,
        "max_best_of": bounds.max_best_of,
        "max_stop_sequences": bounds.max_stop_sequences,
        "max_input_tokens": longest,
        "max_input_length": longest,
        "max_total_tokens": tgi.total_tokens(bounds, model.context),
        "max_batch_total_tokens": model.about.get("cache_tokens"),
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
    """Handle ``/tokenize``: return the tokens of a text or conversation, in TGI's form or in vLLM's."""
    body: TokenizeBody = context.body
    name = openai.model_name(context, body.model)
    bos, parse = body.add_special_tokens is not False, body.parse_special is not False
    if body.inputs is not None:
        request = GenerationRequest(name, prompt=body.inputs, parse_special=parse, add_bos=bos)
        return Response(token_spans(await context.backend.tokenize(request), body.inputs))
    if body.messages is not None:
        tokens = await context.backend.tokenize(GenerationRequest(name, **conversation(body.messages, body)))
    elif body.prompt is not None:
        request = GenerationRequest(name, prompt=body.prompt, parse_special=parse, add_bos=bos)
        tokens = await context.backend.tokenize(request)
    else:
        raise InvalidRequest("expected inputs, prompt or messages")
    return Response(
        {
            "count": len(tokens),
            "max_model_len": openai.find_model(context.backend, name).context,
            "tokens": [token.id for token in tokens],
            "token_strs": None if body.return_token_strs is False else [token.text for token in tokens],
        }
    )


async def chat_tokenize(context: RequestContext) -> AnyResponse:
    """Handle ``/chat_tokenize``: return a conversation's prompt in the chat format, as a text and as tokens."""
    body: ChatTokenizeBody = context.body
    name = openai.model_name(context, body.model)
    tokens = await context.backend.tokenize(GenerationRequest(name, **conversation(body.messages, body)))
    text = await context.backend.detokenize(name, [token.id for token in tokens])
    return Response({"tokenize_response": token_spans(tokens, text), "templated_text": text})


async def tokenizer_info(context: RequestContext) -> AnyResponse:
    """Handle ``/tokenizer_info``: return the special tokens of the default model's tokenizer, in vLLM's form."""
    model = openai.find_model(context.backend, None)
    return Response(
        {
            "tokenizer_class": "moesaic",
            "bos_token": model.about.get("bos_token"),
            "eos_token": model.about.get("eos_token"),
            "pad_token": None,
            "chat_template": None,
            "model_max_length": model.context,
        }
    )


def token_spans(tokens: Sequence[TokenInfo], text: str) -> list[dict[str, Any]]:
    """Return tokens in TGI's form, each with its span of characters in ``text`` (``start`` and ``stop``).

    Tokens that are parts of one character share the span of the whole character. A special token whose name is not in
    the text has the empty span from 0 to 0.
    """
    at, spans = 0, [(0, 0)] * len(tokens)
    parts: list[int] = []  # indexes of tokens that are parts of characters
    for index, token in enumerate(tokens):
        start, stop = _span(token, text, at, bool(parts))
        if start >= 0:
            for part in parts:
                spans[part] = at, start
            parts.clear()
            spans[index] = start, stop
            at = stop
        elif not token.special:
            parts.append(index)
    for part in parts:
        spans[part] = at, len(text)
    return [
        {"id": token.id, "text": text[start:stop], "start": start, "stop": stop}
        for token, (start, stop) in zip(tokens, spans, strict=True)
    ]


def _span(token: TokenInfo, text: str, at: int, after_parts: bool) -> tuple[int, int]:
    """Return start and stop of a token's text in ``text``, searched from the index ``at`` on; (-1, -1): not found.

    ``after_parts`` is whether the tokens just before are parts of a character that ends before this token.
    """
    pieces = [piece for piece in (token.text, token.text.removeprefix(" ")) if piece]  # SentencePiece adds a blank
    if not after_parts:
        for piece in pieces:
            if text.startswith(piece, at):
                return at, at + len(piece)
    if not token.special:
        for piece in pieces:
            # Parts make up at least one character, and a tokenizer may drop characters.
            start = -1 if "\ufffd" in piece else text.find(piece, at + after_parts)
            if start >= 0:
                return start, start + len(piece)
    return -1, -1


ENDPOINTS = (
    Endpoint("/", health, tgi.failure, method="GET", public=True, summary="Whether the models are alive (TGI)."),
    Endpoint("/info", info, tgi.failure, method="GET", summary="The default model and the limits (TGI)."),
    Endpoint("/tokenize", tokenize, tgi.failure, body=TokenizeBody, summary="Tokenize a text (TGI, vLLM)."),
    Endpoint(
        "/chat_tokenize", chat_tokenize, tgi.failure, body=ChatTokenizeBody, summary="Tokenize a conversation (TGI)."
    ),
    Endpoint(
        "/tokenizer_info", tokenizer_info, tgi.failure, method="GET", summary="Special tokens of the tokenizer (vLLM)."
    ),
)
