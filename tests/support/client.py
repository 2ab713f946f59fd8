"""Clients under test: the Python and JavaScript clients of Moesaic, and real clients in environments of their own.

An environment is made once, under ``MOESAIC_CLIENTS`` or ``~/.cache/moesaic-clients``, and named by the packages in
it. A client is a script in ``tests/clients/scripts`` that takes the server's address and prints one JSON value as its
last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from moesaic.client import Retries
from tests.support.require import require_program

ROOT = Path(__file__).parents[2]
JS_PACKAGE, JS_SOURCE = ROOT / "clients/js", ROOT / "moesaic/serve/web/client"
"""The npm package of the JavaScript client, and its source."""
AT_ONCE = Retries(first=0.0)
"""Retries without a pause before the first."""
SCRIPTS = Path(__file__).parents[1] / "clients/scripts"


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


def node(*arguments: Any, **environment: str) -> str:
    """Run a program in Node and return what it printed."""
    command = [require_program("node"), "--no-warnings", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout
