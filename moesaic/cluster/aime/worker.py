"""A model of ours as a worker of AIME's API server: it fetches jobs, tells how far they are, and brings results.

It asks for as many jobs as it has room for whenever it has room, so that one that is done makes place for the next at
once. Whatever becomes of a job, and of the server meanwhile, it gets an answer. Follows the worker routes of AIME's
API server 0.9.6, in the form that older ones take too. Knows AIME's protocol. Does not know who runs the model.
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
from moesaic.cluster.aime.conversation import asked
from moesaic.errors import InvalidParameter, MoesaicError, NotFound, NotInstalled, Unauthorized, Unavailable

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger("moesaic.cluster.aime")

PACE = 0.2
"""Seconds between updates."""
HEARTBEAT = 20.0
"""Seconds after which a job without news is told of all the same: the server gives up those it hears nothing of."""
PATIENCE = 75.0
"""Seconds for a request for jobs; the server answers after 60 at the latest."""
AGAIN = 1.0
"""Seconds before something is tried again."""
LAST_WORDS = 5.0
"""Seconds for the answers of jobs that are ended with this worker."""
TRIES = 5
"""How often a result is sent that the server says it cannot take."""


class Failed(Exception):
    """The server did not answer as it should; it may later."""


@dataclass
class Job:
    """A job that runs; times in seconds since the epoch, as the server's are."""

    data: Mapping[str, Any]
    outputs: Mapping[str, Any]
    arrived: float = field(default_factory=time.time)
    begun: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    told: tuple[int, float] = (-1, 0.0)
    """How many tokens the server knows of, and when it was told, by the monotonic clock."""
    reading: asyncio.Task[None] | None = None
    cancelled: bool = False
    error: str = "the worker was stopped before the answer was there: ask again"
    """What becomes of it if nothing else does; "": it was answered."""

    @property
    def id(self) -> str:
        return str(self.data.get("job_id"))

    def progress(self) -> dict[str, Any]:
        """Return how far it is."""
        return {
            "text": self.text,
            "num_generated_tokens": self.tokens,
            "current_context_length": self.prompt_tokens + self.tokens,
        }

    def times(self) -> dict[str, float]:
        """Return when what happened, as their benchmark reads it."""
        began, now = self.begun or time.time(), time.time()
        start = self.data.get("start_time_compute") or self.data.get("start_time")
        given = start if isinstance(start, int | float) else self.arrived
        return {
            "arrival_time": self.arrived,
            "finished_time": now,
            "preprocessing_duration": round(began - self.arrived, 6),
            "pending_duration": round(max(0.0, self.arrived - given), 6),
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
    """Work for an AIME API server until ``stop`` is set; then end what runs, and return.

    Args:
        door: what offers the model.
        server: its address, ``http://…``.
        job_type: which jobs to take.
        auth_key: the key of that job type.
        model: which of the door's models; "": the default.
        slots: jobs at the same time.
        name: how the server is to call this worker; "": machine and process.
        stop: set from outside; None: never.
        drain_seconds: what running jobs are given to end; they get an error after that.

    Raises:
        Unauthorized: the key is wrong, or the server has no such job type.
        NotFound: the door has no such model. InvalidParameter: a value is not possible.
        NotInstalled: aiohttp is missing.
    """
    if slots < 1:
        raise InvalidParameter("slots", f"is {slots}, expected at least 1")
    async with _session(auth_key, job_type, server.rstrip("/"), name) as line:
        await Worker(backend, line, model, slots).run(stop or asyncio.Event(), drain_seconds)


@contextlib.asynccontextmanager
async def _session(auth_key: str, job_type: str, server: str, name: str) -> AsyncIterator[Line]:
    try:
        import aiohttp
    except ImportError:
        raise NotInstalled("work for AIME's server needs aiohttp: pip install 'moesaic[worker]'") from None
    async with aiohttp.ClientSession(json_serialize=lambda value: msgspec.json.encode(value).decode()) as session:
        yield Line(session, server, name or f"{socket.gethostname()}#{os.getpid()}", job_type, auth_key)


class Line:
    """The line to the server, with what each call carries."""

    def __init__(self, session: aiohttp.ClientSession, server: str, name: str, job_type: str, auth_key: str) -> None:
        self._session, self._server = session, server
        self.job_type = job_type
        self.name = {"auth": name, "version": f"Moesaic {__version__}"}
        self.key = {"job_type": job_type, "auth_key": auth_key}

    async def post(self, path: str, body: Any, seconds: float = 30.0) -> tuple[int, Any]:
        """Return status and answer; of one that is no JSON, None.

        Raises:
            Failed: there was no answer, or 503: later there may be.
        """
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self._session.post(self._server + path, json=body, timeout=timeout) as reply:
                content = await reply.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Failed(str(error) or type(error).__name__) from error
        if reply.status in (502, 503, 504):
            raise Failed(f"status {reply.status}")
        try:
            return reply.status, msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return reply.status, None

    async def check(self) -> None:
        """Find out why the server gives no jobs.

        Raises:
            Unauthorized: it never will. Failed: it does not answer.
        """
        _, found = await self.post("/worker_check_server_status", self.key | self.name)
        found = found if isinstance(found, dict) else {}
        if found.get("job_type_present") is False:
            raise Unauthorized(
                f"{self._server} has no job type {self.job_type!r}: see its endpoints' [WORKER] job_type"
            )
        if found.get("key_valid") is False:
            raise Unauthorized(f"{self._server} does not take this key for {self.job_type!r}: see [WORKER] auth_key")


class Worker:
    """One worker: jobs in, answers out."""

    def __init__(self, backend: Backend, line: Line, model: str, slots: int) -> None:
        self._backend, self._line, self._slots = backend, line, slots
        self._model = _card(backend, model).name
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()

    async def run(self, stop: asyncio.Event, drain_seconds: float) -> None:
        """Work until ``stop`` is set; see ``work``."""
        stopping: asyncio.Task[Any] = asyncio.create_task(stop.wait())
        telling = asyncio.create_task(self._tell_all())
        fetching = asyncio.create_task(self._fetch_all(stop))
        try:
            await asyncio.wait((stopping, fetching, telling), return_when=asyncio.FIRST_COMPLETED)
            for task in (fetching, telling):  # neither ends but by an error
                if task.done() and not stop.is_set():
                    task.result()
            # What a request for jobs that is under way may yet bring is done, or answered, too.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_seconds):
                    while self._tasks:
                        await asyncio.wait(set(self._tasks))
        finally:
            for task in (stopping, telling, fetching, *self._tasks):
                task.cancel()
            await asyncio.gather(stopping, telling, fetching, *self._tasks, return_exceptions=True)

    # Jobs in

    async def _fetch_all(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._room.clear()
            if len(self._jobs) >= self._slots:
                await self._room.wait()
                continue
            try:
                await self._fetch(self._slots - len(self._jobs))
            except Failed as error:
                log.warning("the server gives no jobs", extra={"error": str(error)})
                await asyncio.sleep(AGAIN)

    async def _fetch(self, free: int) -> None:
        card = _card(self._backend, self._model)
        offered = {
            "max_job_batch": free,
            "worker_version": 0,
            "request_timeout": 60,
            "gpu_name": str(card.about.get("device", "cpu")),
            "num_gpus": 1,
            "framework": "moesaic",
            "framework_version": __version__,
            "pytorch_version": "",
            "model_label": card.name,
            "model_quantization": str(card.about.get("dtype", "")),
            "model_size": "",
            "model_family": str(card.about.get("architecture", "")),
            "model_type": "LLM",
            "model_repo_name": card.name,
        }
        status, found = await self._line.post(
            "/worker_job_request", self._line.key | self._line.name | offered, PATIENCE
        )
        command = found.get("cmd") if isinstance(found, dict) else None
        if status == 200 and command == "job":
            outputs = found.get("final_output_descriptions") or {}
            data = found.get("job_data") or []
            for each in data if isinstance(data, list) else [data]:
                self._begin(Job(each, outputs))
        elif status != 200 or command != "no_job":
            await self._line.check()
            raise Failed(f"status {status}, {str(found)[:200]}")

    def _begin(self, job: Job) -> None:
        self._jobs[job.id] = job
        task = asyncio.create_task(self._do(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Answers out

    async def _do(self, job: Job) -> None:
        """Answer one job, whatever becomes of it."""
        job.reading = asyncio.create_task(self._read(job))
        stopped = True
        try:
            await asyncio.wait((job.reading,))
            stopped = False
        finally:
            job.reading.cancel()
            try:
                async with asyncio.timeout(LAST_WORDS if stopped else None):
                    await self._finish(job, "the job was cancelled" if job.cancelled else job.error)
            except TimeoutError:
                log.warning("a job stays without an answer", extra={"job": job.id})
            finally:
                self._jobs.pop(job.id, None)
                self._room.set()

    async def _read(self, job: Job) -> None:
        """Have the model answer."""
        answers: ResponseStream | None = None
        try:
            answers = await self._backend.generate(asked(_whole(job.data), self._model))
            async for event in answers:
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
            if answers is not None:
                answers.cancel()

    async def _finish(self, job: Job, error: str) -> None:
        """Bring a result, again and again until the server has it."""
        card = _card(self._backend, self._model)
        result: dict[str, Any] = {
            **{name: job.data[name] for name in job.outputs if name in job.data},
            **job.progress(),
            "prompt_length": job.prompt_tokens,
            "model_name": card.name,
            "max_seq_len": card.context,
            "metrics": {"in_num_tokens": job.prompt_tokens, "out_num_tokens": job.tokens},
            **job.times(),
            **{name: job.data.get(name) for name in ("job_id", "start_time", "start_time_compute")},
        }
        body = result | ({"error": error} if error else {}) | self._line.name | self._line.key
        tries = 0
        while tries < TRIES:
            try:
                status, reply = await self._line.post("/worker_job_result", body)
            except Failed:
                await asyncio.sleep(AGAIN)  # for however long it is away: only this worker has the answer
                continue
            tries += 1
            if status == 200:
                if not (isinstance(reply, dict) and (reply.get("cmd") == "ok" or reply.get("success"))):
                    log.warning("the server does not know a job any more", extra={"job": job.id})
                return
            await asyncio.sleep(AGAIN)
        log.warning("the server does not take a result", extra={"job": job.id, "status": status})

    async def _tell_all(self) -> None:
        while True:
            await asyncio.sleep(PACE)
            if news := [job for job in self._jobs.values() if _has_news(job)]:
                # Nobody waits for an update: the next one has all of the text.
                with contextlib.suppress(Failed):
                    await self._tell(news)

    async def _tell(self, jobs: list[Job]) -> None:
        now = time.monotonic()
        body = [self._update(job) for job in jobs]
        _, replies = await self._line.post("/worker_job_progress", body)
        if not isinstance(replies, list) or len(replies) < len(jobs):
            # AIME's server stops reading at the first job that it does not know, and the others would lapse.
            replies = [(await self._line.post("/worker_job_progress", self._update(job)))[1] for job in jobs]
        for job, reply in zip(jobs, replies, strict=False):
            job.told = job.tokens, now
            if isinstance(reply, dict) and reply.get("canceled") and not job.cancelled:
                job.cancelled = True
                if job.reading:
                    job.reading.cancel()

    def _update(self, job: Job) -> dict[str, Any]:
        echoed = {name: job.data.get(name) for name in ("job_id", "start_time", "start_time_compute")}
        data = job.progress() | self._line.name
        return {**echoed, **self._line.key, **self._line.name, "progress": job.tokens, "progress_data": data}


def _has_news(job: Job) -> bool:
    tokens, at = job.told
    return tokens != job.tokens or time.monotonic() - at >= HEARTBEAT


def _whole(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a job's parameters, the context as a list if it came as JSON in a string."""
    context = data.get("chat_context")
    if not isinstance(context, str) or not context:
        return data
    try:
        return {**data, "chat_context": msgspec.json.decode(context)}
    except msgspec.DecodeError:
        raise InvalidParameter("chat_context", "is no JSON") from None


def _card(backend: Backend, name: str) -> ModelInfo:
    """Return the model to work with.

    Raises:
        NotFound: there is no such one. Unavailable: there is none.
    """
    cards = [card for card in backend.models() if card.task == "chat"]
    if not cards:
        raise Unavailable("there is no chat model to work with")
    found = next((card for card in cards if name in (card.name, *card.aliases)), None)
    if found is None and name:
        raise NotFound(
            f"the model {name!r:.120} does not exist; there is {', '.join(card.name for card in cards[:20])}"
        )
    return found or cards[0]
