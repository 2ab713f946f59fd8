"""A server that answers workers as AIME's 0.9.6 does, its faults included; see test_worker.py.

One list of jobs; a request for jobs waits; the list of updates is read up to the first job that is not there; a result
that comes again gets 500. Written from a description of its behaviour.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from aiohttp import web

KEY, JOB_TYPE = "worker-key", "mixtral"


class AimeServer:
    """Serves on loopback; ``asked``, ``updates`` and ``results`` have what came."""

    def __init__(self, request_timeout: float = 0.5) -> None:
        self.request_timeout = request_timeout
        self.queue: deque[dict[str, Any]] = deque()
        self.states: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.updates: list[dict[str, Any]] = []
        self.results: dict[str, dict[str, Any]] = {}
        self.deliveries = 0
        self.lose_replies = False
        self.cancel: set[str] = set()
        self.one_shape = False
        """Whether job_data is no list, as long ago."""
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        for name in ("check_server_status", "job_request", "job_progress", "job_result"):
            app.router.add_post(f"/worker_{name}", getattr(self, name))
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        assert self._runner
        await self._runner.cleanup()

    def add(self, id: str, **params: Any) -> None:
        chat = {"prompt_input": "Hi", "chat_context": "", "top_k": 40, "top_p": 0.9, "temperature": 0.8}
        self.queue.append({**chat, "max_gen_tokens": 2000, **params, "job_id": id})
        self.states[id] = "queued"

    async def check_server_status(self, request: web.Request) -> web.Response:
        body = await request.json()
        present = body["job_type"] == JOB_TYPE
        shown = {"logged_in": False, "job_type_present": present, "key_valid": present and body["auth_key"] == KEY}
        return web.json_response(shown)

    async def job_request(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        if body["job_type"] != JOB_TYPE:
            return web.Response(status=500, text="KeyError")
        if body["auth_key"] != KEY:
            return web.json_response(None)
        until = time.monotonic() + self.request_timeout
        while not self.queue:
            if time.monotonic() > until:
                return web.json_response({"cmd": "no_job"})
            await asyncio.sleep(0.01)
        found = []
        while self.queue and len(found) < body["max_job_batch"]:
            job = self.queue.popleft()
            self.states[job["job_id"]] = "processing"
            # of a batch only the first has both
            times = {"start_time": time.time(), "start_time_compute": None if found else time.time()}
            found.append({**job, **times})
        described = {"text": {"type": "string"}, "prompt_input": {"type": "string"}, "error": {"type": "string"}}
        reply = {"cmd": "job", "endpoint_name": "mixtral_chat", "input_descriptions": {}}
        reply |= {"progress_output_descriptions": described, "final_output_descriptions": described}
        return web.json_response(reply | {"job_data": found[0] if self.one_shape else found})

    async def job_progress(self, request: web.Request) -> web.Response:
        body = await request.json()
        several = isinstance(body, list)
        replies = []
        for entry in body if several else [body]:
            state = self.states.get(entry["job_id"])
            if state is None:
                return web.Response(status=500, text="KeyError")
            if state == "lapsed":
                return web.json_response(replies or {})
            self.updates.append(entry)
            cancelled = entry["job_id"] in self.cancel
            replies.append({"success": True} | ({"job_id": entry["job_id"], "canceled": True} if cancelled else {}))
        return web.json_response(replies if several else replies[0])

    async def job_result(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.deliveries += 1
        id = body["job_id"]
        if self.states.get(id) == "done":
            return web.Response(status=500, text="KeyError")
        if id not in self.states or self.states[id] == "lapsed":
            told = f"Job with job id {id} not found in worker {body['auth']}!"
            return web.json_response({"cmd": "warning", "msg": told})
        self.states[id], self.results[id] = "done", body
        if self.lose_replies:
            assert request.transport
            request.transport.abort()
        return web.json_response({"cmd": "ok"})
