"""Real clients against a real server: each client in a virtual environment of its own, for they exclude each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.server import serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the model tales."""
    with serving(tmp_path_factory.mktemp("serve") / "log", "tales") as url:
        yield url
