"""Servers to ask: one that breaks, one whose answers are written, and ours in a process of its own."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.support import breaking_server as breaks
from tests.support.breaking_server import Breaking
from tests.support.client import JS_SOURCE
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


class Files(http.server.SimpleHTTPRequestHandler):
    """The source of the JavaScript client, and an empty page."""

    def do_GET(self) -> None:
        if self.path == "/":
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>a page</title>")
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def page_port() -> Iterator[int]:
    """Port of a web server that serves the JavaScript client."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=JS_SOURCE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def served(page_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``moesaic serve`` with the built-in model, which lets one page of another origin ask."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with serving(log, "--cors-origin", f"http://127.0.0.1:{page_port}") as url:
        yield url
