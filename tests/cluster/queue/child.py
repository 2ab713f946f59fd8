"""A gateway's worth of work on a store, in a process that is killed: ``python -m tests.cluster.queue.child``.

It says what was acknowledged, a line each, at once: whatever it has said must be there afterwards. With ``--every`` it
has a child of its own for each statement of the work, which is killed right before it, and one for each commit, which
is killed right after it; ``where`` is then a folder, with a folder for each of them and what it said beside it.
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


class Deadly(sqlite3.Connection):
    """Kills the process before or after its k-th statement."""

    at = 0
    after = False
    count = 0
    commits: ClassVar[list[int]] = []

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        Deadly.count += 1
        if sql == "COMMIT":
            Deadly.commits.append(Deadly.count)
        self._die(after=False)
        cursor = super().execute(sql, *values)
        self._die(after=True)
        return cursor

    def executemany(self, *values: Any) -> sqlite3.Cursor:
        Deadly.count += 1
        self._die(after=False)
        return super().executemany(*values)

    def _die(self, after: bool) -> None:
        if Deadly.count == Deadly.at and after == Deadly.after:
            os.kill(os.getpid(), signal.SIGKILL)


def say(*words: object) -> None:
    print(*words, flush=True)


async def one(store: Any, job_id: str) -> None:
    """A job from its submission to its end."""
    say("submitted", await store.submit(job(job_id, idempotency_key=job_id, body=b"x" * 3000)))
    for lease in await store.lease("w", ["m"], 1):
        hold = LeaseToken(lease.job.id, lease.fence)
        end = sum(record.count for record in lease.log)
        await store.append({hold: LogRecord(end, 2, b"ab")})
        if await store.finish(hold, "done", lease.job.id.encode(), LogRecord(end + 2, 1, b"c")):
            say("done", lease.job.id)


async def work(where: str, name: str, jobs: int, abreast: int) -> None:
    store = await open_store(where, StoreLimits())
    await store.release(
        [beat.lease_token for beat in await store.active_leases()]
    )  # of the one before, which was killed
    say("open")

    async def several(lane: int) -> None:
        for n in range(jobs):
            await one(store, f"{name}-{lane}-{n}")

    await asyncio.gather(*(several(lane) for lane in range(abreast)))
    await store.tick(await store.tick(-1))
    await store.close()
    say("statements", Deadly.count, *Deadly.commits)


def forked(folder: Path, at: int, after: bool) -> int:
    """Work in a process of its own, killed at a statement; return its exit status."""
    folder.mkdir(parents=True)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Deadly.at, Deadly.after = at, after
    with folder.with_suffix(".said").open("w") as said:
        os.dup2(said.fileno(), 1)
    asyncio.run(work(str(folder / "jobs.db"), "j", 1, 1))
    os._exit(0)


def every(folder: Path) -> None:
    """Kill the work at each of its statements."""
    whole = folder / "whole"
    assert forked(whole, 0, False) == 0
    last = whole.with_suffix(".said").read_text().splitlines()[-1]
    count, *commits = map(int, last.split()[1:])
    for at in range(1, count + 1):
        assert forked(folder / str(at), at, False) == -signal.SIGKILL
    for at in commits:
        assert forked(folder / f"{at}-after", at, True) == -signal.SIGKILL


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("where")
    parser.add_argument("--name", default="j")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--abreast", type=int, default=1)
    parser.add_argument("--every", action="store_true")
    args = parser.parse_args()
    connect = sqlite3.connect
    sqlite.sqlite3.connect = lambda *values, **named: connect(*values, factory=Deadly, **named)  # type: ignore[assignment]
    if args.every:
        every(Path(args.where))
    else:
        asyncio.run(work(args.where, args.name, args.jobs, args.abreast))


if __name__ == "__main__":
    sys.exit(main())
