"""Registry folders: each module in such a folder is an entry, and its file name is the entry's name.

This module lists and imports the entries of registry folders such as ``formats``, ``ops``, ``models`` and
``checkpoints``. It does not depend on what the entries contain. The ``__init__`` of a folder states the contract of its
entries, and ``tests/test_contracts.py`` checks them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from moesaic.errors import NotFound


def names(folder: str) -> list[str]:
    """Return the sorted names of the entries in ``moesaic/<folder>``; modules that begin with ``_`` are not entries."""
    root = Path(__file__).parent / folder
    files = {path.stem for path in root.glob("*.py")}
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    return sorted(name for name in files | packages if not name.startswith("_"))


def load(folder: str, name: str) -> ModuleType:
    """Import the entry ``name`` of ``moesaic/<folder>`` and return its module.

    An import error inside the module is not caught: a missing dependency must not look like a missing entry.

    Raises:
        NotFound: the entry does not exist; the message lists the available entries.
    """
    available = names(folder)
    if name not in available:
        raise NotFound(f"{folder} has no entry {name!r}; available: {', '.join(available)}")
    return importlib.import_module(f"moesaic.{folder.replace('/', '.')}.{name}")
