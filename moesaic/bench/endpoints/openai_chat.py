"""OpenAI's chat: POST /v1/chat/completions, streaming, as vLLM, TGI, SGLang, llama.cpp and others serve it."""

from __future__ import annotations

from moesaic.bench.endpoints import Answer, Ask
from moesaic.bench.endpoints._openai import OpenAI


class Dialect(OpenAI):
    """A prompt is a user's first message."""

    name = "openai-chat"
    path = "/v1/chat/completions"
    rank = 1

    async def answer(self, ask: Ask, answer: Answer) -> None:
        messages = list(ask.messages) or [{"role": "user", "content": ask.prompt}]
        await self.stream(self.body(ask) | {"messages": messages}, answer)
