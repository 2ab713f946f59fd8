"""Text Generation Inference's native API: POST /generate_stream sends an event per token, and no [DONE].

TGI's openapi.json describes the fields. The last event has ``generated_text``. An error is an event too, with HTTP
status 200.
"""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import Any, Self

from moesaic.bench.endpoints import Answer, Endpoint, Request, RequestFailed, RequestOptions
from moesaic.bench.endpoints._http import Client, count, decode, error_message, get_if_known

TEXT = re.compile(r'"token"\s*:\s*\{[^{}]*"text"\s*:\s*"[^"]')
DECODED = re.compile(r'"(?:error|generated_text)"\s*:\s*["{]')


class Dialect(Endpoint):
    """TGI's native API, which takes a text; for conversations, TGI has OpenAI's chat API."""

    name = "tgi"
    path = "/generate_stream"
    probe_order = 2
    supports_messages = False

    @classmethod
    async def recognise(cls, client: Client) -> bool:
        return "model_id" in _info(await get_if_known(client, "/info"))

    @classmethod
    async def open(cls, client: Client, options: RequestOptions, model: str | None) -> Self:
        info = _info(await get_if_known(client, "/info"))
        return cls(client, options, model or str(info.get("model_id", "tgi")), count(info.get("max_total_tokens")))

    async def send(self, request: Request, answer: Answer) -> None:
        finished, body = False, {"inputs": request.prompt, "parameters": self._parameters(request)}
        async with aclosing(self.client.events(self.path, body)) as events:
            async for now, data in events:
                if TEXT.search(data):
                    answer.arrivals.append(now)
                if DECODED.search(data):
                    finished |= _record(decode(data), answer)
        if not finished:
            raise RequestFailed("cut stream", "the stream ended without a generated_text")

    def _parameters(self, request: Request) -> dict[str, Any]:
        parameters: dict[str, Any] = {"max_new_tokens": request.max_tokens, "details": True}
        if self.options.temperature:  # TGI refuses 0, and is greedy without a temperature
            parameters |= {"temperature": self.options.temperature, "do_sample": True}
        return parameters | self.options.extra


def _record(event: dict[str, Any], answer: Answer) -> bool:
    """Record the token counts of an event in ``answer``, and return whether it is the last event.

    Raises:
        RequestFailed: the event is an error.
    """
    if event.get("error"):
        raise RequestFailed("error event", error_message(event))
    if isinstance(details := event.get("details"), dict):
        answer.tokens = count(details.get("generated_tokens"))
        answer.prompt_tokens = count(details.get("input_length"))
    return isinstance(event.get("generated_text"), str)


def _info(reply: Any) -> dict[str, Any]:
    return reply if isinstance(reply, dict) else {}
