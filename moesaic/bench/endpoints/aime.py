"""The AIME API server's clients: POST /<endpoint>, then GET /<endpoint>/progress again and again.

An answer's text comes whole with each reply about its progress, so a piece of text is what one reply has
beyond the one before: many tokens, as many as were made since. What such a client sees is measured here, its
waiting between two questions included (``--poll``, as AIME's own clients 0.3 seconds).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Self

from moesaic.bench.endpoints import Answer, Ask, Endpoint, Failed, Manner
from moesaic.bench.endpoints._http import Client, clock, count, knows, said
from moesaic.errors import InvalidRequest


class Dialect(Endpoint):
    """The model's name is its endpoint's, such as mixtral_chat."""

    name = "aime"
    path = ""
    rank = 3

    def __init__(
        self,
        client: Client,
        manner: Manner,
        model: str,
        session: str | None = None,
        inputs: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(client, manner, model)
        known = {"client_session_auth_key": session, "key": client.key}
        self._keys = {name: value for name, value in known.items() if value}
        self._inputs = inputs

    @classmethod
    async def recognise(cls, client: Client) -> bool:
        return _endpoints(await knows(client, "/api/endpoints")) is not None

    @classmethod
    async def open(cls, client: Client, manner: Manner, model: str | None) -> Self:
        name = model or await _only(client)
        details = await knows(client, f"/api/endpoints/{name}") or await knows(client, f"/api/{name}")
        session = await _login(client, name) if client.key else None
        return cls(client, manner, name, session, _inputs(details))

    async def answer(self, ask: Ask, answer: Answer) -> None:
        reply = _object(await self.client.post(f"/{self.model}", self._body(ask)))
        job = reply.get("job_id")
        if not reply.get("success") or not isinstance(job, str):
            raise Failed("error event", said(reply.get("error") or "no job_id"))
        query, length, state = {"job_id": job} | self._keys, 0, ""
        while state != "done":
            await asyncio.sleep(self.manner.poll)
            reply = _object(await self.client.get(f"/{self.model}/progress", query))
            now, state = clock(), str(reply.get("job_state"))
            if not reply.get("success") or state in ("lapsed", "canceled"):
                raise Failed("error event", said(reply.get("error") or f"the job was {state}"))
            length = _note(reply, length, now, answer)

    def _body(self, ask: Ask) -> dict[str, Any]:
        """Return what is sent: the last message as the prompt, and as context what was said before.

        Their newer endpoints have no prompt: they take conversations alone.
        """
        messages = list(ask.messages) or [{"role": "user", "content": ask.prompt}]
        body: dict[str, Any] = {"max_gen_tokens": ask.max_tokens, "wait_for_result": False}
        if "prompt_input" in self._inputs or not self._inputs:
            body["prompt_input"] = messages.pop()["content"]
        if messages:
            body["chat_context"] = json.dumps(messages)
        if self.manner.temperature is not None:
            body["temperature"] = self.manner.temperature
        return body | self.manner.extra | self._keys


def _note(reply: dict[str, Any], length: int, now: float, answer: Answer) -> int:
    """Note what a reply about progress tells beyond ``length`` characters, and return how many there are now.

    Raises:
        Failed: the worker failed.
    """
    progress = reply.get("progress")
    found = reply.get("job_result") or (progress.get("progress_data") if isinstance(progress, dict) else None)
    if not isinstance(found, dict):
        return length
    if found.get("error"):
        raise Failed("error event", said(found["error"]))
    text = found.get("text")
    if isinstance(text, str) and len(text) > length:
        answer.arrivals.append(now)
        length = len(text)
    tokens = count(found.get("num_generated_tokens"))
    whole, prompt = count(found.get("current_context_length")), count(found.get("prompt_length"))
    answer.tokens = tokens if tokens is not None else answer.tokens
    if prompt is None and tokens is not None and whole is not None and whole > tokens:
        prompt = whole - tokens
    answer.prompt_tokens = prompt if prompt is not None else answer.prompt_tokens
    return length


async def _login(client: Client, name: str) -> str | None:
    query = {"user": "moesaic", "key": client.key or "", "version": "Moesaic"}
    reply = _object(await client.get(f"/{name}/login", query))
    if not reply.get("success"):
        raise InvalidRequest(f"{client.root} does not let us in: {said(reply.get('error') or 'no reason given')}")
    session = reply.get("client_session_auth_key")
    return session if isinstance(session, str) else None


async def _only(client: Client) -> str:
    """Return the name of the server's only endpoint."""
    found = _endpoints(await knows(client, "/api/endpoints")) or []
    if len(found) != 1:
        what = f"has {', '.join(found)}" if found else "names no endpoint"
        raise InvalidRequest(f"{client.root} {what}: choose one with --model")
    return found[0]


def _endpoints(reply: Any) -> list[str] | None:
    found = reply.get("endpoints") if isinstance(reply, dict) else None
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else None


def _inputs(details: Any) -> frozenset[str]:
    """Return the parameters that an endpoint says it takes; none if it does not say."""
    described = details.get("parameter_description") if isinstance(details, dict) else None
    inputs = described.get("input") if isinstance(described, dict) else None
    return frozenset(inputs) if isinstance(inputs, dict) else frozenset()


def _object(reply: Any) -> dict[str, Any]:
    if not isinstance(reply, dict):
        raise Failed("bad reply", "no JSON object")
    return reply
