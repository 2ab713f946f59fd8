"""Run the operations of a gateway on a store, in a process that is killed: ``python -m tests.cluster.store.child``.

The process prints a line for each operation that the store has acknowledged; all of these must be in the store
afterwards. With ``--every``, the process forks a child for each statement, which is killed before the statement, and
one for each commit, which is killed after the commit. ``where`` is then a folder, which gets a folder for the store of
each child and a file with its output.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any, ClassVar

from moesaic.cluster.jobs import LeaseToken, LogRecord, StoreLimits
from moesaic.cluster.store import open_store, sqlite
from tests.support.stores import job


class KillingConnection(sqlite3.Connection):
    """Connection that kills the process before or after its k-th statement."""

    at = 0
    after = False
    count = 0
    commits: ClassVar[list[int]] = []

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        KillingConnection.count += 1
        if sql == "COMMIT":
            KillingConnection.commits.append(KillingConnection.count)
        self._die(after=False)
        cursor = super().execute(sql, *values)
        self._die(after=True)
        return cursor

    def executemany(self, *values: Any) -> sqlite3.Cursor:
        KillingConnection.count += 1
        self._die(after=False)
        return super().executemany(*values)

    def _die(self, after: bool) -> None:
        if KillingConnection.count == KillingConnection.at and after == KillingConnection.after:
            os.kill(os.getpid(), signal.SIGKILL)


def report(*words: object) -> None:
    print(*words, flush=True)


async def run_job(store: Any, job_id: str) -> None:
    """Run a job from its submission to its end."""
    report("submitted", await store.submit(job(job_id, idempotency_key=job_id, body=b"x" * 3000)))
    for lease in await store.lease("w", ["m"], 1):
        lease_token = LeaseToken(lease.job.id, lease.fence)
        end = sum(record.count for record in lease.log)
        await store.append({lease_token: LogRecord(end, 2, b"ab")})
        if await store.finish(lease_token, "done", lease.job.id.encode(), LogRecord(end + 2, 1, b"c")):
            report("done", lease.job.id)


async def work(where: str, name: str, jobs: int, concurrency: int) -> None:
    store = await open_store(where, StoreLimits())
    await store.release(
        [status.lease_token for status in await store.active_leases()]
    )  # of the last process, which was killed
    report("open")

    async def run_jobs(lane: int) -> None:
        for n in range(jobs):
            await run_job(store, f"{name}-{lane}-{n}")

    await asyncio.gather(*(run_jobs(lane) for lane in range(concurrency)))
    await store.tick(await store.tick(-1))
    await store.close()
    report("statements", KillingConnection.count, *KillingConnection.commits)


def run_forked(folder: Path, at: int, after: bool) -> int:
    """Run the operations in a child process that is killed at a statement, and return its exit status."""
    folder.mkdir(parents=True)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    KillingConnection.at, KillingConnection.after = at, after
    with folder.with_suffix(".output").open("w") as output:
        os.dup2(output.fileno(), 1)
    asyncio.run(work(str(folder / "jobs.db"), "j", 1, 1))
    os._exit(0)


def kill_at_every_statement(folder: Path) -> None:
    """Kill a child at each statement and after each commit."""
    whole = folder / "whole"
    assert run_forked(whole, 0, False) == 0
    last = whole.with_suffix(".output").read_text().splitlines()[-1]
    count, *commits = map(int, last.split()[1:])
    for at in range(1, count + 1):
        assert run_forked(folder / str(at), at, False) == -signal.SIGKILL
    for at in commits:
        assert run_forked(folder / f"{at}-after", at, True) == -signal.SIGKILL


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("where")
    parser.add_argument("--name", default="j")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--every", action="store_true")
    args = parser.parse_args()
    connect = sqlite3.connect
    sqlite.sqlite3.connect = lambda *values, **named: connect(*values, factory=KillingConnection, **named)  # type: ignore[assignment]
    if args.every:
        kill_at_every_statement(Path(args.where))
    else:
        asyncio.run(work(args.where, args.name, args.jobs, args.concurrency))


if __name__ == "__main__":
    sys.exit(main())
