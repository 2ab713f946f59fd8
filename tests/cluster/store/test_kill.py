"""Gateways that are killed: what was acknowledged is in the store, and each job in it is complete."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.postgres import Server
from tests.support.stores import SQLiteFile, SyncStore, job


def start(where: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cluster.store.child", where, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines_until_done(child: subprocess.Popen[str]) -> list[str]:
    """Read a child's output until its first job is done."""
    lines = [child.stdout.readline()]
    while not lines[-1].startswith("done "):
        assert lines[-1], "the child has ended"
        lines.append(child.stdout.readline())
    return lines


def reported(lines: Sequence[str], event: str) -> set[str]:
    """Return the ids of jobs that a child has reported, without a line that its death cut off."""
    return {line.split()[1] for line in lines if line.startswith(f"{event} ") and line.endswith("\n")}


def check_jobs(store: SyncStore, submitted: set[str], done: set[str]) -> None:
    assert store.check() == "ok"
    for job_id in submitted:
        assert store.snapshot(job_id) is not None, job_id
    for job_id in done:
        snapshot = store.snapshot(job_id)
        assert (snapshot.state, snapshot.result) == ("done", job_id.encode())
        log = store.log(job_id)
        ends = [record.start + record.count for record in log]
        assert [record.start for record in log] == [0, *ends[:-1]]
        assert (ends[-1], log[-1].blob) == (snapshot.logged, b"c")


def test_killed_before_every_statement_and_after_every_commit(tmp_path):
    """The statements that create the tables are among them."""
    with start(str(tmp_path), "--every") as child:
        child.stdout.read()
    assert child.returncode == 0
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) > 70
    for folder in folders:
        lines = folder.with_suffix(".output").read_text().splitlines(keepends=True)
        location = SQLiteFile(folder)
        store = location.open()
        check_jobs(store, reported(lines, "submitted"), reported(lines, "done"))
        assert store.submit(job("after")) == "after"
        location.close()


def test_repeated_random_kills_lose_nothing(tmp_path):
    """Several gateways use one file, one after another, and each continues the jobs of the last."""
    draw = random.Random(7)
    where = str(tmp_path / "jobs.db")
    submitted: set[str] = set()
    done: set[str] = set()
    for number in range(8):
        with start(where, "--name", f"g{number}", "--jobs", "9999", "--concurrency", "8") as child:
            lines = [child.stdout.readline()]
            timer = threading.Timer(draw.uniform(0.05, 0.4), child.kill)
            timer.start()
            lines += child.stdout.readlines()
            timer.join()
        assert child.returncode == -signal.SIGKILL
        submitted |= reported(lines, "submitted")
        assert not done & reported(lines, "done"), "ended twice"
        done |= reported(lines, "done")
    location = SQLiteFile(tmp_path)
    store = location.open()
    assert len(done) > 50
    check_jobs(store, submitted, done)
    store.release([status.lease_token for status in store.active_leases()])
    leases = store.lease("w", ["m"], 9999)
    ended = {snapshot.job.id for snapshot in store.list_jobs("done", 10**6)}
    assert {lease.job.id for lease in leases} | ended >= submitted
    assert not {lease.job.id for lease in leases} & ended
    location.close()


@pytest.mark.parametrize("gateways", [2])
def test_postgres_crash_under_several_gateways(server: Server, database, gateways):
    """The server crashes several times, and the gateways are killed with it. Nothing acknowledged is lost."""
    draw = random.Random(11)
    submitted: set[str] = set()
    done: set[str] = set()
    for number in range(3):
        with contextlib.ExitStack() as running:
            children = [
                running.enter_context(
                    start(database.where, "--name", f"g{number}{n}", "--jobs", "9999", "--concurrency", "8")
                )
                for n in range(gateways)
            ]
            lines = [line for child in children for line in lines_until_done(child)]
            time.sleep(draw.uniform(0.05, 0.3))
            server.stop("immediate")
            for child in children:
                child.kill()
                lines += child.stdout.readlines()
            server.start()
        ended = reported(lines, "done")
        assert ended and not done & ended
        submitted |= reported(lines, "submitted")
        done |= ended
    check_jobs(database.open(), submitted, done)


def test_file_is_opened_by_one_gateway(tmp_path: Path):
    """A second process is refused, and the file is free when the first process is dead."""
    where = str(tmp_path / "jobs.db")
    with start(where, "--jobs", "99999") as first:
        assert first.stdout.readline() == "open\n"
        second = subprocess.run(
            [sys.executable, "-m", "tests.cluster.store.child", where], capture_output=True, text=True, check=False
        )
        first.kill()
        first.stdout.read()
    assert second.returncode == 1
    assert "in use by another gateway: stop it" in second.stderr
    location = SQLiteFile(tmp_path)
    assert location.open().check() == "ok"
    location.close()
