"""The AIME API server: POST /<endpoint>, then GET /<endpoint>/progress until the job is done.

Each progress reply has the whole text so far. A piece of text is therefore the difference of two replies and usually
has many tokens. The figures are what such a client sees, including the pauses between its progress requests
(``--poll``; 0.3 seconds, as in the clients that AIME publishes).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Self

from moesaic.bench.endpoints import Answer, Endpoint, Request, RequestFailed, RequestOptions
from moesaic.bench.endpoints._http import Client, clock, count, error_message, get_if_known
from moesaic.errors import InvalidRequest


class Dialect(Endpoint):
    """The API of the AIME API server; the model's name is the name of its endpoint, for example mixtral_chat."""

    name = "aime"
    path = ""
    probe_order = 3

    def __init__(
        self,
        client: Client,
        options: RequestOptions,
        model: str,
        session: str | None = None,
        inputs: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(client, options, model)
        keys = {"client_session_auth_key": session, "key": client.key}
        self._keys = {name: value for name, value in keys.items() if value}
        self._inputs = inputs

    @classmethod
    async def recognise(cls, client: Client) -> bool:
        return _endpoints(await get_if_known(client, "/api/endpoints")) is not None

    @classmethod
    async def open(cls, client: Client, options: RequestOptions, model: str | None) -> Self:
        name = model or await _only_endpoint(client)
        details = await get_if_known(client, f"/api/endpoints/{name}") or await get_if_known(client, f"/api/{name}")
        session = await _login(client, name) if client.key else None
        return cls(client, options, name, session, _inputs(details))

    async def send(self, request: Request, answer: Answer) -> None:
        reply = _object(await self.client.post(f"/{self.model}", self._body(request)))
        job_id = reply.get("job_id")
        if not reply.get("success") or not isinstance(job_id, str):
            raise RequestFailed("error event", error_message(reply.get("error") or "the response has no job_id"))
        query, length, state = {"job_id": job_id} | self._keys, 0, ""
        while state != "done":
            await asyncio.sleep(self.options.poll)
            reply = _object(await self.client.get(f"/{self.model}/progress", query))
            now, state = clock(), str(reply.get("job_state"))
            if not reply.get("success") or state in ("lapsed", "canceled"):
                raise RequestFailed("error event", error_message(reply.get("error") or f"the job was {state}"))
            length = _record(reply, length, now, answer)

    def _body(self, request: Request) -> dict[str, Any]:
        """Return the body of a request: the last message as the prompt, and the earlier messages as context.

        Newer endpoints of the AIME API server have no prompt; they take only a conversation.
        """
        messages = list(request.messages) or [{"role": "user", "content": request.prompt}]
        body: dict[str, Any] = {"max_gen_tokens": request.max_tokens, "wait_for_result": False}
        if "prompt_input" in self._inputs or not self._inputs:
            body["prompt_input"] = messages.pop()["content"]
        if messages:
            body["chat_context"] = json.dumps(messages)
        if self.options.temperature is not None:
            body["temperature"] = self.options.temperature
        return body | self.options.extra | self._keys


def _record(reply: dict[str, Any], length: int, now: float, answer: Answer) -> int:
    """Record what a progress reply adds to the answer, and return the new length of the text in characters.

    Raises:
        RequestFailed: the worker reports an error.
    """
    progress = reply.get("progress")
    result = reply.get("job_result") or (progress.get("progress_data") if isinstance(progress, dict) else None)
    if not isinstance(result, dict):
        return length
    if result.get("error"):
        raise RequestFailed("error event", error_message(result["error"]))
    text = result.get("text")
    if isinstance(text, str) and len(text) > length:
        answer.arrivals.append(now)
        length = len(text)
    tokens = count(result.get("num_generated_tokens"))
    context, prompt = count(result.get("current_context_length")), count(result.get("prompt_length"))
    answer.tokens = tokens if tokens is not None else answer.tokens
    if prompt is None and tokens is not None and context is not None and context > tokens:
        prompt = context - tokens
    answer.prompt_tokens = prompt if prompt is not None else answer.prompt_tokens
    return length


async def _login(client: Client, name: str) -> str | None:
    query = {"user": "moesaic", "key": client.key or "", "version": "Moesaic"}
    reply = _object(await client.get(f"/{name}/login", query))
    if not reply.get("success"):
        raise InvalidRequest(
            f"{client.root} refuses the login: {error_message(reply.get('error') or 'no reason given')}"
        )
    session = reply.get("client_session_auth_key")
    return session if isinstance(session, str) else None


async def _only_endpoint(client: Client) -> str:
    """Return the name of the server's only endpoint.

    Raises:
        InvalidRequest: the server has several endpoints or names none.
    """
    names = _endpoints(await get_if_known(client, "/api/endpoints")) or []
    if len(names) != 1:
        problem = f"has the endpoints {', '.join(names)}" if names else "names no endpoint"
        raise InvalidRequest(f"{client.root} {problem}: pass one with --model")
    return names[0]


def _endpoints(reply: Any) -> list[str] | None:
    names = reply.get("endpoints") if isinstance(reply, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else None


def _inputs(details: Any) -> frozenset[str]:
    """Return the names of the parameters that an endpoint lists; empty if it lists none."""
    described = details.get("parameter_description") if isinstance(details, dict) else None
    inputs = described.get("input") if isinstance(described, dict) else None
    return frozenset(inputs) if isinstance(inputs, dict) else frozenset()


def _object(reply: Any) -> dict[str, Any]:
    if not isinstance(reply, dict):
        raise RequestFailed("bad reply", "the response is not a JSON object")
    return reply
