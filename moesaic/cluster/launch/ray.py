"""Ray launcher: each replica is an actor with a placement group and a worker process; lost replicas are restarted.

Ray only starts processes and assigns CPUs and GPUs; requests do not pass through it. Anyone who can reach a Ray cluster
can run code on it, so a cluster that is not limited to loopback must use token authentication. The launcher needs Ray
2.54 or later, and Moesaic on every node.
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

POLL_SECONDS = 0.5
STEADY_SECONDS = 60.0
"""The restart delay of a replica is reset after it has run for this number of seconds."""
MAX_RESTART_DELAY_SECONDS = 30.0
EXTRA_DRAIN_SECONDS = 10.0
"""An actor is killed this number of seconds after its worker's drain time."""
CONNECT_SECONDS = 10.0


def files(_: Plan) -> Mapping[str, str]:
    """Return no files, because this launcher starts the workers itself."""
    return {}


def run(plan: Plan) -> int:
    """Run the replicas until SIGTERM or SIGINT; return 0, or 2 if the gateway or the flags refused every replica.

    Raises:
        NotInstalled: Ray is not installed.
        ConnectionFailed: the Ray cluster is unreachable.
        InvalidRequest: the Ray cluster is reachable from other machines and does not use token authentication.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise NotInstalled("Ray is not installed: pip install 'moesaic[ray]'") from error
    with _connected(ray, plan.address), _stop_event() as stop:
        replicas = [_Replica(ray, plan, number) for number in range(plan.replicas)]
        try:
            while not stop.wait(POLL_SECONDS):
                for replica in replicas:
                    replica.poll()
                if all(replica.refused for replica in replicas):
                    return REFUSED
        finally:
            _stop_all(replicas, plan.drain_seconds)
    return 0


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith("ray://"):
        raise InvalidRequest("--address: use the cluster's address, host:port, not a Ray client address (ray://)")
    if address not in ("auto", "local") and not _is_loopback(address.rpartition(":")[0]):
        _require_token(address)
    if address not in ("auto", "local"):
        _check_reachable(address)  # Ray itself retries for minutes
    try:
        ray.init(address, namespace="moesaic", logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionFailed(f"no Ray cluster is reachable at {address:.100}: {error!s:.200}") from error
    try:
        for node in ray.nodes():
            if node["Alive"] and not _is_loopback(node["NodeManagerAddress"]):
                _require_token(node["NodeManagerAddress"])
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConnectionFailed(f"no Ray cluster is reachable at {address:.100}: {error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _require_token(address: str) -> None:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise InvalidRequest(
            f"other machines can reach Ray at {address:.100} and run code on it: "
            "set RAY_AUTH_MODE=token here and on every node (docs/how-to/launch.md)"
        )


@contextlib.contextmanager
def _stop_event() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Process:
    """Ray actor that runs one worker process. The worker gets SIGTERM when the actor dies."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, flags: tuple[str, ...]) -> int:
        """Run a worker with these flags of ``moesaic worker``; return its exit code."""
        python = sys.executable
        tied = (python, "-m", "moesaic.cluster.launch._tied", str(os.getpid()))
        # The kernel watches the thread that starts the process. This method runs on the actor's event loop, whose
        # thread lives as long as the actor.
        self._process = await asyncio.create_subprocess_exec(*tied, python, "-m", "moesaic.cli", "worker", *flags)
        return await self._process.wait()

    async def stop(self) -> None:
        """Ask the worker to finish its jobs and exit."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()


@dataclass
class _Running:
    actor: Any
    group: Any
    exit_code: Any
    """Ray object reference to the worker's exit code."""
    started_at: float


class _Replica:
    """A worker that is restarted after a failure, on any node with free resources."""

    def __init__(self, ray: Any, plan: Plan, number: int) -> None:
        self._ray, self._plan, self._number = ray, plan, number
        self.running: _Running | None = None
        self.refused = False
        self._restarts = 0
        self._not_before = 0.0

    def poll(self) -> None:
        """Start the replica if it does not run and its restart delay is over; else check whether it has ended."""
        if self.running is None:
            if not self.refused and time.monotonic() >= self._not_before:
                self._start()
            return
        if self._ray.wait([self.running.exit_code], timeout=0)[0]:
            self._handle_exit(self.running)

    def _start(self) -> None:
        ray, plan = self._ray, self._plan
        placement: Any = importlib.import_module("ray.util.placement_group")
        strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
        resources = {"CPU": plan.cpus or 1.0} | ({"GPU": float(plan.gpus)} if plan.gpus else {})
        group = placement.placement_group([resources], strategy="STRICT_PACK")
        actor = (
            ray.remote(Process)
            .options(
                num_cpus=resources["CPU"],
                num_gpus=plan.gpus,
                max_restarts=0,
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(group),
            )
            .remote()
        )
        self.running = _Running(actor, group, actor.run.remote(plan.worker), time.monotonic())
        log.info("replica started", extra={"replica": self._number})

    def _handle_exit(self, running: _Running) -> None:
        code = self._code(running)
        self._drop(running)
        self.refused = code == REFUSED
        if time.monotonic() - running.started_at > STEADY_SECONDS:
            self._restarts = 0
        delay = min(MAX_RESTART_DELAY_SECONDS, 0.5 * 2**self._restarts)
        self._restarts += 1
        self._not_before = time.monotonic() + delay
        if self.refused:
            log.error("replica refused: see the worker's log", extra={"replica": self._number})
        else:
            log.warning(
                "replica lost, restart scheduled",
                extra={"replica": self._number, "code": "none" if code is None else code, "delay": delay},
            )

    def _code(self, running: _Running) -> int | None:
        """Return the worker's exit code, or None if the worker died together with its actor."""
        try:
            return int(self._ray.get(running.exit_code))
        except self._ray.exceptions.RayError:
            return None

    def _drop(self, running: _Running) -> None:
        placement: Any = importlib.import_module("ray.util.placement_group")
        self.running = None
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(running.actor)
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            placement.remove_placement_group(running.group)

    def stop(self) -> None:
        """Ask the worker to finish its jobs and exit."""
        if self.running is not None:
            self.running.actor.stop.remote()

    def drop(self, deadline: float) -> None:
        """Wait for the worker's exit until ``deadline`` (monotonic time); then kill the actor, free its resources."""
        if self.running is not None:
            self._ray.wait([self.running.exit_code], timeout=max(0.0, deadline - time.monotonic()))
            self._drop(self.running)


def _stop_all(replicas: list[_Replica], seconds: float) -> None:
    deadline = time.monotonic() + seconds + EXTRA_DRAIN_SECONDS
    for replica in replicas:
        replica.stop()
    for replica in replicas:
        replica.drop(deadline)
