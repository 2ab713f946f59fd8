"""How many jobs a second the stores take in, and lease and end: ``python -m tests.cluster.queue.rate``.

A job has a body of 2,000 bytes and a result of 1,000. "1" is one caller, who waits for each answer before it asks
again; "64" are 64 of them. Each figure is of ``--jobs`` jobs, after as many to warm up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from moesaic.bench import report
from moesaic.cluster.jobs import Job, LeaseToken, Store, StoreLimits
from moesaic.cluster.store import open_store
from tests.support.postgres import Server

BOUNDS = StoreLimits(queued=10**6, queued_per_tenant=10**6, queued_cost=10**12)


async def measure(jobs: int, abreast: int, one: Callable[[int], Awaitable[None]]) -> float:
    """Return how often a second something is done, so many at once."""

    async def lane(first: int) -> None:
        for n in range(first, jobs, abreast):
            await one(n)

    begun = time.perf_counter()
    await asyncio.gather(*(lane(first) for first in range(abreast)))
    return jobs / (time.perf_counter() - begun)


async def rates(store: Store, jobs: int) -> dict[str, float]:
    """Return jobs a second, by what is done and how many do it at once."""
    names = iter(range(10**9))

    async def enqueue(n: int) -> None:
        await store.submit(Job(f"j{next(names)}", "m", body=bytes(2000), tenant=f"t{n % 10}", cost=100))

    async def end(n: int) -> None:
        [lease] = await store.lease("w", ["m"], 1)
        assert await store.finish(LeaseToken(lease.job.id, lease.fence), "done", bytes(1000))

    found = {}
    for warm in (True, False):
        for abreast in (1, 64):
            enqueued = await measure(jobs, abreast, enqueue)
            ended = await measure(jobs, abreast, end)
            if not warm:
                found |= {f"enqueue/s {abreast}": round(enqueued), f"lease+finish/s {abreast}": round(ended)}
    return found


async def of(where: str, jobs: int) -> dict[str, float]:
    store = await open_store(where, BOUNDS)
    try:
        return await rates(store, jobs)
    finally:
        await store.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"jobs": args.jobs, "sqlite": sqlite3.sqlite_version}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found["sqlite rates"] = asyncio.run(of(f"{folder}/jobs.db", args.jobs))
    server = Server()
    try:
        found["postgres"] = server.sql("SHOW server_version")[0][0]
        found["postgres rates"] = asyncio.run(of(server.address("postgres"), args.jobs))
    finally:
        server.remove()
    print(json.dumps(found, indent=2))
    if args.out:
        report.write(args.out, report.record(f"python -m tests.cluster.queue.rate --jobs {args.jobs}", found))


if __name__ == "__main__":
    main()
