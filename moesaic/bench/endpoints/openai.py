"""OpenAI's completions: POST /v1/completions, streaming: a text is continued, without a chat template."""

from __future__ import annotations

from moesaic.bench.endpoints import Answer, Ask
from moesaic.bench.endpoints._openai import OpenAI


class Dialect(OpenAI):
    """Asked for by name alone: who has /v1/models usually has the chat too."""

    name = "openai"
    path = "/v1/completions"
    chats = False

    async def answer(self, ask: Ask, answer: Answer) -> None:
        await self.stream(self.body(ask) | {"prompt": ask.prompt}, answer)
