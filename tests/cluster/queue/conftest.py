"""One set of tests, run over every store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic import registry
from moesaic.cluster import store
from tests.support.postgres import Database, Server
from tests.support.stores import File, Place, Sync


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
def file(tmp_path: Path) -> Iterator[File]:
    (tmp_path / "jobs").mkdir()
    file = File(tmp_path / "jobs")
    yield file
    file.close()


@pytest.fixture(params=registry.names(store.FOLDER))
def place(request: pytest.FixtureRequest) -> Place:
    place: Place = request.getfixturevalue({"sqlite": "file", "postgres": "database"}[request.param])
    return place


@pytest.fixture
def store(place: Place) -> Sync:
    """An empty store with the usual bounds."""
    return place.open()
