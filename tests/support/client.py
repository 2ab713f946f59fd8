"""Clients under test: the Python and JavaScript clients of Moesaic, and real clients in environments of their own.

Environments, of Python or of Node, are created once, under ``MOESAIC_CLIENTS`` or ``~/.cache/moesaic-clients``, and
are named after their packages. A client is a script in ``tests/clients/scripts``. It takes the server's address and
prints one JSON value as its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from moesaic.client import Retries
from tests.support.require import require_program

ROOT = Path(__file__).parents[2]
JS_PACKAGE, JS_SOURCE = ROOT / "clients/js", ROOT / "moesaic/serve/web/client"
"""The npm package of the JavaScript client, and its source."""
AT_ONCE = Retries(first=0.0)
"""Retry policy without a pause before the first retry."""
SCRIPTS = Path(__file__).parents[1] / "clients/scripts"


def _root() -> Path:
    return Path(os.environ.get("MOESAIC_CLIENTS") or Path.home() / ".cache/moesaic-clients")


def environment(name: str, *packages: str, on_top: bool = False) -> Path:
    """Return the Python of a virtual environment with these pinned packages; create it on the first call.

    With ``on_top``, the packages of the tests' own environment are there too, such as torch.
    """
    folder = _root() / "-".join((name, *(package.rpartition("==")[2] for package in packages)))
    python, ready = folder / "bin/python", folder / "ready"
    if not ready.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        if on_top:
            [below] = folder.glob("lib/python*/site-packages")
            (below / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *packages]
        subprocess.run(install, check=True)
        ready.touch()
    return python


def node_modules(name: str, *packages: str) -> Path:
    """Return a folder in which npm installed these pinned packages; create it on the first call."""
    folder = _root() / "-".join((name, *(package.rpartition("@")[2] for package in packages)))
    ready = folder / "ready"
    if not ready.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        install = [require_program("npm"), "install", "--no-audit", "--no-fund", "--save-exact", *packages]
        subprocess.run(install, cwd=folder, check=True, capture_output=True, text=True)
        ready.touch()
    return folder


def run(python: Path, script: str, *arguments: str, **environment: str) -> Any:
    """Run a client's script and return the JSON value in the last line of its output."""
    inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    command = [str(python), str(SCRIPTS / script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=inherited | environment, check=False
    )
    assert done.returncode == 0, f"{script}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def node(*arguments: Any, **environment: str) -> str:
    """Run a program in Node and return its output."""
    command = [require_program("node"), "--no-warnings", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout
