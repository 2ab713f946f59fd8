"""Thousands of jobs while workers and gateways are killed and stopped at random; and what is found without fences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.harness import harness
from tests.support.postgres import Database, Server
from tests.support.sizes import sizes

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


@pytest.mark.parametrize("jobs", sizes(200, JOBS))
def test_with_a_file_nothing_is_lost_and_nothing_counts_twice(jobs):
    sound(harness(jobs))


@pytest.mark.parametrize("jobs", sizes(200, JOBS))
def test_with_a_database_nothing_is_lost_and_nothing_counts_twice(database, jobs):
    sound(harness(jobs, database.where))


@pytest.mark.parametrize("jobs", sizes(200, JOBS // 4))
def test_without_the_fence_it_is_found(jobs):
    """The negative control: late results are taken, and jobs are done twice."""
    seeds = iter(range(1, 9))
    while True:
        found = harness(jobs, seed=next(seeds), gateway="tests.support.unfenced_gateway", kills=0.3)
        if found["done_under_two_fences"] or found["wrong"]:
            break
