"""OpenAI's chat API, streamed: POST /v1/chat/completions, as vLLM, TGI, SGLang, llama.cpp and others serve it."""

from __future__ import annotations

from moesaic.bench.endpoints import Answer, Request
from moesaic.bench.endpoints._openai import OpenAI


class Dialect(OpenAI):
    """OpenAI's chat API; a prompt is sent as a user's first message."""

    name = "openai-chat"
    path = "/v1/chat/completions"
    probe_order = 1

    async def send(self, request: Request, answer: Answer) -> None:
        messages = list(request.messages) or [{"role": "user", "content": request.prompt}]
        await self.stream(self.body(request) | {"messages": messages}, answer)
