"""Text Generation Inference: POST /generate_stream, an event for each token, no [DONE].

What the fields mean: TGI's openapi.json. The last event has ``generated_text``; an error comes with status
200, as an event.
"""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import Any, Self

from moesaic.bench.endpoints import Answer, Ask, Endpoint, Failed, Manner
from moesaic.bench.endpoints._http import Client, count, decode, knows, said

TEXT = re.compile(r'"token"\s*:\s*\{[^{}]*"text"\s*:\s*"[^"]')
WHOLE = re.compile(r'"(?:error|generated_text)"\s*:\s*["{]')


class Dialect(Endpoint):
    """It takes a text; its own chat route is OpenAI's."""

    name = "tgi"
    path = "/generate_stream"
    rank = 2
    chats = False

    @classmethod
    async def recognise(cls, client: Client) -> bool:
        return "model_id" in _info(await knows(client, "/info"))

    @classmethod
    async def open(cls, client: Client, manner: Manner, model: str | None) -> Self:
        info = _info(await knows(client, "/info"))
        return cls(client, manner, model or str(info.get("model_id", "tgi")), count(info.get("max_total_tokens")))

    async def answer(self, ask: Ask, answer: Answer) -> None:
        ended, body = False, {"inputs": ask.prompt, "parameters": self._parameters(ask)}
        async with aclosing(self.client.events(self.path, body)) as events:
            async for now, data in events:
                if TEXT.search(data):
                    answer.arrivals.append(now)
                if WHOLE.search(data):
                    ended |= _note(decode(data), answer)
        if not ended:
            raise Failed("cut stream", "it ended without a generated_text")

    def _parameters(self, ask: Ask) -> dict[str, Any]:
        parameters: dict[str, Any] = {"max_new_tokens": ask.max_tokens, "details": True}
        if self.manner.temperature:  # 0 is refused: without a temperature it is greedy
            parameters |= {"temperature": self.manner.temperature, "do_sample": True}
        return parameters | self.manner.extra


def _note(event: dict[str, Any], answer: Answer) -> bool:
    """Note what an event counts, and return whether it is the last.

    Raises:
        Failed: it is an error.
    """
    if event.get("error"):
        raise Failed("error event", said(event))
    if isinstance(details := event.get("details"), dict):
        answer.tokens = count(details.get("generated_tokens"))
        answer.prompt_tokens = count(details.get("input_length"))
    return isinstance(event.get("generated_text"), str)


def _info(reply: Any) -> dict[str, Any]:
    return reply if isinstance(reply, dict) else {}
