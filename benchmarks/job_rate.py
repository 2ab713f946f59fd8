"""Measure how many jobs per second the job stores accept, and how many they lease and finish.

A job has a body of 2,000 bytes and a result of 1,000 bytes. The figures "1" are of one caller that waits for each
reply before its next call; those of "64" are of 64 such callers at once. Each figure is over --jobs jobs, after a
warm-up with the same number. PostgreSQL must be installed; a temporary server is started from it.
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

from benchmarks.postgres_server import PostgresServer
from moesaic.bench import provenance
from moesaic.cluster.jobs import Job, LeaseToken, Store, StoreLimits
from moesaic.cluster.store import open_store

EXAMPLE = """example:
  python -m benchmarks.job_rate --jobs 4000 --out docs/results/jobs-rate.json
"""
LIMITS = StoreLimits(queued=10**6, queued_per_tenant=10**6, queued_cost=10**12)


async def measure(jobs: int, callers: int, call: Callable[[int], Awaitable[None]]) -> float:
    """Make ``jobs`` calls, spread over this number of concurrent callers; return the calls per second."""

    async def caller(first: int) -> None:
        for number in range(first, jobs, callers):
            await call(number)

    start = time.perf_counter()
    await asyncio.gather(*(caller(first) for first in range(callers)))
    return jobs / (time.perf_counter() - start)


async def rates(store: Store, jobs: int) -> dict[str, float]:
    """Return the jobs per second of a store, by operation and number of concurrent callers."""
    numbers = iter(range(10**9))

    async def enqueue(n: int) -> None:
        await store.submit(Job(f"j{next(numbers)}", "m", body=bytes(2000), tenant=f"t{n % 10}", cost=100))

    async def finish(n: int) -> None:
        [lease] = await store.lease("w", ["m"], 1)
        assert await store.finish(LeaseToken(lease.job.id, lease.fence), "done", bytes(1000))

    figures: dict[str, float] = {}
    for warm_up in (True, False):
        for callers in (1, 64):
            enqueued = await measure(jobs, callers, enqueue)
            finished = await measure(jobs, callers, finish)
            if not warm_up:
                figures |= {f"enqueue/s {callers}": round(enqueued), f"lease+finish/s {callers}": round(finished)}
    return figures


async def store_rates(where: str, jobs: int) -> dict[str, float]:
    """Open the job store at the address ``where``; return its jobs per second (see ``rates``)."""
    store = await open_store(where, LIMITS)
    try:
        return await rates(store, jobs)
    finally:
        await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.job_rate",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=2000, metavar="N", help="jobs per figure (default 2000)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="put the SQLite file on this folder's disk")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to this file, as JSON")
    args = parser.parse_args()
    figures: dict[str, Any] = {"jobs": args.jobs, "sqlite": sqlite3.sqlite_version}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures["sqlite rates"] = asyncio.run(store_rates(f"{folder}/jobs.db", args.jobs))
    try:
        server = PostgresServer()
    except FileNotFoundError as error:
        parser.exit(1, f"{json.dumps(figures, indent=2)}\n{parser.prog}: error: {error}\n")
    try:
        figures["postgres"] = server.sql("SHOW server_version")[0][0]
        figures["postgres rates"] = asyncio.run(store_rates(server.address("postgres"), args.jobs))
    finally:
        server.remove()
    print(json.dumps(figures, indent=2))
    if args.out:
        provenance.write(args.out, provenance.record(f"{parser.prog} --jobs {args.jobs}", figures))


if __name__ == "__main__":
    main()
