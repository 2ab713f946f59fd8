"""The kill harness: thousands of jobs while workers and the gateway are killed, stopped and continued at random.

Every job is asked for over HTTP, half of them streamed, and asked for again under the same idempotency key whenever a
connection breaks. What must hold: every job is answered, with what its prompt and seed demand, and no job is counted as
done under two fences. Late results must have been refused, or the run has shown nothing (kills alone make none).

    python -m tests.cluster.harness --jobs 5000
    python -m tests.cluster.harness --jobs 500000 --out docs/results/kills-sqlite.json
    python -m tests.cluster.harness --jobs 20000 --calm     # nobody is killed: how many jobs a second?
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
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

from moesaic.cluster.jobs import StoreLimits
from moesaic.cluster.store import open_store
from tests.support.backend import answer
from tests.support.worker_pool import Nursery

LEASE = 1.0
WORKERS = 16
SLOTS = 8
STEP = 0.01
CRASHES = 50
"""Workers die at random here, whatever they do: nothing is to be inferred from that."""


class Plant:
    """A gateway and workers, and what is done to them."""

    def __init__(self, folder: Path, where: str, seed: int, gateway: str, kills: float) -> None:
        self.folder, self.where, self.module, self.kills = folder, where, gateway, kills
        self.random = random.Random(seed)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.counts: collections.Counter[str] = collections.Counter()
        self.paused: set[str] = set()
        self.gateway = self._start()
        self.nursery = Nursery(self.url, folder / "log", slots=SLOTS, seconds=STEP)
        for number in range(WORKERS):
            self.nursery.spawn(f"w{number}")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self.module, "gateway", "--jobs", self.where, "--port", str(self.port)]
        command += ["--lease", str(LEASE), "--crashes", str(CRASHES), "--model", "fake", "--log-level", "warning"]
        with (self.folder / "gateway.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    async def torment(self) -> None:
        """Kill and stop workers for ever, and now and then the gateway."""
        next_gateway: float | None = None
        while True:
            await asyncio.sleep(self.random.uniform(0.05, 0.15))
            # One that is stopped is not killed: it is to come back, late, with what it had.
            name = self.random.choice(sorted(self.nursery.made.keys() - self.paused))
            if self.random.random() < self.kills:
                self.nursery.signal(name, signal.SIGKILL)
                self.nursery.spawn(name)
                self.counts["workers killed"] += 1
            else:
                asyncio.ensure_future(self.pause(name)).add_done_callback(lambda _: None)
                self.counts["workers stopped"] += 1
            if next_gateway is None and self._listens():  # on a slow machine a gateway needs seconds to start
                next_gateway = time.monotonic() + self.random.uniform(2, 4)
            if next_gateway is not None and time.monotonic() > next_gateway:
                self.gateway.kill()
                self.gateway.wait()
                self.gateway = self._start()
                self.counts["gateway killed"] += 1
                next_gateway = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def pause(self, name: str) -> None:
        self.paused.add(name)
        self.nursery.signal(name, signal.SIGSTOP)
        try:
            await asyncio.sleep(LEASE * self.random.uniform(0.5, 2.5))
        finally:
            self.nursery.signal(name, signal.SIGCONT)
            self.paused.discard(name)

    def close(self) -> None:
        self.nursery.close()
        self.gateway.terminate()
        self.gateway.wait(30)


class Client:
    """Asks for every job until it is answered."""

    def __init__(self, plant: Plant, session: aiohttp.ClientSession) -> None:
        self.plant, self.session = plant, session
        self.wrong: list[str] = []
        self.told: collections.Counter[str] = collections.Counter()
        """What was said where no answer was given."""
        self.answered = self.again = 0
        self.dead = 0

    async def ask(self, number: int) -> None:
        count = 3 + number % 10
        body = {"model": "fake", "prompt": f"job {number}", "max_tokens": count, "seed": number}
        wanted = answer(f"job {number}", number, count)
        headers = {"idempotency-key": f"job-{number}"}
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, Broken):
                said = await (self._streamed if number % 2 else self._whole)(body, headers)
                self.answered += 1
                if said != wanted:
                    self.wrong.append(f"{number}: {said!r} instead of {wanted!r}")
                return
            self.again += 1
            await asyncio.sleep(random.uniform(0.05, 0.5))

    async def _whole(self, body: dict[str, Any], headers: dict[str, str]) -> str:
        async with self.session.post(self.plant.url + "/v1/completions", json=body, headers=headers) as reply:
            said = await reply.json()
            if reply.status != 200:
                raise self._broken(said)
            return str(said["choices"][0]["text"])

    async def _streamed(self, body: dict[str, Any], headers: dict[str, str]) -> str:
        found, url = [], self.plant.url + "/v1/completions"
        async with self.session.post(url, json=body | {"stream": True}, headers=headers) as reply:
            if reply.status != 200:
                raise self._broken(await reply.json())
            async for line in reply.content:
                if line.startswith(b"data: [DONE]"):
                    return "".join(found)
                if line.startswith(b"data: "):
                    said = json.loads(line[6:])
                    if "error" in said:
                        raise self._broken(said)
                    found += [choice["text"] for choice in said["choices"]]
        raise Broken

    def _broken(self, said: Any) -> Exception:
        message = str(said["error"]["message"]) if "error" in said else str(said)
        self.told[message[:60]] += 1
        if "every worker that ran" in message:
            self.dead += 1
        return Broken(message)


class Broken(Exception):
    """To be asked again."""


async def run(jobs: int, plant: Plant, at_once: int, show: bool, calm: bool) -> Client:
    timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        client = Client(plant, session)
        todo = iter(range(jobs))

        async def one() -> None:
            for number in todo:
                await client.ask(number)
                if show and number % 5000 == 0:
                    print(f"{client.answered} of {jobs}, {dict(plant.counts)}", file=sys.stderr, flush=True)

        torment = asyncio.ensure_future(asyncio.sleep(0) if calm else plant.torment())
        await asyncio.gather(*(one() for _ in range(at_once)))
        torment.cancel()
        return client


def counted(log: Path) -> tuple[int, int, int]:
    """Return how many jobs were counted as done, how many of them under two fences, and how many came too late."""
    fences: dict[str, set[int]] = {}
    late = 0
    with log.open() as lines:
        for line in lines:
            if '"result refused: lease not valid"' in line:
                late += 1
            elif '"job finished"' in line:
                said = json.loads(line)
                fences.setdefault(said["job"], set()).add(said["fence"])
    return len(fences), sum(len(each) > 1 for each in fences.values()), late


async def checked(where: str) -> tuple[str, dict[str, Any]]:
    store = await open_store(where, StoreLimits())
    depths = {name: (depth.queued, depth.leased) for name, depth in (await store.depths()).items()}
    try:
        return await store.check(), depths
    finally:
        await store.close()


def harness(
    jobs: int,
    where: str | None = None,
    seed: int = 1,
    at_once: int = 96,
    show: bool = False,
    gateway: str = "moesaic.cli",
    kills: float = 0.75,
    calm: bool = False,
) -> dict[str, Any]:
    """Run it, and return what was found.

    Args:
        jobs: how many.
        where: the store; None: a file of its own.
        seed: of what is done to whom.
        at_once: clients.
        show: whether to say how far it is.
        gateway: the module that is run as one.
        kills: the part of workers that are killed, and not stopped for a while.
        calm: whether to do nothing to anybody.
    """
    folder = Path(tempfile.mkdtemp())
    where = where or str(folder / "jobs.sqlite")
    plant, begun = Plant(folder, where, seed, gateway, kills), time.monotonic()
    try:
        client = asyncio.run(run(jobs, plant, at_once, show, calm))
        seconds = time.monotonic() - begun
        time.sleep(3 * LEASE)  # those that are stopped go on, and come too late
    finally:
        plant.close()
    done, twice, late = counted(folder / "log")
    for line in (folder / "gateway.log").read_text().splitlines():
        if '"trace"' in line or not line.startswith("{"):
            print(line[:3000], file=sys.stderr)
    integrity, depths = asyncio.run(checked(where))
    found = {
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "jobs_per_second": round(jobs / seconds, 1),
        **{name.replace(" ", "_"): count for name, count in plant.counts.items()},
        "answered": client.answered,
        "lost": jobs - client.answered,
        "wrong": len(client.wrong),
        "asked_again": client.again,
        "dead": client.dead,
        "told": dict(client.told),
        "told_done": done,
        "done_under_two_fences": twice,
        "late_results_refused": late,
        "left": depths,
        "integrity": integrity,
    }
    if client.wrong:
        print(*client.wrong[:5], sep="\n", file=sys.stderr)
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--where", help="postgresql://...; default: a SQLite file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calm", action="store_true", help="kill nobody")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = harness(args.jobs, args.where, args.seed, show=True, calm=args.calm)
    print(json.dumps(found, indent=1))
    if args.out:
        from moesaic.bench import report

        report.write(
            args.out, report.record(f"python -m tests.cluster.harness --jobs {args.jobs}{' --calm' * args.calm}", found)
        )
    late = found["late_results_refused"] or args.calm
    sys.exit(bool(found["lost"] or found["wrong"] or found["done_under_two_fences"] or not late))


if __name__ == "__main__":
    main()
