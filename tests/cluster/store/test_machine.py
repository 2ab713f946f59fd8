"""Random sequences of store operations, compared with a simple model in memory.

``MOESAIC_SEQUENCES`` is the number of sequences on SQLite. PostgreSQL gets a sixteenth of them, because each operation
needs about a dozen messages to the server.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from moesaic.cluster.jobs import Job, LeaseStatus, LeaseToken, LogRecord, StoreLimits
from moesaic.errors import MoesaicError
from tests.cluster.store.model import Model
from tests.support.folders import memory_parent
from tests.support.postgres import Database
from tests.support.sizes import sizes
from tests.support.stores import SQLiteFile, SyncStore

SEQUENCES = int(os.environ.get("MOESAIC_SEQUENCES", "2000"))
STEPS = 100
BOUNDS = StoreLimits(
    queued=14, queued_per_tenant=8, queued_cost=300, crashes=3, retention_ticks=2, max_ended=8, idempotency_ticks=3
)
numbers = st.integers(0, 10**6)


class Machine(RuleBasedStateMachine):
    """One sequence. Drawn numbers choose among the jobs and leases that exist, so that every step has an effect."""

    place: Any

    def __init__(self) -> None:
        super().__init__()
        self.place.empty()
        self.store: SyncStore = self.place.open(BOUNDS)
        self.model = Model(BOUNDS)
        self.submitted: list[Job] = []
        self.lease_tokens: list[LeaseToken] = []
        self.active_leases: list[LeaseStatus] = []

    def same(self, name: str, *values: Any) -> Any:
        """Run an operation on the store and on the model; return its result, or None if both refuse it."""
        try:
            expected = getattr(self.model, name)(*values)
        except (MoesaicError, ValueError) as refusal:
            with pytest.raises(type(refusal)):
                getattr(self.store, name)(*values)
            return None
        actual = getattr(self.store, name)(*values)
        assert actual == expected, name
        return actual

    def lease_token(self, choice: int) -> LeaseToken:
        """Return a lease token of the past. Every other time it is one of the last four."""
        if not self.lease_tokens:
            return LeaseToken("nobody's", 1)
        last = self.lease_tokens[-4:] if choice % 2 else self.lease_tokens
        return last[choice // 2 % len(last)]

    def id(self, choice: int) -> str:
        return self.submitted[choice % len(self.submitted)].id if self.submitted else "nobody's"

    def check_jobs(self, *ids: str) -> None:
        """Assert that these jobs and the depths of the queues equal the model's."""
        assert self.store.depths() == self.model.depths()
        for job_id in ids:
            snapshot, expected = self.store.snapshot(job_id), self.model.jobs.get(job_id)
            assert (snapshot is None) == (expected is None)
            if snapshot is not None and expected is not None:
                assert snapshot.job == expected.job
                assert (snapshot.state, snapshot.fence, snapshot.worker) == (
                    expected.state,
                    expected.fence,
                    expected.worker,
                )
                assert (snapshot.attempts, snapshot.crashes) == (expected.attempts, expected.crashes)
                assert (snapshot.logged, snapshot.result) == (expected.logged, expected.result)
                assert self.store.log(job_id) == expected.log

    @rule(choice=numbers)
    def submit(self, choice: int) -> None:
        draw = random.Random(choice)
        job = Job(
            id=f"j{len(self.submitted)}",
            model=draw.choice("mn"),
            body=bytes(draw.choice((0, 10, 5000))),
            tenant=draw.choice("tuv"),
            cost=draw.choice((0, 1, 5, 60)),
            priority=draw.choice((0, 0, 1)),
            idempotency_key=draw.choice(("", "", "a", "b")),
            digest=draw.choice("xxxy"),
        )
        self.submitted.append(job)
        self.same("submit", job)
        self.check_jobs(job.id)

    @rule(choice=numbers)
    def submit_again(self, choice: int) -> None:
        if self.submitted:
            job = self.submitted[choice % len(self.submitted)]
            self.same("submit", job)
            self.check_jobs(job.id)

    @rule(limit=st.integers(0, 5), models=st.sampled_from(["m", "n", "mn"]), suspects=st.booleans(), worker=numbers)
    def lease(self, limit: int, models: str, suspects: bool, worker: int) -> None:
        worker_name = f"w{worker % 3}"
        leases = self.store.lease(worker_name, list(models), limit, suspects=suspects)
        ids = [lease.job.id for lease in leases]
        if suspects:
            self.model.may_be_next_suspects(ids, models, limit)
        else:
            self.model.may_be_next(ids, models, limit)
        self.model.lease(worker_name, leases)
        self.lease_tokens += [LeaseToken(lease.job.id, lease.fence) for lease in leases]
        self.check_jobs(*ids)

    @rule(choices=st.lists(numbers, max_size=4))
    def renew(self, choices: list[int]) -> None:
        lease_tokens = list({lease_token.id: lease_token for lease_token in map(self.lease_token, choices)}.values())
        self.same("renew", lease_tokens)

    @rule(choice=numbers, back=st.sampled_from([0, 0, 0, 1, 2, -1]), count=st.integers(1, 3))
    def append(self, choice: int, back: int, count: int) -> None:
        """Append a record in order, again, across the end of the log, or with a gap."""
        lease_token = self.lease_token(choice)
        expected = self.model.jobs.get(lease_token.id)
        record = LogRecord(max((expected.logged if expected else 0) - back, 0), count, b"%d" % choice)
        assert self.store.append({lease_token: record}) == {lease_token.id: self.model.append(lease_token, record)}
        self.check_jobs(lease_token.id)

    @rule(
        choice=numbers,
        state=st.sampled_from(["done", "failed"]),
        back=st.sampled_from([None, None, 0, 1, -1]),
        count=numbers,
    )
    def finish(self, choice: int, state: str, back: int | None, count: int) -> None:
        lease_token = self.lease_token(choice)
        expected = self.model.jobs.get(lease_token.id)
        start = max((expected.logged if expected else 0) - (back or 0), 0)
        last = None if back is None else LogRecord(start, 1 + count % 2, b"last")
        self.same("finish", lease_token, state, b"%d" % choice, last)
        self.check_jobs(lease_token.id)

    @rule(choices=st.lists(numbers, max_size=4))
    def release(self, choices: list[int]) -> None:
        lease_tokens = list(map(self.lease_token, choices))
        self.same("release", lease_tokens)
        self.check_jobs(*(lease_token.id for lease_token in lease_tokens))

    @rule(choices=st.lists(numbers, max_size=4))
    def forgive_crash(self, choices: list[int]) -> None:
        lease_tokens = list(map(self.lease_token, choices))
        self.same("forgive_crash", lease_tokens)
        self.check_jobs(*(lease_token.id for lease_token in lease_tokens))

    @rule()
    def watch(self) -> None:
        self.active_leases = self.store.active_leases()
        live = {(expected.job.id, expected.fence, expected.worker, expected.heartbeat) for expected in self.leased()}
        assert {
            (status.lease_token.id, status.lease_token.fence, status.worker, status.heartbeat)
            for status in self.active_leases
        } == live

    def leased(self) -> list[Any]:
        return [expected for expected in self.model.jobs.values() if expected.state == "leased"]

    @rule(worker=numbers, fresh=st.booleans())
    def expire(self, worker: int, fresh: bool) -> None:
        """Expire a worker's leases by their status now or some time ago."""
        if fresh:
            self.watch()
        active_leases = [status for status in self.active_leases if status.worker == f"w{worker % 3}"]
        self.same("expire", active_leases)
        self.check_jobs(*(status.lease_token.id for status in active_leases))

    @rule(choice=numbers)
    def cancel(self, choice: int) -> None:
        self.same("cancel", self.id(choice))
        self.check_jobs(self.id(choice))

    @rule(choice=numbers)
    def revive(self, choice: int) -> None:
        dead = [job_id for job_id, expected in self.model.jobs.items() if expected.state == "dead"]
        job_id = dead[choice % len(dead)] if dead else self.id(choice)
        self.same("revive", job_id)
        self.check_jobs(job_id)

    @rule(times=st.sampled_from([1, 1, 1, 3]))
    def tick(self, times: int) -> None:
        for _ in range(times):
            assert self.store.tick(self.model.tick_count) == self.model.tick()
        assert self.store.tick(-1) == self.model.tick_count
        self.check_jobs()

    @rule(choice=st.integers(0, 5))
    def crash(self, choice: int) -> None:
        if choice == 0:
            old_store, self.store = self.store, self.place.crash(self.store, BOUNDS)
            old_store.close()
            self.check_everything()

    def check_everything(self) -> None:
        assert self.store.check() == "ok"
        self.check_jobs(*(job.id for job in self.submitted))

    def finish_ready(self, *, suspects: bool) -> int:
        """Lease and finish the jobs that are ready, or the oldest group of suspects; return the number of jobs."""
        leases = self.store.lease("w", ["m", "n"], 99, suspects=suspects)
        for lease in leases:
            self.model.lease("w", [lease])
            self.same("finish", LeaseToken(lease.job.id, lease.fence), "done", b"", None)
        return len(leases)

    def teardown(self) -> None:
        """Assert that every accepted job can end."""
        while self.finish_ready(suspects=False) + self.finish_ready(suspects=True):
            pass
        for expected in self.leased():
            self.same("cancel", expected.job.id)
        assert all(expected.ends == 1 for expected in self.model.jobs.values())
        self.check_everything()
        self.store.close()


class Files:
    """Empty files for jobs. A crash is simulated by a copy of what is on disk at that moment."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="jobs-", dir=memory_parent()))
        self._places: list[SQLiteFile] = []

    def empty(self) -> None:
        self.close()
        self._new()

    def _new(self) -> Path:
        folder = self._folder / str(len(self._places))
        folder.mkdir()
        self._places.append(SQLiteFile(folder))
        return folder

    def open(self, limits: StoreLimits) -> SyncStore:
        return self._places[-1].open(limits)

    def crash(self, store: SyncStore, limits: StoreLimits) -> SyncStore:
        old_path = Path(self._places[-1].where)
        folder = self._new()
        for name in (old_path.name, f"{old_path.name}-wal"):
            shutil.copy(old_path.with_name(name), folder / name)
        return self.open(limits)

    def close(self) -> None:
        for place in self._places:
            place.close()
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        self._places.clear()


class Databases:
    """One database, which is emptied for each sequence. A crash is simulated by closing its connections."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.open = database.open

    def empty(self) -> None:
        self._database.server.sql("DROP SCHEMA IF EXISTS moesaic CASCADE", self._database.database)

    def crash(self, store: SyncStore, limits: StoreLimits) -> SyncStore:
        statement = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'moesaic'"
        self._database.server.sql(statement, self._database.database)
        return self.open(limits)


@pytest.fixture
def files() -> Iterator[Files]:
    files = Files()
    yield files
    files.close()
    files._folder.rmdir()


def run(stores: object, sequences: int) -> None:
    machine: Callable[[], RuleBasedStateMachine] = type("Machine", (Machine,), {"place": stores})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("sequences", sizes(30, SEQUENCES))
def test_sqlite_matches_the_model(files, sequences):
    run(files, sequences)


@pytest.mark.parametrize("sequences", sizes(3, max(SEQUENCES // 16, 1)))
def test_postgres_matches_the_model(database, sequences):
    run(Databases(database), sequences)
