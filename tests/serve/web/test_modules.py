"""The page's modules that need no browser, tested by Node's test runner, and the server that delivers them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest

from tests.support.require import require_program
from tests.support.server import running

MODULES = Path(__file__).parent / "modules"


@pytest.mark.parametrize("path", sorted(MODULES.glob("*.test.js")), ids=lambda path: path.name.partition(".")[0])
def test_modules(path: Path) -> None:
    node = require_program("node")  # 20.19 or later
    done = subprocess.run([node, "--no-warnings", "--test", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_server_delivers_the_client_modules() -> None:
    with running() as server:
        response = httpx.get(f"{server.url}/web/client/index.js")
        assert response.status_code == 200 and "./client.js" in response.text
        assert response.headers["content-type"].startswith("text/javascript")
        assert "script-src 'self'" in response.headers["content-security-policy"]
