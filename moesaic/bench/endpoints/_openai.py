"""What OpenAI's two ways of asking share: the list of models, and a stream's events.

An event is looked at as bytes. Only one that ends something, counts or complains is decoded: at ten
thousand events a second, JSON would be a noticeable part of what the client does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Self

from moesaic.bench.endpoints import Answer, Ask, Endpoint, Failed, Manner
from moesaic.bench.endpoints._http import Client, count, decode, knows, said
from moesaic.errors import InvalidRequest

TEXT = re.compile(r'"(?:content|text|reasoning_content|reasoning)"\s*:\s*"[^"]')
"""A text that is not empty. Inside of a text every quote has a backslash before it, so nothing there looks so."""
WHOLE = re.compile(r'"(?:error|usage|finish_reason)"\s*:\s*["{\[]|"object"\s*:\s*"error"')
"""What is decoded: an error, a usage, a reason to end; not null."""


class OpenAI(Endpoint):
    """A server that has /v1/models and streams in OpenAI's way."""

    ignores_eos = True  # an extra of vLLM, which others pass over

    @classmethod
    async def recognise(cls, client: Client) -> bool:
        return bool(_cards(await knows(client, "/v1/models")))

    @classmethod
    async def open(cls, client: Client, manner: Manner, model: str | None) -> Self:
        cards = _cards(await knows(client, "/v1/models"))
        if model is None and not cards:
            raise InvalidRequest(f"{client.root}/v1/models names no model: name one with --model")
        card = next((card for card in cards if model in (None, card["id"])), {})
        return cls(client, manner, model or card["id"], count(card.get("max_model_len")))

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return what is sent, but for the question."""
        body = {
            "model": self.model,
            "max_tokens": ask.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.manner.temperature is not None:
            body["temperature"] = self.manner.temperature
        if self.manner.ignore_eos:
            body["ignore_eos"] = True
        return body | self.manner.extra

    async def stream(self, body: Mapping[str, Any], answer: Answer) -> None:
        """Send ``body`` and note what comes."""
        arrived, ended = answer.arrivals.append, False
        async with aclosing(self.client.events(self.path, body)) as events:
            async for now, data in events:
                if TEXT.search(data):
                    arrived(now)
                if data == "[DONE]":
                    ended = True
                elif WHOLE.search(data):
                    ended |= _note(decode(data), answer)
        if not ended:
            raise Failed("cut stream", "it ended without a finish_reason")


def _note(event: dict[str, Any], answer: Answer) -> bool:
    """Note what an event counts, and return whether it ends the answer.

    Raises:
        Failed: it is an error.
    """
    if event.get("error") or event.get("object") == "error":
        raise Failed("error event", said(event.get("error") or event))
    if isinstance(usage := event.get("usage"), dict):
        answer.tokens = count(usage.get("completion_tokens"))
        answer.prompt_tokens = count(usage.get("prompt_tokens"))
    choices = event.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") for choice in choices
    )


def _cards(reply: Any) -> list[dict[str, Any]]:
    data = reply.get("data") if isinstance(reply, dict) else None
    cards = data if isinstance(data, list) else []
    return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]
