"""The page's modules that need no browser, tested by Node's own test runner."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MODULES = Path(__file__).parent / "modules"


@pytest.mark.parametrize("path", sorted(MODULES.glob("*.test.js")), ids=lambda path: path.name.partition(".")[0])
def test_modules(path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node here (20 or later) to run the page's modules")
    done = subprocess.run([node, "--no-warnings", "--test", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
