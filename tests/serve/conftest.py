"""Fixtures: a server over a scripted backend, on a real socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.http import Raw
from tests.support.server import Server, running


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while Raw.opened:
        Raw.opened.pop().socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as server:
        yield server
