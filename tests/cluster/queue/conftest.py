"""One set of tests, run over every store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.queue.places import File, Place, Sync


@pytest.fixture(params=["sqlite"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = File(tmp_path_factory.mktemp("jobs"))
    yield place
    place.close()


@pytest.fixture
def store(place: Place) -> Sync:
    """An empty store with the usual bounds."""
    return place.open()
