"""Servers to ask: one that breaks, one whose answers are written, and ours in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support import breaking_server as breaks
from tests.support.breaking_server import Breaking
from tests.support.client import JS_SOURCE
from tests.support.pages import serving_files
from tests.support.server import Server, running, serving


@pytest.fixture(scope="session")
def breaking() -> Iterator[Breaking]:
    with breaks.running() as found:
        yield found


@pytest.fixture(scope="session")
def http_client() -> Iterator[httpx.Client]:
    """For the many clients of these tests, for making one takes longer than its test."""
    with httpx.Client() as found:
        yield found


@pytest.fixture
def scripted() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture(scope="session")
def page_port() -> Iterator[int]:
    """Port of a web server that serves the JavaScript client."""
    with serving_files(JS_SOURCE) as port:
        yield port


@pytest.fixture(scope="session")
def served(page_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``moesaic serve`` with the model tales, which lets one page of another origin ask."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with serving(log, "tales", "--cors-origin", f"http://127.0.0.1:{page_port}") as url:
        yield url
