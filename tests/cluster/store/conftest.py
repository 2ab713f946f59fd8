"""Fixtures of the store tests, which run on every kind of store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic import registry
from moesaic.cluster import store
from tests.support.postgres import Database, Server
from tests.support.stores import Location, SQLiteFile, SyncStore


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.remove()


@pytest.fixture
def database(server: Server) -> Iterator[Database]:
    database = Database(server)
    yield database
    database.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SQLiteFile]:
    (tmp_path / "jobs").mkdir()
    file = SQLiteFile(tmp_path / "jobs")
    yield file
    file.close()


@pytest.fixture(params=registry.names(store.FOLDER))
def location(request: pytest.FixtureRequest) -> Location:
    location: Location = request.getfixturevalue({"sqlite": "file", "postgres": "database"}[request.param])
    return location


@pytest.fixture
def store(location: Location) -> SyncStore:
    """An empty store with the default limits."""
    return location.open()
