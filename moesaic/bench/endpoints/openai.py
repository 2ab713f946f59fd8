"""OpenAI's completions API, streamed: POST /v1/completions continues a text without a chat template."""

from __future__ import annotations

from moesaic.bench.endpoints import Answer, Request
from moesaic.bench.endpoints._openai import OpenAI


class Dialect(OpenAI):
    """OpenAI's completions API. ``auto`` never selects it: a server with /v1/models usually has the chat API too."""

    name = "openai"
    path = "/v1/completions"
    supports_messages = False

    async def send(self, request: Request, answer: Answer) -> None:
        await self.stream(self.body(request) | {"prompt": request.prompt}, answer)
