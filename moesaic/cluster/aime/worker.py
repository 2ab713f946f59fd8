"""Worker for the AIME API server: it fetches jobs, runs them on a backend, and reports progress and results.

The worker requests jobs whenever it has free slots, so a finished job is replaced at once. Every job gets a result,
even if it fails or the server is unavailable for a time. The module follows the worker routes of the AIME API server
0.9.6, in the form that older servers accept too. It does not depend on the kind of backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from moesaic import __version__
from moesaic.backend import Backend, Delta, Finished, ModelInfo, PromptDone, ResponseStream
from moesaic.cluster.aime.conversation import generation_request
from moesaic.errors import InvalidParameter, MoesaicError, NotFound, NotInstalled, Unauthorized, Unavailable

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger("moesaic.cluster.aime")

UPDATE_SECONDS = 0.2
"""Seconds between two progress updates."""
HEARTBEAT_SECONDS = 20.0
"""Seconds after which a job without new tokens is reported again, because the server drops silent jobs."""
JOB_REQUEST_SECONDS = 75.0
"""Timeout of a request for jobs (a long poll) in seconds; the server responds within 60 seconds."""
RETRY_SECONDS = 1.0
"""Seconds between two attempts of a request."""
SHUTDOWN_SECONDS = 5.0
"""Maximum seconds to send the results of jobs that are stopped together with the worker."""
MAX_RESULT_ATTEMPTS = 5
"""Maximum number of attempts to send a result that the server rejects."""


class TemporaryFailure(Exception):
    """The AIME API server is unreachable or cannot handle the request now; a retry can succeed."""


@dataclass
class Job:
    """A running job of the AIME API server. Times are in seconds since the epoch, as the server's."""

    data: Mapping[str, Any]
    outputs: Mapping[str, Any]
    arrived: float = field(default_factory=time.time)
    begun: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    reported: tuple[int, float] = (-1, 0.0)
    """Number of tokens in the last update, and the update's time by the monotonic clock."""
    generation: asyncio.Task[None] | None = None
    cancelled: bool = False
    error: str = "the worker was stopped before the answer was complete: try again"
    """The job's error; empty if the answer is complete."""

    @property
    def id(self) -> str:
        return str(self.data.get("job_id"))

    def progress(self) -> dict[str, Any]:
        """Return the job's progress: the fields of an update in the protocol of the AIME API server."""
        return {
            "text": self.text,
            "num_generated_tokens": self.tokens,
            "current_context_length": self.prompt_tokens + self.tokens,
        }

    def times(self) -> dict[str, float]:
        """Return the times and durations, in seconds, that the benchmark of the AIME API server reads."""
        began, now = self.begun or time.time(), time.time()
        start = self.data.get("start_time_compute") or self.data.get("start_time")
        submitted = start if isinstance(start, int | float) else self.arrived
        return {
            "arrival_time": self.arrived,
            "finished_time": now,
            "preprocessing_duration": round(began - self.arrived, 6),
            "pending_duration": round(max(0.0, self.arrived - submitted), 6),
        }


async def work(
    backend: Backend,
    server: str,
    job_type: str,
    auth_key: str,
    *,
    model: str = "",
    slots: int = 16,
    name: str = "",
    stop: asyncio.Event | None = None,
    drain_seconds: float = 60.0,
) -> None:
    """Run jobs of an AIME API server until ``stop`` is set; then finish the running jobs and return.

    Args:
        backend: the backend that runs the model.
        server: the server's URL, ``http://…``.
        job_type: the type of the jobs to run; an endpoint of the server has one.
        auth_key: the key of the job type.
        model: the name of the backend's model; empty for the first chat model.
        slots: maximum number of concurrent jobs.
        name: the worker's name at the server; empty for host name and process id.
        stop: event that stops the worker; None to run forever.
        drain_seconds: time in seconds for running jobs to finish; after it they get an error.

    Raises:
        Unauthorized: the key is wrong, or the server has no such job type.
        NotFound: the backend has no such model.
        Unavailable: the backend has no chat model.
        InvalidParameter: a parameter is out of range.
        NotInstalled: aiohttp is missing.
    """
    if slots < 1:
        raise InvalidParameter("slots", f"is {slots}, expected at least 1")
    async with _connect(auth_key, job_type, server.rstrip("/"), name) as connection:
        await Worker(backend, connection, model, slots).run(stop or asyncio.Event(), drain_seconds)


@contextlib.asynccontextmanager
async def _connect(auth_key: str, job_type: str, server: str, name: str) -> AsyncIterator[Connection]:
    try:
        import aiohttp
    except ImportError:
        raise NotInstalled("a worker for the AIME API server needs aiohttp: pip install 'moesaic[worker]'") from None
    async with aiohttp.ClientSession(json_serialize=lambda value: msgspec.json.encode(value).decode()) as session:
        yield Connection(session, server, name or f"{socket.gethostname()}#{os.getpid()}", job_type, auth_key)


class Connection:
    """HTTP connection to the AIME API server, with the fields that each request contains."""

    def __init__(self, session: aiohttp.ClientSession, server: str, name: str, job_type: str, auth_key: str) -> None:
        self._session, self._server = session, server
        self.job_type = job_type
        self.name = {"auth": name, "version": f"Moesaic {__version__}"}
        self.key = {"job_type": job_type, "auth_key": auth_key}

    async def post(self, path: str, body: Any, seconds: float = 30.0) -> tuple[int, Any]:
        """Send a request; return the status and the decoded body, or None as the body if it is not JSON.

        Raises:
            TemporaryFailure: there was no response, or its status is 502, 503 or 504.
        """
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self._session.post(self._server + path, json=body, timeout=timeout) as reply:
                content = await reply.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise TemporaryFailure(str(error) or type(error).__name__) from error
        if reply.status in (502, 503, 504):
            raise TemporaryFailure(f"{path} was answered with status {reply.status}")
        try:
            return reply.status, msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return reply.status, None

    async def check(self) -> None:
        """Check whether the server accepts this worker's job type and key.

        Raises:
            Unauthorized: the server rejects one of them.
            TemporaryFailure: the server is unavailable.
        """
        _, reply = await self.post("/worker_check_server_status", self.key | self.name)
        status = reply if isinstance(reply, dict) else {}
        if status.get("job_type_present") is False:
            raise Unauthorized(
                f"{self._server} has no job type {self.job_type!r}: see [WORKER] job_type in its endpoint files"
            )
        if status.get("key_valid") is False:
            raise Unauthorized(
                f"{self._server} rejects this key for {self.job_type!r}: see [WORKER] auth_key in its endpoint file"
            )


class Worker:
    """Worker that runs the jobs of an AIME API server on a backend, at most ``slots`` at a time."""

    def __init__(self, backend: Backend, connection: Connection, model: str, slots: int) -> None:
        self._backend, self._connection, self._slots = backend, connection, slots
        self._model = _model_info(backend, model).name
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slot_freed = asyncio.Event()

    async def run(self, stop: asyncio.Event, drain_seconds: float) -> None:
        """Run jobs until ``stop`` is set; then finish the running jobs, or stop them after ``drain_seconds``."""
        stopping: asyncio.Task[Any] = asyncio.create_task(stop.wait())
        reporting = asyncio.create_task(self._report_loop())
        fetching = asyncio.create_task(self._fetch_loop(stop))
        try:
            await asyncio.wait((stopping, fetching, reporting), return_when=asyncio.FIRST_COMPLETED)
            for task in (fetching, reporting):  # these tasks end only with an error
                if task.done() and not stop.is_set():
                    task.result()
            # A pending job request can still return jobs; they are finished too.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_seconds):
                    while self._tasks:
                        await asyncio.wait(set(self._tasks))
        finally:
            for task in (stopping, reporting, fetching, *self._tasks):
                task.cancel()
            await asyncio.gather(stopping, reporting, fetching, *self._tasks, return_exceptions=True)

    # Fetching jobs

    async def _fetch_loop(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._slot_freed.clear()
            if len(self._jobs) >= self._slots:
                await self._slot_freed.wait()
                continue
            try:
                await self._fetch(self._slots - len(self._jobs))
            except TemporaryFailure as error:
                log.warning("job request failed", extra={"error": str(error)})
                await asyncio.sleep(RETRY_SECONDS)

    async def _fetch(self, free: int) -> None:
        info = _model_info(self._backend, self._model)
        description = {
            "max_job_batch": free,
            "worker_version": 0,
            "request_timeout": 60,
            "gpu_name": str(info.about.get("device", "cpu")),
            "num_gpus": 1,
            "framework": "moesaic",
            "framework_version": __version__,
            "pytorch_version": "",
            "model_label": info.name,
            "model_quantization": str(info.about.get("dtype", "")),
            "model_size": "",
            "model_family": str(info.about.get("architecture", "")),
            "model_type": "LLM",
            "model_repo_name": info.name,
        }
        body = self._connection.key | self._connection.name | description
        status, reply = await self._connection.post("/worker_job_request", body, JOB_REQUEST_SECONDS)
        command = reply.get("cmd") if isinstance(reply, dict) else None
        if status == 200 and command == "job":
            outputs = reply.get("final_output_descriptions") or {}
            data = reply.get("job_data") or []
            for item in data if isinstance(data, list) else [data]:
                self._start(Job(item, outputs))
        elif status != 200 or command != "no_job":
            await self._connection.check()
            raise TemporaryFailure(f"status {status}, {str(reply)[:200]}")

    def _start(self, job: Job) -> None:
        self._jobs[job.id] = job
        task = asyncio.create_task(self._run_job(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Running jobs

    async def _run_job(self, job: Job) -> None:
        """Run a job and send its result, even if the job fails or the worker is stopped."""
        job.generation = asyncio.create_task(self._generate(job))
        stopped = True
        try:
            await asyncio.wait((job.generation,))
            stopped = False
        finally:
            job.generation.cancel()
            try:
                async with asyncio.timeout(SHUTDOWN_SECONDS if stopped else None):
                    await self._send_result(job, "the job was cancelled" if job.cancelled else job.error)
            except TimeoutError:
                log.warning("job result not delivered before shutdown", extra={"job": job.id})
            finally:
                self._jobs.pop(job.id, None)
                self._slot_freed.set()

    async def _generate(self, job: Job) -> None:
        stream: ResponseStream | None = None
        try:
            stream = await self._backend.generate(generation_request(_decode_context(job.data), self._model))
            async for event in stream:
                if isinstance(event, PromptDone):
                    job.begun, job.prompt_tokens = time.time(), event.prompt_tokens
                elif isinstance(event, Delta):
                    job.text += event.text
                    job.tokens += len(event.tokens)
                elif isinstance(event, Finished):
                    job.prompt_tokens, job.tokens = event.prompt_tokens, event.generated_tokens
            job.error = ""
        except MoesaicError as error:
            job.error = str(error)
        finally:
            if stream is not None:
                stream.cancel()

    # Reporting

    async def _send_result(self, job: Job, error: str) -> None:
        """Send a job's result; ``error`` is "" after success. Retry until the server has received or rejected it."""
        info = _model_info(self._backend, self._model)
        result: dict[str, Any] = {
            **{name: job.data[name] for name in job.outputs if name in job.data},
            **job.progress(),
            "prompt_length": job.prompt_tokens,
            "model_name": info.name,
            "max_seq_len": info.context,
            "metrics": {"in_num_tokens": job.prompt_tokens, "out_num_tokens": job.tokens},
            **job.times(),
            **{name: job.data.get(name) for name in ("job_id", "start_time", "start_time_compute")},
        }
        body = result | ({"error": error} if error else {}) | self._connection.name | self._connection.key
        attempts = 0
        while attempts < MAX_RESULT_ATTEMPTS:
            try:
                status, reply = await self._connection.post("/worker_job_result", body)
            except TemporaryFailure:
                # Retry without a limit while the server is unavailable, because only this worker has the answer.
                await asyncio.sleep(RETRY_SECONDS)
                continue
            attempts += 1
            if status == 200:
                if not (isinstance(reply, dict) and (reply.get("cmd") == "ok" or reply.get("success"))):
                    log.warning("job unknown to the server", extra={"job": job.id})
                return
            await asyncio.sleep(RETRY_SECONDS)
        log.warning("result rejected by the server", extra={"job": job.id, "status": status})

    async def _report_loop(self) -> None:
        while True:
            await asyncio.sleep(UPDATE_SECONDS)
            if jobs := [job for job in self._jobs.values() if _needs_update(job)]:
                # A lost update does no harm, because the next one contains the whole text.
                with contextlib.suppress(TemporaryFailure):
                    await self._report(jobs)

    async def _report(self, jobs: list[Job]) -> None:
        now = time.monotonic()
        body = [self._update(job) for job in jobs]
        _, replies = await self._connection.post("/worker_job_progress", body)
        if not isinstance(replies, list) or len(replies) < len(jobs):
            # The AIME API server stops at the first unknown job; the jobs after it would time out.
            replies = [(await self._connection.post("/worker_job_progress", self._update(job)))[1] for job in jobs]
        for job, reply in zip(jobs, replies, strict=False):
            job.reported = job.tokens, now
            if isinstance(reply, dict) and reply.get("canceled") and not job.cancelled:
                job.cancelled = True
                if job.generation:
                    job.generation.cancel()

    def _update(self, job: Job) -> dict[str, Any]:
        echoed = {name: job.data.get(name) for name in ("job_id", "start_time", "start_time_compute")}
        data = job.progress() | self._connection.name
        return {
            **echoed,
            **self._connection.key,
            **self._connection.name,
            "progress": job.tokens,
            "progress_data": data,
        }


def _needs_update(job: Job) -> bool:
    tokens, reported_at = job.reported
    return tokens != job.tokens or time.monotonic() - reported_at >= HEARTBEAT_SECONDS


def _decode_context(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a job's parameters with ``chat_context`` decoded if it is a JSON string."""
    context = data.get("chat_context")
    if not isinstance(context, str) or not context:
        return data
    try:
        return {**data, "chat_context": msgspec.json.decode(context)}
    except msgspec.DecodeError:
        raise InvalidParameter("chat_context", "is not valid JSON") from None


def _model_info(backend: Backend, name: str) -> ModelInfo:
    """Return the description of a chat model, or of the first chat model if the name is empty.

    Raises:
        NotFound: there is no chat model of that name.
        Unavailable: there is no chat model at all.
    """
    models = [model for model in backend.models() if model.task == "chat"]
    if not models:
        raise Unavailable("the backend has no chat model: load one, or wait until it is loaded")
    match = next((model for model in models if name in (model.name, *model.aliases)), None)
    if match is None and name:
        available = ", ".join(model.name for model in models[:20])
        raise NotFound(f"unknown model {name!r:.120}; available models: {available}")
    return match or models[0]
