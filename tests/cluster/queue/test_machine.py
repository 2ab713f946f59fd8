"""Random sequences of everything a store does, beside a model of it that is too plain to be wrong.

``MOESAIC_SEQUENCES`` says how many are run over SQLite; over PostgreSQL a sixteenth of them is, for each operation is a
dozen ways to the server and back.
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
from tests.cluster.queue.model import Model
from tests.support.folders import memory_parent
from tests.support.postgres import Database
from tests.support.sizes import sizes
from tests.support.stores import File, Sync

SEQUENCES = int(os.environ.get("MOESAIC_SEQUENCES", "2000"))
STEPS = 100
BOUNDS = StoreLimits(
    queued=14, queued_per_tenant=8, queued_cost=300, crashes=3, retention_ticks=2, max_ended=8, idempotency_ticks=3
)
some = st.integers(0, 10**6)


class Machine(RuleBasedStateMachine):
    """One sequence. Numbers choose among what there is, so that nothing is drawn in vain."""

    place: Any

    def __init__(self) -> None:
        super().__init__()
        self.place.empty()
        self.store: Sync = self.place.open(BOUNDS)
        self.model = Model(BOUNDS)
        self.submitted: list[Job] = []
        self.holds: list[LeaseToken] = []
        self.active_leases: list[LeaseStatus] = []

    def same(self, name: str, *values: Any) -> Any:
        """Do the same to both; return what came of it, or None where both refused."""
        try:
            expected = getattr(self.model, name)(*values)
        except (MoesaicError, ValueError) as refusal:
            with pytest.raises(type(refusal)):
                getattr(self.store, name)(*values)
            return None
        found = getattr(self.store, name)(*values)
        assert found == expected, name
        return found

    def lease_token(self, which: int) -> LeaseToken:
        """Return a token that was given once: every other time one of the last ones."""
        if not self.holds:
            return LeaseToken("nobody's", 1)
        last = self.holds[-4:] if which % 2 else self.holds
        return last[which // 2 % len(last)]

    def id(self, which: int) -> str:
        return self.submitted[which % len(self.submitted)].id if self.submitted else "nobody's"

    def right(self, *ids: str) -> None:
        """Assert that these jobs, and what is counted of all, are as they should be."""
        assert self.store.depths() == self.model.depths()
        for job_id in ids:
            seen, known = self.store.snapshot(job_id), self.model.jobs.get(job_id)
            assert (seen is None) == (known is None)
            if seen is not None and known is not None:
                assert seen.job == known.job
                assert (seen.state, seen.fence, seen.worker) == (known.state, known.fence, known.worker)
                assert (seen.attempts, seen.crashes) == (known.attempts, known.crashes)
                assert (seen.logged, seen.result) == (known.logged, known.result)
                assert self.store.log(job_id) == known.log

    @rule(which=some)
    def submit(self, which: int) -> None:
        draw = random.Random(which)
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
        self.right(job.id)

    @rule(which=some)
    def submit_again(self, which: int) -> None:
        if self.submitted:
            job = self.submitted[which % len(self.submitted)]
            self.same("submit", job)
            self.right(job.id)

    @rule(most=st.integers(0, 5), models=st.sampled_from(["m", "n", "mn"]), suspects=st.booleans(), worker=some)
    def lease(self, most: int, models: str, suspects: bool, worker: int) -> None:
        who = f"w{worker % 3}"
        leases = self.store.lease(who, list(models), most, suspects=suspects)
        ids = [lease.job.id for lease in leases]
        if suspects:
            self.model.may_be_next_suspects(ids, models, most)
        else:
            self.model.may_be_next(ids, models, most)
        self.model.lease(who, leases)
        self.holds += [LeaseToken(lease.job.id, lease.fence) for lease in leases]
        self.right(*ids)

    @rule(which=st.lists(some, max_size=4))
    def renew(self, which: list[int]) -> None:
        holds = list({hold.id: hold for hold in map(self.lease_token, which)}.values())
        self.same("renew", holds)

    @rule(which=some, back=st.sampled_from([0, 0, 0, 1, 2, -1]), count=st.integers(1, 3))
    def append(self, which: int, back: int, count: int) -> None:
        """In order, again, across the end, or with a gap."""
        hold = self.lease_token(which)
        known = self.model.jobs.get(hold.id)
        record = LogRecord(max((known.logged if known else 0) - back, 0), count, b"%d" % which)
        assert self.store.append({hold: record}) == {hold.id: self.model.append(hold, record)}
        self.right(hold.id)

    @rule(
        which=some, state=st.sampled_from(["done", "failed"]), back=st.sampled_from([None, None, 0, 1, -1]), count=some
    )
    def finish(self, which: int, state: str, back: int | None, count: int) -> None:
        hold = self.lease_token(which)
        known = self.model.jobs.get(hold.id)
        start = max((known.logged if known else 0) - (back or 0), 0)
        last = None if back is None else LogRecord(start, 1 + count % 2, b"last")
        self.same("finish", hold, state, b"%d" % which, last)
        self.right(hold.id)

    @rule(which=st.lists(some, max_size=4))
    def release(self, which: list[int]) -> None:
        holds = list(map(self.lease_token, which))
        self.same("release", holds)
        self.right(*(hold.id for hold in holds))

    @rule(which=st.lists(some, max_size=4))
    def forgive_crash(self, which: list[int]) -> None:
        holds = list(map(self.lease_token, which))
        self.same("forgive_crash", holds)
        self.right(*(hold.id for hold in holds))

    @rule()
    def watch(self) -> None:
        self.active_leases = self.store.active_leases()
        live = {(each.job.id, each.fence, each.worker, each.heartbeat) for each in self.leased()}
        assert {
            (beat.lease_token.id, beat.lease_token.fence, beat.worker, beat.heartbeat) for beat in self.active_leases
        } == live

    def leased(self) -> list[Any]:
        return [known for known in self.model.jobs.values() if known.state == "leased"]

    @rule(worker=some, fresh=st.booleans())
    def expire(self, worker: int, fresh: bool) -> None:
        """Lose a worker, by what was seen of it now or a while ago."""
        if fresh:
            self.watch()
        active_leases = [beat for beat in self.active_leases if beat.worker == f"w{worker % 3}"]
        self.same("expire", active_leases)
        self.right(*(beat.lease_token.id for beat in active_leases))

    @rule(which=some)
    def cancel(self, which: int) -> None:
        self.same("cancel", self.id(which))
        self.right(self.id(which))

    @rule(which=some)
    def revive(self, which: int) -> None:
        dead = [job_id for job_id, known in self.model.jobs.items() if known.state == "dead"]
        job_id = dead[which % len(dead)] if dead else self.id(which)
        self.same("revive", job_id)
        self.right(job_id)

    @rule(times=st.sampled_from([1, 1, 1, 3]))
    def tick(self, times: int) -> None:
        for _ in range(times):
            assert self.store.tick(self.model.tick_count) == self.model.tick()
        assert self.store.tick(-1) == self.model.tick_count
        self.right()

    @rule(which=st.integers(0, 5))
    def crash(self, which: int) -> None:
        if which == 0:
            old, self.store = self.store, self.place.crash(self.store, BOUNDS)
            old.close()
            self.everything_is_right()

    def everything_is_right(self) -> None:
        assert self.store.check() == "ok"
        self.right(*(job.id for job in self.submitted))

    def teardown(self) -> None:
        """All that was accepted ends."""
        for suspects in (False, True) * 8:
            for lease in self.store.lease("w", ["m", "n"], 99, suspects=suspects):
                self.model.lease("w", [lease])
                self.same("finish", LeaseToken(lease.job.id, lease.fence), "done", b"", None)
        for known in self.leased():
            self.same("cancel", known.job.id)
        assert all(known.ends == 1 for known in self.model.jobs.values())
        self.everything_is_right()
        self.store.close()


class Files:
    """Files of jobs, each empty; a crash is a copy of what is on disk at that moment."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="jobs-", dir=memory_parent()))
        self._places: list[File] = []

    def empty(self) -> None:
        self.close()
        self._new()

    def _new(self) -> Path:
        folder = self._folder / str(len(self._places))
        folder.mkdir()
        self._places.append(File(folder))
        return folder

    def open(self, bounds: StoreLimits) -> Sync:
        return self._places[-1].open(bounds)

    def crash(self, store: Sync, bounds: StoreLimits) -> Sync:
        old = Path(self._places[-1].where)
        new = self._new()
        for name in (old.name, f"{old.name}-wal"):
            shutil.copy(old.with_name(name), new / name)
        return self.open(bounds)

    def close(self) -> None:
        for place in self._places:
            place.close()
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        self._places.clear()


class Databases:
    """One database, emptied again and again; a crash is a connection that ends."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.open = database.open

    def empty(self) -> None:
        self._database.server.sql("DROP SCHEMA IF EXISTS moesaic CASCADE", self._database.database)

    def crash(self, store: Sync, bounds: StoreLimits) -> Sync:
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'moesaic'"
        self._database.server.sql(end, self._database.database)
        return self.open(bounds)


@pytest.fixture
def files() -> Iterator[Files]:
    files = Files()
    yield files
    files.close()
    files._folder.rmdir()


def run(place: object, sequences: int) -> None:
    machine: Callable[[], RuleBasedStateMachine] = type("Machine", (Machine,), {"place": place})
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
