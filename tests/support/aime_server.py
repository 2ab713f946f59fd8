"""Stand-in for AIME's API server 0.9.6 as its workers see it, including its faults.

There is one job list, and a request for jobs waits until a job arrives or time is up. The server reads a list of
updates up to the first unknown job. A repeated result gets status 500. The module was written from a description of
AIME's behaviour.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from aiohttp import web

KEY, JOB_TYPE = "worker-key", "mixtral"


class AimeServer:
    """Server on loopback; ``job_requests``, ``updates`` and ``results`` hold the bodies that it has received."""

    def __init__(self, request_timeout: float = 0.5) -> None:
        self.request_timeout = request_timeout
        self.queue: deque[dict[str, Any]] = deque()
        self.states: dict[str, str] = {}
        self.job_requests: list[dict[str, Any]] = []
        self.updates: list[dict[str, Any]] = []
        self.results: dict[str, dict[str, Any]] = {}
        self.deliveries = 0
        self.lose_replies = False
        self.cancel: set[str] = set()
        self.one_shape = False
        """Whether ``job_data`` is one object instead of a list, as in older versions."""
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

    def add(self, job_id: str, **params: Any) -> None:
        chat = {"prompt_input": "Hi", "chat_context": "", "top_k": 40, "top_p": 0.9, "temperature": 0.8}
        self.queue.append({**chat, "max_gen_tokens": 2000, **params, "job_id": job_id})
        self.states[job_id] = "queued"

    async def check_server_status(self, request: web.Request) -> web.Response:
        body = await request.json()
        present = body["job_type"] == JOB_TYPE
        status = {"logged_in": False, "job_type_present": present, "key_valid": present and body["auth_key"] == KEY}
        return web.json_response(status)

    async def job_request(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.job_requests.append(body)
        if body["job_type"] != JOB_TYPE:
            return web.Response(status=500, text="KeyError")
        if body["auth_key"] != KEY:
            return web.json_response(None)
        deadline = time.monotonic() + self.request_timeout
        while not self.queue:
            if time.monotonic() > deadline:
                return web.json_response({"cmd": "no_job"})
            await asyncio.sleep(0.01)
        jobs = []
        while self.queue and len(jobs) < body["max_job_batch"]:
            job = self.queue.popleft()
            self.states[job["job_id"]] = "processing"
            # only the first job of a batch has both times
            times = {"start_time": time.time(), "start_time_compute": None if jobs else time.time()}
            jobs.append({**job, **times})
        descriptions = {"text": {"type": "string"}, "prompt_input": {"type": "string"}, "error": {"type": "string"}}
        reply = {"cmd": "job", "endpoint_name": "mixtral_chat", "input_descriptions": {}}
        reply |= {"progress_output_descriptions": descriptions, "final_output_descriptions": descriptions}
        return web.json_response(reply | {"job_data": jobs[0] if self.one_shape else jobs})

    async def job_progress(self, request: web.Request) -> web.Response:
        body = await request.json()
        is_list = isinstance(body, list)
        replies = []
        for entry in body if is_list else [body]:
            state = self.states.get(entry["job_id"])
            if state is None:
                return web.Response(status=500, text="KeyError")
            if state == "lapsed":
                return web.json_response(replies or {})
            self.updates.append(entry)
            cancelled = entry["job_id"] in self.cancel
            replies.append({"success": True} | ({"job_id": entry["job_id"], "canceled": True} if cancelled else {}))
        return web.json_response(replies if is_list else replies[0])

    async def job_result(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.deliveries += 1
        job_id = body["job_id"]
        if self.states.get(job_id) == "done":
            return web.Response(status=500, text="KeyError")
        if job_id not in self.states or self.states[job_id] == "lapsed":
            warning = f"Job with job id {job_id} not found in worker {body['auth']}!"
            return web.json_response({"cmd": "warning", "msg": warning})
        self.states[job_id], self.results[job_id] = "done", body
        if self.lose_replies:
            assert request.transport
            request.transport.abort()
        return web.json_response({"cmd": "ok"})
