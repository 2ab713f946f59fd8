"""Thousands of jobs while workers and gateways are killed and stopped at random; and what is found without fences."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.kill_workers import kill_workers
from tests.support.postgres import Database, Server
from tests.support.sizes import sizes

JOBS = int(os.environ.get("MOESAIC_KILL_JOBS", "5000"))
FULL: dict[str, Any] = {"jobs": JOBS, "kills": 0.75}
SMALL: dict[str, Any] = {"jobs": 100, "kills": 0.3, "attacks": 24, "lease": 0.5, "workers": 12, "clients": 48}
"""Options of the harness. A small run ends after a number of attacks, one of them on the gateway, on any machine."""

UNFENCED = "tests.support.unfenced_gateway"


@pytest.fixture
def databases() -> Iterator[Callable[[], str]]:
    """A factory of addresses of empty databases."""
    server, databases = Server(), []

    def make() -> str:
        databases.append(Database(server))
        return databases[-1].where

    yield make
    for database in databases:
        database.close()
    server.remove()


def check(figures: dict[str, Any]) -> None:
    """Assert that no job was lost, answered wrongly or done twice, and that the store is whole and empty."""
    assert figures["jobs"] == figures["answered"], figures
    assert (figures["wrong"], figures["done_under_two_fences"], figures["dead"]) == (0, 0, 0), figures
    assert (figures["integrity"], figures["left"]) == ("ok", {}), figures
    assert not any("mistake" in message for message in figures["told"]), figures


def run_until_shown(options: dict[str, Any], make_store: Callable[[], str]) -> None:
    """Run the harness until late results were refused and a gateway was killed; a full run shows both at once."""
    for seed in range(1, 2 if options is FULL else 9):
        figures = kill_workers(where=make_store(), seed=seed, **options)
        check(figures)
        if figures["late_results_refused"] and figures["workers_killed"] and figures["gateway_killed"]:
            return
    pytest.fail(f"no run refused late results after kills: {figures}")


@pytest.mark.parametrize("options", sizes(SMALL, FULL))
def test_with_a_file_nothing_is_lost_and_nothing_counts_twice(tmp_path, options):
    names = itertools.count()
    run_until_shown(options, lambda: str(tmp_path / f"{next(names)}.sqlite"))


@pytest.mark.parametrize("options", sizes(SMALL, FULL))
def test_with_a_database_nothing_is_lost_and_nothing_counts_twice(databases, options):
    run_until_shown(options, databases)


@pytest.mark.parametrize("options", sizes(SMALL, {"jobs": max(JOBS // 4, 200), "kills": 0.3}))
def test_without_the_fence_it_is_found(tmp_path, options):
    """Negative control: a gateway that takes late results does jobs twice, and the figures show it."""
    for seed in range(1, 9):
        figures = kill_workers(where=str(tmp_path / f"{seed}.sqlite"), seed=seed, gateway=UNFENCED, **options)
        if figures["done_under_two_fences"] or figures["wrong"]:
            return
    pytest.fail(f"the missing fence was not found: {figures}")
