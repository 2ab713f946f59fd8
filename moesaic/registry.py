"""The folder is the registry: a file's stem is the name under which it is known.

Knows how to list and import the files of a registry folder (``formats``, ``ops``, ``models``,
``checkpoints``, ``cluster/store``). Does not know what they contain: the folder's ``__init__`` states the contract
and ``tests/test_contracts.py`` holds every file to it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from moesaic.errors import NotFound


def names(folder: str) -> list[str]:
    """Return the sorted names in ``moesaic/<folder>``; files that begin with ``_`` are shared pieces, not entries."""
    root = Path(__file__).parent / folder
    files = {path.stem for path in root.glob("*.py")}
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    return sorted(name for name in files | packages if not name.startswith("_"))


def load(folder: str, name: str) -> ModuleType:
    """Import the file ``moesaic/<folder>/<name>.py``.

    Raises:
        NotFound: no such file; the message names what exists. An import error *inside* the file
            is not caught, so that a missing dependency is never mistaken for a missing entry.
    """
    known = names(folder)
    if name not in known:
        raise NotFound(f"{folder} has no {name!r}; it has {', '.join(known)}")
    return importlib.import_module(f"moesaic.{folder.replace('/', '.')}.{name}")
