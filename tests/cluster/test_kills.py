"""Thousands of jobs while workers and gateways are killed and stopped at random; and what is found without fences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.kill_workers import kill_workers
from tests.cluster.queue.server import Database, Server

JOBS = int(os.environ.get("MOESAIC_KILL_JOBS", "5000"))


@pytest.fixture
def database() -> Iterator[Database]:
    server = Server()
    found = Database(server)
    yield found
    found.close()
    server.remove()


def sound(found: dict[str, Any]) -> None:
    assert (found["lost"], found["wrong"], found["done_under_two_fences"], found["dead"]) == (0, 0, 0, 0), found
    assert (found["integrity"], found["left"]) == ("ok", {}), found
    assert not any("mistake" in message for message in found["told"]), found
    assert found["late_results_refused"] > 0, "nothing was shown"
    assert found["workers_killed"] > 0 and found["gateway_killed"] > 0, found


def test_with_a_file_nothing_is_lost_and_nothing_counts_twice():
    sound(kill_workers(JOBS))


def test_with_a_database_nothing_is_lost_and_nothing_counts_twice(database):
    sound(kill_workers(JOBS, database.where))


def test_without_the_fence_it_is_found():
    """The negative control: late results are taken, and jobs are done twice."""
    seeds = iter(range(1, 9))
    while True:
        found = kill_workers(max(JOBS // 4, 200), seed=next(seeds), gateway="tests.cluster.unfenced", kills=0.3)
        if found["done_under_two_fences"] or found["wrong"]:
            break
