"""Thousands of jobs while workers and gateways are killed and stopped at random; and what is found without fences."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.kill_workers import kill_workers
from tests.support.postgres import Database, Server
from tests.support.sizes import sizes

JOBS = int(os.environ.get("MOESAIC_KILL_JOBS", "5000"))


SMALL = 600
"""Jobs of the small runs: three seconds' worth, so that a gateway is killed once."""


@pytest.fixture
def databases() -> Iterator[Callable[[], str]]:
    """A factory of addresses of empty databases."""
    server, made = Server(), []

    def make() -> str:
        made.append(Database(server))
        return made[-1].where

    yield make
    for database in made:
        database.close()
    server.remove()


def sound(found: dict[str, Any]) -> None:
    assert (found["lost"], found["wrong"], found["done_under_two_fences"], found["dead"]) == (0, 0, 0, 0), found
    assert (found["integrity"], found["left"]) == ("ok", {}), found
    assert not any("mistake" in message for message in found["told"]), found


def run_until_shown(jobs: int, place: Callable[[], str | None]) -> None:
    """Run the harness until late results were refused and a gateway was killed; a full run shows both at once."""
    for seed in range(1, 2 if jobs == JOBS else 9):
        found = kill_workers(jobs, place(), seed=seed, kills=0.75 if jobs == JOBS else 0.3)
        sound(found)
        if found["late_results_refused"] and found["workers_killed"] and found["gateway_killed"]:
            return
    pytest.fail(f"nothing was shown: {found}")


@pytest.mark.parametrize("jobs", sizes(SMALL, JOBS))
def test_with_a_file_nothing_is_lost_and_nothing_counts_twice(jobs):
    run_until_shown(jobs, lambda: None)


@pytest.mark.parametrize("jobs", sizes(SMALL, JOBS))
def test_with_a_database_nothing_is_lost_and_nothing_counts_twice(databases, jobs):
    run_until_shown(jobs, databases)


@pytest.mark.parametrize("jobs", sizes(SMALL, max(JOBS // 4, 200)))
def test_without_the_fence_it_is_found(jobs):
    """The negative control: late results are taken, and jobs are done twice."""
    seeds = iter(range(1, 9))
    while True:
        found = kill_workers(jobs, seed=next(seeds), gateway="tests.support.unfenced_gateway", kills=0.3)
        if found["done_under_two_fences"] or found["wrong"]:
            break
