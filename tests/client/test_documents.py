"""What docs/clients.md and the JavaScript client's own page show is run, against our server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.client import JS, node
from tests.support.documents import blocks

PAGE = JS.parents[1] / "docs/clients.md"
HERE = "http://127.0.0.1:8000"


def written(page: Path, language: str) -> list[str]:
    return [block for block in blocks(language, page.read_text()) if "moesaic" in block and "api_key" not in block]


@pytest.mark.parametrize("place", range(2))
def test_python(served, place):
    program = written(PAGE, "python")[place].replace(HERE, served)
    environment = os.environ | {"MOESAIC_BASE_URL": served}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40


@pytest.mark.parametrize("page", [PAGE, JS / "README.md"], ids=lambda page: page.name)
def test_javascript(served, page, tmp_path):
    [program] = written(page, "js")
    file = tmp_path / "shown.mjs"
    source = program.replace(HERE, served).replace('"moesaic-client"', f'"{(JS / "src/index.js").as_uri()}"')
    file.write_text(source)
    assert len(node(file)) > 40
