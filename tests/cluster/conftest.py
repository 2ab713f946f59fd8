"""Folders of the cluster's tests. They are in memory: processes are killed here, but no power is cut."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.folders import memory_parent


@pytest.fixture(scope="session")
def memory_folder() -> Iterator[Path]:
    """A folder that is in memory where there is room."""
    with tempfile.TemporaryDirectory(prefix="moesaic-tests-", dir=memory_parent()) as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(memory_folder: Path) -> Path:
    """A new folder in memory for each test."""
    return Path(tempfile.mkdtemp(dir=memory_folder))


@pytest.fixture(scope="module")
def module_path(memory_folder: Path) -> Path:
    """A new folder in memory for each module."""
    return Path(tempfile.mkdtemp(dir=memory_folder))
