"""Real clients against a real server: each client in a virtual environment of its own, for they exclude each other.

An environment is made once, under ``MOESAIC_CLIENTS`` or ``~/.cache/moesaic-clients``, and named by what is in
it. A client is a script in ``scripts/`` that takes the server's address and prints one JSON value, its last line.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Server, running

SCRIPTS = Path(__file__).parent / "scripts"


def environment(name: str, *packages: str) -> Path:
    """Return the Python of a virtual environment that has these pinned packages; make it if need be."""
    root = Path(os.environ.get("MOESAIC_CLIENTS") or Path.home() / ".cache/moesaic-clients")
    folder = root / "-".join((name, *(package.rpartition("==")[2] for package in packages)))
    python, ready = folder / "bin/python", folder / "ready"
    if not ready.exists():
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *packages]
        subprocess.run(install, check=True)
        ready.touch()
    return python


def run(python: Path, script: str, *arguments: str, **environment: str) -> Any:
    """Run a client's script and return what it printed last, read as JSON."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    command = [str(python), str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=kept | environment, check=False)
    assert done.returncode == 0, f"{script}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def serving(log: Path, *flags: str) -> Iterator[str]:
    """Run ``moesaic serve`` with the built-in model, in a process of its own, and yield its address."""
    command = [sys.executable, "-m", "moesaic.cli", "serve", "--port", "0", *flags]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        yield address(process, log)
    finally:
        died = process.poll()
        process.terminate()
        code = process.wait(60)
        assert died is None and code == 0, f"the server ended with {code}: {log.read_text()[-4000:]}"


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until a server says where it serves."""
    for _ in range(600):
        for line in log.read_text().splitlines():
            if '"event": "serving"' in line:
                return str(json.loads(line)["url"])
        if process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"the server did not start: {log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the built-in model."""
    with serving(tmp_path_factory.mktemp("serve") / "log") as url:
        yield url


@pytest.fixture
def scripted() -> Iterator[Server]:
    """A server whose answers the test writes."""
    with running() as found:
        yield found
