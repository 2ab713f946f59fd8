"""Programs and packages that some tests need and not every machine has."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def require(available: object, reason: str) -> None:
    """Skip the test if something is not ``available``; fail instead where ``CI`` is set, for CI installs all of it."""
    if available:
        return
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must install it")
    pytest.skip(reason)


def package_folder(name: str) -> Path:
    """Return the folder of an installed package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))
