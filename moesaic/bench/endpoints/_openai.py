"""Base class of OpenAI's two streaming APIs: the list of models, and the events of a stream.

Events are searched as text. Only an event that ends an answer, counts tokens or reports an error is decoded: at ten
thousand events per second, decoding every event would be a noticeable part of the client's work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Self

from moesaic.bench.endpoints import Answer, Endpoint, Request, RequestFailed, RequestOptions
from moesaic.bench.endpoints._http import Client, count, decode, error_message, get_if_known
from moesaic.errors import InvalidRequest

TEXT = re.compile(r'"(?:content|text|reasoning_content|reasoning)"\s*:\s*"[^"]')
"""Matches an event with a text that is not empty. It cannot match inside a text, where every quote has a backslash
before it."""
DECODED = re.compile(r'"(?:error|usage|finish_reason)"\s*:\s*["{\[]|"object"\s*:\s*"error"')
"""Matches events to decode: those with an error, a usage or a finish reason that is not null."""


class OpenAI(Endpoint):
    """A server that has /v1/models and streams in OpenAI's format."""

    supports_ignore_eos = True  # an extension of vLLM, which other servers ignore

    @classmethod
    async def recognise(cls, client: Client) -> bool:
        return bool(_models(await get_if_known(client, "/v1/models")))

    @classmethod
    async def open(cls, client: Client, options: RequestOptions, model: str | None) -> Self:
        models = _models(await get_if_known(client, "/v1/models"))
        if model is None and not models:
            raise InvalidRequest(f"{client.root}/v1/models names no model: pass --model")
        match = next((entry for entry in models if model in (None, entry["id"])), {})
        return cls(client, options, model or match["id"], count(match.get("max_model_len")))

    def body(self, request: Request) -> dict[str, Any]:
        """Return the fields of a request's body, without its prompt or messages."""
        body = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.options.temperature is not None:
            body["temperature"] = self.options.temperature
        if self.options.ignore_eos:
            body["ignore_eos"] = True
        return body | self.options.extra

    async def stream(self, body: Mapping[str, Any], answer: Answer) -> None:
        """Send ``body`` and record the events of the stream in ``answer``."""
        arrived, finished = answer.arrivals.append, False
        async with aclosing(self.client.events(self.path, body)) as events:
            async for now, data in events:
                if TEXT.search(data):
                    arrived(now)
                if data == "[DONE]":
                    finished = True
                elif DECODED.search(data):
                    finished |= _record(decode(data), answer)
        if not finished:
            raise RequestFailed("cut stream", "the stream ended without a finish_reason")


def _record(event: dict[str, Any], answer: Answer) -> bool:
    """Record the token counts of an event in ``answer``, and return whether the event ends it.

    Raises:
        RequestFailed: the event is an error.
    """
    if event.get("error") or event.get("object") == "error":
        raise RequestFailed("error event", error_message(event.get("error") or event))
    if isinstance(usage := event.get("usage"), dict):
        answer.tokens = count(usage.get("completion_tokens"))
        answer.prompt_tokens = count(usage.get("prompt_tokens"))
    choices = event.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") for choice in choices
    )


def _models(reply: Any) -> list[dict[str, Any]]:
    data = reply.get("data") if isinstance(reply, dict) else None
    models = data if isinstance(data, list) else []
    return [model for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]
