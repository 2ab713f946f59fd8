"""Run thousands of jobs while workers and the gateway are killed, stopped and continued at random.

Clients send every job over HTTP, half of them streamed, and repeat it under the same idempotency key whenever a
connection breaks. The run passes if every job is answered with the text that its prompt and seed determine, and no job
counts as done under two fences (lease numbers). The gateway must also have refused late results, else the run has not
tested fencing. Only workers that were stopped and continued send late results; killed workers send none.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.fake_backend import answer
from benchmarks.worker_forkserver import WorkerForkServer
from moesaic.cluster.jobs import StoreLimits
from moesaic.cluster.store import open_store

EXAMPLES = """examples:
  python -m benchmarks.kill_workers --jobs 5000
  python -m benchmarks.kill_workers --jobs 500000 --out docs/results/kills-sqlite.json
  python -m benchmarks.kill_workers --jobs 20000 --calm     # kills nothing: measures jobs per second
"""
LEASE_SECONDS = 1.0
WORKERS = 16
SLOTS = 8
TOKEN_SECONDS = 0.01
CLIENTS = 96
CRASHES = 50
"""Crashes after which a job is dead. The number is high, because here no crash is the fault of the job."""
JOB_DONE = '"job finished"'
RESULT_TOO_LATE = '"result refused: lease not valid"'
"""Messages in the workers' logs."""
DEAD_JOB = "every worker that ran"
"""Part of the error message of a dead job."""


class Cluster:
    """A gateway and its worker processes, with methods that kill or stop them."""

    def __init__(
        self, folder: Path, where: str, seed: int, gateway: str, kills: float, workers: int, lease: float
    ) -> None:
        self.folder, self.where, self.module, self.kills, self.lease = folder, where, gateway, kills, lease
        self.random = random.Random(seed)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.counts: collections.Counter[str] = collections.Counter()
        self.paused: set[str] = set()
        self.gateway = self._start_gateway()
        self.workers = WorkerForkServer(self.url, folder / "log", slots=SLOTS, seconds=TOKEN_SECONDS)
        for number in range(workers):
            self.workers.spawn(f"w{number}")

    def _start_gateway(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self.module, "gateway", "--jobs", self.where, "--port", str(self.port)]
        command += ["--lease", str(self.lease), "--crashes", str(CRASHES), "--model", "fake"]
        with (self.folder / "gateway.log").open("ab") as log:
            return subprocess.Popen([*command, "--log-level", "warning"], stdout=log, stderr=log)

    async def kill_at_random(self) -> None:
        """Kill or stop random workers, and every few seconds kill the gateway, until this coroutine is cancelled."""
        next_gateway: float | None = None
        while True:
            await self._attack_worker()
            if next_gateway is None and self._gateway_listens():  # on a slow machine a gateway needs seconds to start
                next_gateway = time.monotonic() + self.random.uniform(2, 4)
            if next_gateway is not None and time.monotonic() > next_gateway:
                self._kill_gateway()
                next_gateway = None

    async def attack(self, count: int) -> None:
        """Kill and stop workers ``count`` times while the gateway listens, and kill the gateway once, halfway."""
        for number in range(count):
            while not self._gateway_listens():
                await asyncio.sleep(0.02)
            await self._attack_worker()
            if number == count // 2:
                self._kill_gateway()

    async def _attack_worker(self) -> None:
        await asyncio.sleep(self.random.uniform(0.05, 0.15))
        # A stopped worker is not killed, so that it continues and sends results that are too late.
        names = sorted(self.workers.pids.keys() - self.paused)
        if not names:
            return
        name = self.random.choice(names)
        if self.random.random() < self.kills:
            self.workers.signal(name, signal.SIGKILL)
            self.workers.spawn(name)
            self.counts["workers killed"] += 1
        else:
            asyncio.ensure_future(self.pause(name)).add_done_callback(lambda _: None)
            self.counts["workers stopped"] += 1

    def _kill_gateway(self) -> None:
        self.gateway.kill()
        self.gateway.wait()
        self.gateway = self._start_gateway()
        self.counts["gateway killed"] += 1

    def _gateway_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def pause(self, name: str) -> None:
        """Stop a worker's process (SIGSTOP) for 0.5 to 2.5 times the duration of a lease, then continue it."""
        self.paused.add(name)
        self.workers.signal(name, signal.SIGSTOP)
        try:
            await asyncio.sleep(self.lease * self.random.uniform(0.5, 2.5))
        finally:
            self.workers.signal(name, signal.SIGCONT)
            self.paused.discard(name)

    def close(self) -> None:
        """Kill the workers and shut the gateway down."""
        self.workers.close()
        self.gateway.terminate()
        self.gateway.wait(30)


class Broken(Exception):
    """A request failed and must be repeated."""


class Client:
    """HTTP client that repeats every job until it is answered, and compares the answer with the expected text."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = url + "/v1/completions", session
        self.wrong: list[str] = []
        self.errors: collections.Counter[str] = collections.Counter()
        """Error messages, cut off after 60 characters, and how often each came."""
        self.sent = self.answered = self.repeated = 0
        self.dead = 0

    async def run_job(self, number: int) -> None:
        """Send job ``number``, streamed if the number is odd, until it is answered."""
        count = 3 + number % 10
        body = {"model": "fake", "prompt": f"job {number}", "max_tokens": count, "seed": number}
        expected = answer(f"job {number}", number, count)
        headers = {"idempotency-key": f"job-{number}"}
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, Broken):
                text = await (self._streamed if number % 2 else self._unstreamed)(body, headers)
                self.answered += 1
                if text != expected:
                    self.wrong.append(f"{number}: {text!r} instead of {expected!r}")
                return
            self.repeated += 1
            await asyncio.sleep(random.uniform(0.05, 0.5))

    async def _unstreamed(self, body: dict[str, Any], headers: dict[str, str]) -> str:
        async with self.session.post(self.url, json=body, headers=headers) as response:
            content = await response.json()
            if response.status != 200:
                raise self._broken(content)
            return str(content["choices"][0]["text"])

    async def _streamed(self, body: dict[str, Any], headers: dict[str, str]) -> str:
        parts: list[str] = []
        async with self.session.post(self.url, json=body | {"stream": True}, headers=headers) as response:
            if response.status != 200:
                raise self._broken(await response.json())
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    return "".join(parts)
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise self._broken(event)
                    parts += [choice["text"] for choice in event["choices"]]
        raise Broken

    def _broken(self, content: Any) -> Broken:
        message = str(content["error"]["message"]) if "error" in content else str(content)
        self.errors[message[:60]] += 1
        if DEAD_JOB in message:
            self.dead += 1
        return Broken(message)


async def _run_jobs(
    jobs: int, cluster: Cluster, clients: int, show_progress: bool, calm: bool, attacks: int | None
) -> Client:
    timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        client = Client(cluster.url, session)
        work = asyncio.sleep(0) if calm else cluster.kill_at_random() if attacks is None else cluster.attack(attacks)
        killer = asyncio.ensure_future(work)
        numbers = itertools.takewhile(
            lambda number: number < jobs or (attacks is not None and not killer.done()), itertools.count()
        )

        async def run_some() -> None:
            for number in numbers:
                client.sent += 1
                await client.run_job(number)
                if show_progress and number % 5000 == 0:
                    print(f"{client.answered} of {jobs}, {dict(cluster.counts)}", file=sys.stderr, flush=True)

        await asyncio.gather(*(run_some() for _ in range(clients)))
        killer.cancel()
        return client


def count_results(log: Path) -> tuple[int, int, int]:
    """Return counts from the workers' log: jobs done, jobs done under several fences, and refused late results."""
    fences: dict[str, set[int]] = {}
    late = 0
    with log.open() as lines:
        for line in lines:
            if RESULT_TOO_LATE in line:
                late += 1
            elif JOB_DONE in line:
                entry = json.loads(line)
                fences.setdefault(entry["job"], set()).add(entry["fence"])
    return len(fences), sum(len(numbers) > 1 for numbers in fences.values()), late


async def check_store(where: str) -> tuple[str, dict[str, Any]]:
    """Return the result of a job store's integrity check, and each model's numbers of queued and leased jobs."""
    store = await open_store(where, StoreLimits())
    depths = {name: (depth.queued, depth.leased) for name, depth in (await store.depths()).items()}
    try:
        return await store.check(), depths
    finally:
        await store.close()


def kill_workers(
    jobs: int,
    where: str | None = None,
    seed: int = 1,
    clients: int = CLIENTS,
    show_progress: bool = False,
    gateway: str = "moesaic.cli",
    kills: float = 0.75,
    calm: bool = False,
    workers: int = WORKERS,
    lease: float = LEASE_SECONDS,
    attacks: int | None = None,
) -> dict[str, Any]:
    """Run the jobs on a new cluster whose processes are killed, and return the figures.

    Args:
        jobs: number of jobs.
        where: address of the job store; None creates a SQLite file.
        seed: seed of the random choice of the processes and times.
        clients: number of jobs that are requested at the same time.
        show_progress: whether to print the progress on standard error.
        gateway: name of the Python module that is run as the gateway.
        kills: probability that a chosen worker is killed; otherwise, it is stopped for some time.
        calm: whether to kill and stop nothing.
        workers: number of workers.
        lease: duration of a lease, in seconds.
        attacks: number of attacks on workers; jobs are sent until these are over, and the gateway is killed once.
            None: workers and gateways are attacked until all jobs are answered.
    """
    folder = Path(tempfile.mkdtemp())
    where = where or str(folder / "jobs.sqlite")
    cluster, start = Cluster(folder, where, seed, gateway, kills, workers, lease), time.monotonic()
    try:
        client = asyncio.run(_run_jobs(jobs, cluster, clients, show_progress, calm, attacks))
        seconds = time.monotonic() - start
        time.sleep(3 * lease)  # time for stopped workers to continue and send late results
    finally:
        cluster.close()
    done, done_twice, late = count_results(folder / "log")
    for line in (folder / "gateway.log").read_text().splitlines():
        if '"trace"' in line or not line.startswith("{"):
            print(line[:3000], file=sys.stderr)
    integrity, depths = asyncio.run(check_store(where))
    figures = {
        "jobs": client.sent,
        "seconds": round(seconds, 1),
        "jobs_per_second": round(client.sent / seconds, 1),
        **{name.replace(" ", "_"): count for name, count in cluster.counts.items()},
        "answered": client.answered,
        "lost": client.sent - client.answered,
        "wrong": len(client.wrong),
        "asked_again": client.repeated,
        "dead": client.dead,
        "told": dict(client.errors),
        "told_done": done,
        "done_under_two_fences": done_twice,
        "late_results_refused": late,
        "left": depths,
        "integrity": integrity,
    }
    if client.wrong:
        print(*client.wrong[:5], sep="\n", file=sys.stderr)
    shutil.rmtree(folder)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_workers",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=5000, metavar="N", help="number of jobs (default 5000)")
    parser.add_argument("--where", metavar="URL", help="job store, postgresql://...; default: a SQLite file")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the random kills (default 1)")
    parser.add_argument("--calm", action="store_true", help="kill and stop nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to this file, as JSON")
    args = parser.parse_args()
    figures = kill_workers(args.jobs, args.where, args.seed, show_progress=True, calm=args.calm)
    print(json.dumps(figures, indent=1))
    if args.out:
        from moesaic.bench import provenance  # imports torch, which would disturb the measurement

        command = f"python -m benchmarks.kill_workers --jobs {args.jobs}{' --calm' * args.calm}"
        provenance.write(args.out, provenance.record(command, figures))
    late = figures["late_results_refused"] or args.calm
    sys.exit(bool(figures["lost"] or figures["wrong"] or figures["done_under_two_fences"] or not late))


if __name__ == "__main__":
    main()
