"""The page's modules that need no browser, tested by Node's own test runner."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.require import require_program

MODULES = Path(__file__).parent / "modules"


@pytest.mark.parametrize("path", sorted(MODULES.glob("*.test.js")), ids=lambda path: path.name.partition(".")[0])
def test_modules(path: Path) -> None:
    node = require_program("node")  # 20 or later
    done = subprocess.run([node, "--no-warnings", "--test", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
