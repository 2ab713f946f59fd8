"""The examples in docs/how-to/clients.md and in the README of the JavaScript client run against our server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.client import JS_PACKAGE, JS_SOURCE, ROOT, node
from tests.support.documents import blocks

PAGE = ROOT / "docs/how-to/clients.md"
HERE = "http://127.0.0.1:8000"


def examples(page: Path, language: str) -> list[str]:
    return [block for block in blocks(language, page.read_text()) if "moesaic" in block and "api_key" not in block]


@pytest.mark.parametrize("index", range(2))
def test_python(served, index):
    program = examples(PAGE, "python")[index].replace(HERE, served)
    environment = os.environ | {"MOESAIC_BASE_URL": served}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40


@pytest.mark.parametrize("page", [PAGE, JS_PACKAGE / "README.md"], ids=lambda page: page.name)
def test_javascript(served, page, tmp_path):
    [program] = examples(page, "js")
    file = tmp_path / "shown.mjs"
    source = program.replace(HERE, served).replace('"moesaic-client"', f'"{(JS_SOURCE / "index.js").as_uri()}"')
    file.write_text(source)
    assert len(node(file)) > 40
