"""CI skips no test for want of something that can be installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.require import require, require_package, require_program

ROOT = Path(__file__).parent.parent
PACKAGES = {"node": "nodejs", "npm": "npm", "ip": "iproute2", "ss": "iproute2", "systemd-analyze": "systemd"}
"""Debian's package of each program that a test requires."""


@pytest.mark.parametrize("ask", [lambda: require(None, "x"), lambda: require_program("no-such-program")])
def test_what_is_missing_is_an_error_in_ci_and_a_skip_elsewhere(ask, monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must install it"):
        ask()
    with pytest.raises(pytest.fail.Exception, match="CI must install it"):
        require_package("no_such_package")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        ask()


def test_ci_installs_every_program_that_a_test_requires():
    script = (ROOT / ".ci/run").read_text()
    assert "export CI=true" in script
    installed = set(re.findall(r"packages\+=\(([a-z0-9-]+)\)", script))
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    needed = set(re.findall(r'require_program\("([a-z-]+)"\)', tests)) - {"no-such-program"}
    assert {PACKAGES[name] for name in needed} | {"chromium", "postgresql"} <= installed
