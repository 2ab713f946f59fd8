"""Ray: replicas are actors, each with a worker process and a placement group of its own; lost ones are started again.

Nothing of a request goes through Ray: it starts processes and hands out CPUs and GPUs. Its nodes run whatever they are
sent, so off loopback they must be told to want a token. Needs Ray 2.54 or later, and Moesaic on every node.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.cluster.launch import REFUSED, Plan
from moesaic.errors import ConnectionFailed, InvalidRequest, NotInstalled

log = logging.getLogger("moesaic.launch")

LOOK_SECONDS = 0.5
STEADY_SECONDS = 60.0
"""A replica that has run for so long was well: the next pause is short again."""
LONGEST_PAUSE = 30.0
SPARE_SECONDS = 10.0
CONNECT_SECONDS = 10.0


def files(_: Plan) -> Mapping[str, str]:
    """Return nothing: it starts the workers itself."""
    return {}


def run(plan: Plan) -> int:
    """Run the replicas until SIGTERM or SIGINT; return 0, or 2 when the gateway wants none of them.

    Raises:
        NotInstalled: there is no Ray. ConnectionFailed: no cluster answers.
        InvalidRequest: others can reach the cluster, and it wants no token.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise NotInstalled("Ray is not installed: pip install 'moesaic[ray]'") from error
    with _connected(ray, plan.address), _stopped() as stopped:
        crew = [_Replica(ray, plan, number) for number in range(plan.replicas)]
        try:
            while not stopped.wait(LOOK_SECONDS):
                for each in crew:
                    each.look()
                if all(each.refused for each in crew):
                    return REFUSED
        finally:
            _end(crew, plan.drain_seconds)
    return 0


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith("ray://"):
        raise InvalidRequest("--address: take that of the cluster itself, host:port, not a Ray client's")
    if address not in ("auto", "local") and not _near(address.rpartition(":")[0]):
        _want_token(address)
    if address not in ("auto", "local"):
        _reach(address)  # Ray itself would try for minutes
    try:
        ray.init(address, namespace="moesaic", logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionFailed(f"no Ray cluster answers at {address:.100}: {error!s:.200}") from error
    try:
        for node in ray.nodes():
            if node["Alive"] and not _near(node["NodeManagerAddress"]):
                _want_token(node["NodeManagerAddress"])
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConnectionFailed(f"no Ray cluster answers at {address:.100}: {error}") from error


def _near(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _want_token(where: str) -> None:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise InvalidRequest(
            f"{where:.100} can be reached from elsewhere, and whoever reaches Ray runs code on it: "
            "set RAY_AUTH_MODE=token here and on every node (docs/how-to/launch.md)"
        )


@contextlib.contextmanager
def _stopped() -> Iterator[threading.Event]:
    """Yield an event that is set by SIGTERM and SIGINT."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Process:
    """The actor: one worker, which is told to stop when this is gone."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, flags: tuple[str, ...]) -> int:
        """Run a worker and return its exit code."""
        python = sys.executable
        tied = (python, "-m", "moesaic.cluster.launch._tied", str(os.getpid()))
        # Called on the actor's own loop, whose thread lives as long as the actor: the kernel watches the thread.
        self._process = await asyncio.create_subprocess_exec(*tied, python, "-m", "moesaic.cli", "worker", *flags)
        return await self._process.wait()

    async def stop(self) -> None:
        """Have the worker end what it has."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()


@dataclass
class _Running:
    actor: Any
    group: Any
    ended: Any
    """A reference to its exit code."""
    since: float


class _Replica:
    """A worker that is started again, wherever there is room."""

    def __init__(self, ray: Any, plan: Plan, number: int) -> None:
        self._ray, self._plan, self._number = ray, plan, number
        self.running: _Running | None = None
        self.refused = False
        self._pauses = 0
        self._not_before = 0.0

    def look(self) -> None:
        """Start it if it does not run, and see whether it still does."""
        if self.running is None:
            if not self.refused and time.monotonic() >= self._not_before:
                self._start()
            return
        if self._ray.wait([self.running.ended], timeout=0)[0]:
            self._ended(self.running)

    def _start(self) -> None:
        ray, plan = self._ray, self._plan
        placing: Any = importlib.import_module("ray.util.placement_group")
        strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
        wanted = {"CPU": plan.cpus or 1.0} | ({"GPU": float(plan.gpus)} if plan.gpus else {})
        group = placing.placement_group([wanted], strategy="STRICT_PACK")
        actor = (
            ray.remote(Process)
            .options(
                num_cpus=wanted["CPU"],
                num_gpus=plan.gpus,
                max_restarts=0,
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(group),
            )
            .remote()
        )
        self.running = _Running(actor, group, actor.run.remote(plan.worker), time.monotonic())
        log.info("a replica is started", extra={"replica": self._number})

    def _ended(self, running: _Running) -> None:
        code = self._code(running)
        self._drop(running)
        self.refused = code == REFUSED
        if time.monotonic() - running.since > STEADY_SECONDS:
            self._pauses = 0
        pause = min(LONGEST_PAUSE, 0.5 * 2**self._pauses)
        self._pauses += 1
        self._not_before = time.monotonic() + pause
        if self.refused:
            log.error("a replica was refused: its log says why", extra={"replica": self._number})
        else:
            log.warning(
                "a replica is lost and started again",
                extra={"replica": self._number, "code": "none" if code is None else code, "pause": pause},
            )

    def _code(self, running: _Running) -> int | None:
        """Return the worker's exit code; None: it was lost together with its actor."""
        try:
            return int(self._ray.get(running.ended))
        except self._ray.exceptions.RayError:
            return None

    def _drop(self, running: _Running) -> None:
        placing: Any = importlib.import_module("ray.util.placement_group")
        self.running = None
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(running.actor)
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            placing.remove_placement_group(running.group)

    def stop(self) -> None:
        """Ask it to end what it has."""
        if self.running is not None:
            self.running.actor.stop.remote()

    def drop(self, until: float) -> None:
        """Wait until then for it to end, and take its place away."""
        if self.running is not None:
            self._ray.wait([self.running.ended], timeout=max(0.0, until - time.monotonic()))
            self._drop(self.running)


def _end(crew: list[_Replica], seconds: float) -> None:
    until = time.monotonic() + seconds + SPARE_SECONDS
    for each in crew:
        each.stop()
    for each in crew:
        each.drop(until)
