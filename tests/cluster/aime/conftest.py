"""Fixtures: a gateway with AIME's routes, and connections that are closed after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.cluster.aime import workers
from tests.support.aime import OPEN_CLIENTS, running_gateway
from tests.support.server import Server


@pytest.fixture
def gateway_server(tmp_path: Path) -> Iterator[Server]:
    """A gateway without keys."""
    with running_gateway(tmp_path / "jobs.sqlite") as server:
        yield server


@pytest.fixture(autouse=True)
def _short_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker's request for jobs end after a tenth of a second."""
    monkeypatch.setattr(workers, "MIN_REQUEST_SECONDS", 0.1)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN_CLIENTS:
        OPEN_CLIENTS.pop().close()
