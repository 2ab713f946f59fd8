"""A worker: it connects to a gateway, keeps its model busy with jobs, and sends events as they come.

A worker needs no open port. It keeps events until the gateway has them on disk, so a gateway may restart, or another
one may take over. This module depends on a backend and on the worker protocol, but not on models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from moesaic.backend import Backend, Event, join
from moesaic.cluster import wire
from moesaic.cluster.protocols import LEASE_SECONDS, RENEW_FRACTION, STALL_SECONDS, LogPosition
from moesaic.cluster.worker.connection import RETRYABLE_ERRORS, TRANSPORT_ERRORS, GatewayConnection
from moesaic.cluster.worker.replay import ReplayFilter
from moesaic.cluster.worker.running_job import RunningJob
from moesaic.errors import EngineStopped, InvalidRequest, MoesaicError, Overloaded, TooLarge, Unavailable

log = logging.getLogger("moesaic.worker")

SEND_SECONDS = 0.02
"""Minimum seconds between two messages with events."""
LEASE_WAIT_SECONDS = 20.0
"""Duration of a long poll for jobs, in seconds."""
RETRY_FRACTION = 0.2
"""The longest pause between two attempts to reach a gateway, as a fraction of a lease's duration.

A gateway that is back after a long outage must hear from its workers before their leases expire."""
ABANDON_LEASES = 6
"""The worker cancels its jobs when no gateway has renewed its leases for this number of lease durations.

Other workers run them by then."""
MESSAGE_BYTES = 8 << 20
"""Approximate maximum size of a message in bytes; a gateway accepts twice as much."""
WORKER_ERRORS = (Overloaded, Unavailable)
"""Errors that are not the job's fault: the worker releases the job, so that another worker can run it."""


class ModelsChanged(Exception):
    """The backend offers other models than the worker has announced to its gateway."""


class Worker:
    """A worker: runs the jobs of a gateway on a backend until it is stopped."""

    def __init__(
        self,
        backend: Backend,
        gateways: Sequence[str],
        *,
        name: str,
        key: str | None = None,
        slots: int = 16,
        about: Mapping[str, Any] | None = None,
        ssl: Any = True,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        """Prepare a worker.

        Args:
            backend: the backend whose models run the jobs.
            gateways: URLs of gateways; when one does not answer, the next is tried.
            name: the worker's name, unique among a gateway's workers with the same key.
            key: the worker's API key.
            slots: maximum number of concurrent jobs.
            about: properties of the worker that are shown to administrators.
            ssl: how the gateway's TLS certificate is checked: the parameter ``ssl`` of aiohttp.
            stall_seconds: an engine with work that makes no step for this time is considered stalled.
        """
        self._backend, self._gateways, self._name, self._slots = backend, list(gateways), name, slots
        self._about, self._stall_seconds = dict(about or {}), stall_seconds
        self._connection = GatewayConnection(key, ssl)
        self._instance = secrets.token_hex(8)
        self._last_failure = ""
        self._announced: list[tuple[str, str | None, str]] = []
        self._jobs: dict[str, RunningJob] = {}
        self._to_release: set[wire.LeaseClaim] = set()  # until a gateway has acknowledged their release
        self._has_news = asyncio.Event()
        self._renew_seconds, self._lease_seconds = LEASE_SECONDS * RENEW_FRACTION, LEASE_SECONDS
        self._draining = self._leaving = False
        self._renewed_at = time.monotonic()  # when a gateway last renewed the leases
        self._last_step = (time.monotonic(), -1)
        self.stopped = asyncio.Event()
        """Set this event to stop the worker at once."""
        self.connected = asyncio.Event()
        """An event that is set while the worker is registered at a gateway."""

    async def run(self) -> None:
        """Run jobs until the event ``stopped`` is set.

        Raises:
            Unauthorized, Forbidden: the gateway refuses this worker.
            EngineStopped: the model's engine has died or stalled, and the process must be restarted.
        """
        async with self._connection:
            tasks = [asyncio.ensure_future(work) for work in (self._serve(), self._watch(), self.stopped.wait())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                self.stopped.set()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for job_id in list(self._jobs):  # after a drain there are none
                    self._cancel(job_id)

    async def drain(self, seconds: float) -> None:
        """Take no new jobs, finish the running ones within ``seconds``, release the rest, and stop."""
        self._draining = True
        deadline = time.monotonic() + seconds
        while self._jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._leaving = True
        with contextlib.suppress(MoesaicError, *TRANSPORT_ERRORS):
            self._to_release.update(job.claim for job in self._jobs.values())
            await self._release(unregister=True)
        self.stopped.set()

    # The connection

    async def _serve(self) -> None:
        tries = 0
        while True:
            for url in self._gateways:
                if self._leaving:  # the worker has unregistered and must not register again
                    await self.stopped.wait()
                    return
                self._connection.url = url.rstrip("/")
                try:
                    while True:
                        await self._register()
                        tries = 0
                        with contextlib.suppress(ModelsChanged):
                            await self._run_together(self._fetch(), self._send(), self._renew())
                except RETRYABLE_ERRORS as error:
                    if not self._draining:  # after a drain the gateway does not know the worker
                        self._log_disconnect(error)
                self.connected.clear()
                if self.stopped.is_set():  # an error in a task group can hide a simultaneous cancellation
                    return
            tries = min(tries + 1, 10)
            longest = min(self._lease_seconds * RETRY_FRACTION, 0.1 * 2**tries)
            await asyncio.sleep(random.uniform(0.05, longest))  # full jitter

    def _log_disconnect(self, error: BaseException) -> None:
        """Log why there is no connection to a gateway: as a warning if the reason is new, else for debugging."""
        why = f"{type(error).__name__}: {error}"[:300]
        level = logging.DEBUG if why == self._last_failure else logging.WARNING
        log.log(level, "no gateway: retrying", extra={"url": self._connection.url, "why": why})
        self._last_failure = why

    async def _run_together(self, *works: Coroutine[Any, Any, None]) -> None:
        """Run coroutines until one of them raises an error, which ends them all and is raised here."""
        try:
            async with asyncio.TaskGroup() as group:
                for work in works:
                    group.create_task(work)
        except BaseExceptionGroup as errors:
            raise _first_error(errors) from None

    async def _post(self, route: str, message: Any, kind: type[Any], seconds: float = 0.0) -> Any:
        return await self._connection.post(route, message, kind, seconds or self._lease_seconds / 2 + 2)

    async def _register(self) -> None:
        models = tuple(model for model in self._backend.models() if model.state != "failed")
        self._announced = self._offered()
        jobs = list(self._jobs.values())
        for job in jobs:
            job.finishing = False  # the task that was sending the end is gone with the last connection
        claims = tuple(job.claim for job in jobs)
        message = wire.RegisterRequest(
            self._name, models, self._slots, self._about, claims, self._instance, answers_queries=True
        )
        response = await self._post("register", message, wire.RegisterResponse)
        self._renew_seconds, self._lease_seconds = response.renew_seconds, response.lease_seconds
        self._renewed_at = time.monotonic()
        self._acknowledge(jobs, response.acknowledged)
        self._last_failure = ""
        self.connected.set()
        self._has_news.set()
        log.info("registered", extra={"url": self._connection.url, "models": [model.name for model in models]})

    def _offered(self) -> list[tuple[str, str | None, str]]:
        """Return what the worker announces of its models, except their states, which change with each request."""
        return [(model.name, model.parent, model.description) for model in self._backend.models()]

    async def _fetch(self) -> None:
        """Long-poll the gateway for jobs, cancellations and queries, and handle them."""
        async with asyncio.TaskGroup() as answers:
            while True:
                free_slots = 0 if self._draining else self._slots
                message = wire.LeaseRequest(self._name, free_slots, LEASE_WAIT_SECONDS)
                response = await self._post("lease", message, wire.LeaseResponse, LEASE_WAIT_SECONDS + 10)
                for job_id in response.cancel:
                    self._cancel(job_id)
                for query in response.queries:
                    answers.create_task(self._answer_query(query))
                if self._draining and response.leases:  # they were leased just before the drain
                    self._to_release.update((lease.id, lease.fence) for lease in response.leases)
                    await self._release()
                    continue
                for lease in response.leases:
                    self._start(lease)

    async def _renew(self) -> None:
        while True:
            if self._offered() != self._announced:
                raise ModelsChanged
            await self._release()
            jobs = list(self._jobs.values())
            claims = tuple(job.claim for job in jobs)
            message = wire.RenewRequest(self._name, claims, dict(self._backend.stats()))
            response = await self._post("renew", message, wire.RenewResponse)
            self._renewed_at = time.monotonic()
            for job in jobs:
                if response.states.get(job.lease.id) != "ok" and self._jobs.get(job.lease.id) is job:
                    self._cancel(job.lease.id)
            await asyncio.sleep(self._renew_seconds)

    async def _send(self) -> None:
        """Send new events of all jobs in common messages as they come, and each job's end in its own message."""
        async with asyncio.TaskGroup() as ends:
            sent_at = -SEND_SECONDS
            while True:
                await self._has_news.wait()
                # Even a sleep of 0 lets the other jobs add their events first.
                await asyncio.sleep(max(0.0, sent_at + SEND_SECONDS - time.monotonic()))
                self._has_news.clear()
                sent_at = time.monotonic()
                for job in list(self._jobs.values()):
                    if job.ended and not job.finishing and job.fits(MESSAGE_BYTES):
                        job.finishing = True
                        ends.create_task(self._finish(job))
                if batches := self._batches():
                    jobs = [self._jobs[batch.id] for batch in batches]
                    message = wire.EventsRequest(self._name, batches)
                    response = await self._post("events", message, wire.EventsResponse)
                    self._acknowledge(jobs, response.acknowledged)

    def _batches(self) -> list[wire.EventBatch]:
        """Return the unsent events of all jobs, as many as fit into one message."""
        batches, room = [], MESSAGE_BYTES
        for job in self._jobs.values():
            if job.finishing or not job.unsent():
                continue
            batch, size = job.batch(room)
            if not batch.events and room == MESSAGE_BYTES:
                job.fail(
                    TooLarge("a part of the answer is larger than a message may be: request fewer log-probabilities")
                )
            if batch.events:
                batches.append(batch)
                room -= size
            if len(batch.events) < len(job.unsent()) or job.ended:
                self._has_news.set()
        return batches

    async def _finish(self, job: RunningJob) -> None:
        message = wire.FinishRequest(self._name, *job.claim, job.received, job.unsent(), job.outcome, job.error)
        if len(msgspec.json.encode(message)) >= 2 * MESSAGE_BYTES:
            job.fail(TooLarge("the result is larger than a message may be: send fewer texts per request"))
            message = wire.FinishRequest(self._name, *job.claim, job.received, [], None, job.error)
        response = await self._post("finish", message, wire.FinishResponse)
        self._remove(job)
        event = "job finished" if response.accepted else "result refused: lease not valid"
        log.debug(event, extra={"job": job.lease.id, "fence": job.lease.fence})

    def _acknowledge(self, jobs: Sequence[RunningJob], positions: Mapping[str, LogPosition | None]) -> None:
        """Process the gateway's log positions of jobs, except of jobs that were leased again since the request."""
        for job in jobs:
            if self._jobs.get(job.lease.id) is job:
                position = positions.get(job.lease.id)
                if position is None:
                    self._cancel(job.lease.id)
                else:
                    job.acknowledge(*position)

    def _remove(self, job: RunningJob) -> None:
        if self._jobs.get(job.lease.id) is job:
            del self._jobs[job.lease.id]

    # Jobs

    def _start(self, lease: wire.LeasedJob) -> None:
        self._cancel(lease.id)
        job = RunningJob(lease, first=len(lease.log), received=len(lease.log))
        self._jobs[lease.id] = job
        job.task = asyncio.ensure_future(self._run_job(job))

    def _cancel(self, job_id: str) -> None:
        job = self._jobs.pop(job_id, None)
        if job is not None and job.task is not None:
            job.task.cancel()

    async def _run_job(self, job: RunningJob) -> None:
        lease = job.lease
        try:
            if lease.kind == "generate":
                await self._generate(job)
            else:
                job.outcome = await self._call(lease.kind, lease.model, bytes(lease.body))
        except WORKER_ERRORS as error:
            log.warning("job released", extra={"job": lease.id, "why": str(error)[:200]})
            await self._give_up(job)
            return
        except EngineStopped:  # this job may have crashed the engine; ``_watch`` ends the worker, and the lease expires
            return
        except Exception as error:
            if not isinstance(error, MoesaicError):
                log.exception("job failed", extra={"job": lease.id})
            job.error = wire.error_info(error)
        job.ended = True
        self._has_news.set()

    async def _generate(self, job: RunningJob) -> None:
        request = wire.unpack_request(bytes(job.lease.body))
        replay = ReplayFilter(job.lease.log)
        if replay.all_finished(request.sampling.get("n") or 1):  # the last worker died before it could finish the job
            return
        stream = await self._backend.generate(replay.continued(request))
        try:
            async for event in stream:
                self._add_events(job, replay, join([event, *stream.ready()]))
        finally:
            stream.cancel()

    def _add_events(self, job: RunningJob, replay: ReplayFilter, events: list[Event]) -> None:
        fresh = [part for event in events if (part := replay.fresh(event)) is not None]
        if fresh:
            job.events += fresh
            self._has_news.set()

    async def _call(self, kind: str, model: str, body: bytes) -> Any:
        """Run an operation that has no events, such as "embed"; return its outcome."""
        if kind == "tokenize":
            return await self._backend.tokenize(wire.unpack_request(body))
        if kind == "embed":
            inputs = wire.unpack_embed(body)
            return await self._backend.embed(model, inputs.texts, inputs.truncate)
        arguments = msgspec.json.decode(body)
        if kind == "detokenize":
            return await self._backend.detokenize(model, arguments)
        if kind == "classify":
            return await self._backend.classify(model, arguments)
        raise InvalidRequest(f"this worker does not support the operation {kind:.20}")

    async def _answer_query(self, query: wire.QueryMessage) -> None:
        outcome, error = None, None
        try:
            outcome = await self._call(query.kind, query.model, bytes(query.body))
        except Exception as failure:
            if not isinstance(failure, MoesaicError):
                log.exception("query failed", extra={"kind": query.kind})
            error = wire.error_info(failure)
        message = wire.AnswerRequest(self._name, query.id, outcome, error)
        if len(msgspec.json.encode(message)) >= 2 * MESSAGE_BYTES:
            too_large = TooLarge("the result is larger than a message may be: send a shorter text")
            message = wire.AnswerRequest(self._name, query.id, None, wire.error_info(too_large))
        await self._post("answer", message, dict)

    async def _give_up(self, job: RunningJob) -> None:
        """Release a job that this worker cannot run now."""
        self._remove(job)
        self._to_release.add(job.claim)
        with contextlib.suppress(MoesaicError, *TRANSPORT_ERRORS):  # it is retried with the next renewal
            await self._release()

    async def _release(self, *, unregister: bool = False) -> None:
        claims = tuple(self._to_release)
        if claims or unregister:
            await self._post("release", wire.ReleaseRequest(self._name, claims, unregister=unregister), dict)
            self._to_release.difference_update(claims)

    async def _watch(self) -> None:
        """Check once a second that the engine makes progress and that a gateway still renews the leases.

        If ``stall_seconds`` is less than 4, the checks are more frequent.

        Raises:
            EngineStopped: the engine has died or stalled.
        """
        while True:
            await asyncio.sleep(min(1.0, self._stall_seconds / 4))
            now, stats = time.monotonic(), self._backend.stats().values()
            if any(not each.alive for each in stats):
                raise EngineStopped("the engine has died: start the worker again")
            steps = sum(each.steps for each in stats)
            if steps != self._last_step[1] or not any(each.running for each in stats):
                self._last_step = now, steps
            if now - self._last_step[0] > self._stall_seconds:
                raise EngineStopped(
                    f"the engine has made no step for {self._stall_seconds:g} s: start the worker again"
                )
            if now - self._renewed_at > ABANDON_LEASES * self._lease_seconds and self._jobs:
                log.warning("no gateway for too long: jobs cancelled", extra={"jobs": len(self._jobs)})
                for job_id in list(self._jobs):
                    self._cancel(job_id)


def _first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error in an exception group, which may contain groups."""
    error = errors.exceptions[0]
    return _first_error(error) if isinstance(error, BaseExceptionGroup) else error
