"""Optional programs and packages that some tests need."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest


def require(available: object, reason: str) -> None:
    """Skip the test, or the test module, if something is not ``available``.

    Where ``CI`` is set, fail instead: CI installs everything that can be installed.
    """
    if available:
        return
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must install it")
    pytest.skip(reason, allow_module_level=True)


def require_program(name: str) -> str:
    """Return the path of a program; skip the test if it is not installed, or fail where ``CI`` is set."""
    path = shutil.which(name)
    require(path, f"{name} is not installed")
    return str(path)


def require_package(name: str) -> ModuleType:
    """Import a package; skip the test if it is not installed, or fail where ``CI`` is set."""
    try:
        return importlib.import_module(name)
    except ImportError:
        require(False, f"{name} is not installed")
        raise


def package_folder(name: str) -> Path:
    """Return the folder of an installed package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))
